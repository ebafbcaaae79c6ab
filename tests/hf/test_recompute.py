"""Phase III: the oldest rows are deleted, and rebuilt by the model's own projections when a step needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import alisa_compile
from alisa_compile import AlisaConfig, InfeasibleError, NotAvailableError, TierError
from alisa_compile.hf.cache import observe_kv_shapes
from alisa_compile.hf.generate import session_of
from alisa_compile.runtime.budgets import Budgets
from alisa_compile.runtime.footprint import tier_bytes
from alisa_compile.runtime.plan import ModelShape, tier_sizes
from alisa_compile.runtime.profile import FOLDER_VARIABLE, MachineProfile, Table, profile_path
from alisa_compile.runtime.store import StoreShape, TokenStore
from tests.hf.modes import generate
from tests.support import compiled, left_padded, tiny_model

PROMPT, NEW, BATCH, LAYERS = 24, 60, 2, 3
CAPACITY = PROMPT + NEW + 1
HIDDEN = 64
MULTI_HEAD: dict[str, dict[str, Any]] = {"opt": {}, "llama": {"num_key_value_heads": 4}, "neox": {}}
CHURN = {"policy": "churn"}


def model_of(family: str) -> Any:
    if family == "llama, grouped":
        return tiny_model("llama", layers=LAYERS, seed=3, num_key_value_heads=1)
    return tiny_model(family, layers=LAYERS, seed=3, **MULTI_HEAD.get(family, {}))


def budgets_of(model: Any, share: float = 1.0, **options: Any) -> dict[str, int]:
    """A device budget for half of all rows, and a share of what phase II then needs on the host."""
    (heads, width), *_ = observe_kv_shapes(model)  # type: ignore[misc]
    shape = StoreShape(LAYERS, BATCH, heads, width, torch.float32, torch.device("cpu"))
    config = AlisaConfig(**{**options, "recompute": "off"})
    device = int(0.8 * tier_bytes(shape, config, CAPACITY, None)["device"])
    limits = Budgets(device, 1 << 40, 0, {"device": "", "host": "", "disk": ""})
    sizes = tier_sizes(ModelShape((shape,), HIDDEN, 0), config, limits, CAPACITY)
    assert sizes is not None and sizes.host > 20
    host = tier_bytes(shape, config, CAPACITY, sizes)["host"]
    return {"device_kv_budget": device, "host_kv_budget": int(share * host)}


def run(model: Any, inner: str = "eager", **options: Any) -> tuple[torch.Tensor, Any]:
    """Tokens of a padded batch, and the compiled model."""
    ids, mask = left_padded(BATCH, PROMPT)
    candidate = compiled(model, inner=inner, **options)
    return generate(candidate, ids, mask, max_new_tokens=NEW, min_new_tokens=NEW), candidate


def store_of(candidate: Any) -> TokenStore:
    (store,) = session_of(candidate).stores  # type: ignore[union-attr]
    return store


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineProfile:
    """A machine on which rebuilding is slower than loading, as here, for predictions and plans."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    rate = Table(((4096.0, 1e10),))
    made = MachineProfile(
        machine="test", device="cpu", dtype="float32", device_to_host=rate, host_to_device=rate, disk_write=rate,
        disk_read=rate, attention=Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
        linear=Table(((1.0, 1e-9), (64.0, 1e-8)), grows=True), layer_seconds=1e-6,
    )  # fmt: skip
    path = profile_path(torch.device("cpu"), torch.float32)
    assert path.is_relative_to(tmp_path)
    made.save(path)
    return made


@pytest.mark.parametrize(
    ("family", "share", "inner"),
    [
        ("opt", 0.5, "eager"),
        ("llama", 0.7, "eager"),
        pytest.param("opt", 0.7, "inductor", marks=pytest.mark.slow),
        pytest.param("llama", 0.5, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_share_of_what_phase_two_needs(family: str, share: float, inner: str, profile: MachineProfile) -> None:
    """Phases from the planned steps on; tokens as with everything on the device; the host's budget holds.

    With half of it layer inputs, which are half of K and V, need all of the host in the end; until they come, rows have
    the room.
    """
    model = model_of(family)
    options = {**CHURN, **budgets_of(model, share, **CHURN)}
    want, _ = run(model, **CHURN)
    with pytest.raises(InfeasibleError):
        run(model, recompute="off", **options)
    got, candidate = run(model, inner=inner, **options)
    assert torch.equal(got, want)
    report = alisa_compile.report(candidate).to_dict()
    plan = alisa_compile.plan(
        model,
        batch_size=BATCH,
        prompt_length=PROMPT,
        max_new_tokens=NEW,
        profile=profile,
        max_length=CAPACITY,
        **options,
    )
    assert plan.p1 is not None and plan.p2 is not None and 0 < plan.p1 < plan.p2 < NEW
    firsts = {"I": 0, "II": plan.p1, "III": plan.p2}
    assert {phase["phase"]: phase["first_step"] for phase in report["phases"]} == firsts
    assert report["rows_recomputed"] > 0 and report["recompute_ms"] > 0 and report["bytes_saved"] > 0
    assert report["peak_bytes"]["host"] <= options["host_kv_budget"]
    assert report["peak_bytes"]["device"] <= options["device_kv_budget"]
    assert report["graphs_compiled"] == 2 and report["recompiles"] == 0 and not report["skipped"]
    assert "rows recomputed" in str(alisa_compile.report(candidate))
    # Once more, on the same storage.
    ids, mask = left_padded(BATCH, PROMPT)
    assert torch.equal(generate(candidate, ids, mask, max_new_tokens=NEW, min_new_tokens=NEW), want)


def test_grouped_heads_never_delete(profile: MachineProfile) -> None:
    """With 4 query heads a KV head the layer input is larger than K and V: refused with the smallest budget."""
    model = model_of("llama, grouped")
    full, half = budgets_of(model, **CHURN), budgets_of(model, 0.5, **CHURN)
    with pytest.raises(InfeasibleError) as caught:
        run(model, **half, **CHURN)
    assert caught.value.smallest_budgets["host"] == full["host_kv_budget"]
    plan = alisa_compile.plan(
        model, batch_size=BATCH, prompt_length=PROMPT, max_new_tokens=NEW, profile=profile, max_length=CAPACITY,
        **full, **CHURN,
    )  # fmt: skip
    assert plan.p1 is not None and plan.p2 is None and plan.beta == 0
    assert "recomputing cannot win" in plan.reasons["beta"]
    assert plan.reasons["form"] == "kv in all layers: no smaller tensor makes K and V again"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama, grouped", CHURN),
        pytest.param("qwen3", {"refresh": 5}, marks=pytest.mark.slow),
        pytest.param("neox", CHURN, marks=pytest.mark.slow),
        pytest.param("falcon", CHURN, marks=pytest.mark.slow),
        pytest.param("gemma3", CHURN, marks=pytest.mark.slow),
        pytest.param("opt", {"sparsity": 0.0}, marks=pytest.mark.slow),
        pytest.param("llama", {"policy": "churn", "head_mode": "per_kv_head"}, marks=pytest.mark.slow),
        pytest.param("opt", {"policy": "churn", "kv_dtype": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_always(family: str, options: dict[str, Any]) -> None:
    """Every row that leaves the device leaves as its layer input: no K and V are on the host. The same tokens."""
    model = model_of(family)
    want, _ = run(model, **options)
    device = budgets_of(model, **options)["device_kv_budget"]
    got, candidate = run(model, device_kv_budget=device, recompute="always", **options)
    tiers = store_of(candidate).tiers
    assert tiers is not None and tiers.ring == 0 and tiers.hidden is not None
    if options.get("kv_dtype") != "int8":  # there the layer input is rounded as well
        assert torch.equal(got, want)
    report = alisa_compile.report(candidate).to_dict()
    assert [phase["phase"] for phase in report["phases"]] == ["I", "III"]
    assert report["rows_recomputed"] > 0
    assert int(tiers.hidden.deleted[0]) == int(tiers.below[0]) > 0


@pytest.mark.slow
def test_a_prompt_of_one_token() -> None:
    """No graph of several tokens is ever compiled; K and V are made by that of a single one."""
    model = model_of("llama")
    device = budgets_of(model, **CHURN)["device_kv_budget"]
    ids, new = torch.tensor([[5], [7]]), PROMPT + NEW - 1
    tokens = []
    for options in ({}, {"device_kv_budget": device, "recompute": "always"}):
        candidate = compiled(model, inner="eager", **CHURN, **options)
        tokens.append(generate(candidate, ids, max_new_tokens=new, min_new_tokens=new))
    assert torch.equal(*tokens)
    report = alisa_compile.report(candidate).to_dict()
    assert report["rows_recomputed"] > 0 and list(report["rewritten"]) == ["decode"]


def test_rows_on_disk_after_the_deleted_ones() -> None:
    """The oldest are deleted, those after them go to disk, the latest are on the host."""
    model = model_of("llama")
    position = LAYERS * BATCH * 2 * HIDDEN * 4
    options = {**CHURN, **budgets_of(model, 0.6, **CHURN), "disk_kv_budget": 4 * position}
    want, _ = run(model, **CHURN)
    got, candidate = run(model, **options)
    assert torch.equal(got, want)
    store = store_of(candidate)
    assert store.tiers is not None and store.tiers.hidden is not None and store.disk is not None
    assert 0 < int(store.tiers.hidden.deleted[0]) < int(store.tiers.on_disk[0]) < int(store.tiers.below[0])
    report = alisa_compile.report(candidate).to_dict()
    assert report["bytes_moved"]["disk_read"] > 0 and report["rows_recomputed"] > 0
    assert report["peak_bytes"]["disk"] <= 4 * position


@pytest.mark.slow
def test_a_prompt_in_chunks_and_further_turns() -> None:
    """Chunks attend to a history of which some is rebuilt; and so does a second turn on the same cache."""
    model = model_of("llama")
    prompt = torch.randint(2, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"sparsity": 0.0, "max_length": 140}
    tokens = []
    for budgets in ({}, {"device_kv_budget": 150_000, "recompute": "always"}):
        candidate = compiled(model, inner="eager", **options, **budgets)
        cache = alisa_compile.AlisaCache(model.config, **options, **budgets)
        text = generate(candidate, prompt, max_new_tokens=5, past_key_values=cache, prefill_chunk_size=32)
        text = torch.cat((text, prompt[:, :20]), 1)
        tokens.append(generate(candidate, text, max_new_tokens=5, past_key_values=cache))
        if budgets:
            hidden = cache.stores[0].tiers.hidden  # type: ignore[union-attr]
            assert hidden is not None and int(hidden.deleted[0]) > 0 and hidden.rows_recomputed > 0
    assert torch.equal(*tokens)


@pytest.mark.slow
def test_beams_and_copies() -> None:
    """Sequences that are reordered, and copied, take their saved layer inputs along."""
    model = model_of("llama")
    ids, mask = left_padded(BATCH, 30)
    options = {"num_beams": 3, "max_new_tokens": 20, "min_new_tokens": 20}
    want = generate(compiled(model, inner="eager", sparsity=0.0), ids, mask, **options)
    candidate = compiled(model, inner="eager", sparsity=0.0, device_kv_budget=400_000, recompute="always")
    got = generate(candidate, ids, mask, **options)
    assert torch.equal(got, want)
    assert alisa_compile.report(candidate).to_dict()["rows_recomputed"] > 0


def test_refusals() -> None:
    """Where rows cannot be rebuilt, `always` is an error that says why, and `auto` deletes nothing."""
    model = model_of("llama")
    ids, mask = left_padded(BATCH, PROMPT)
    with pytest.raises(NotAvailableError, match=r"only generate\(\)"):
        alisa_compile.AlisaCache(model.config, recompute="always", batch_size=1)
    moving = tiny_model("llama", layers=1, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(NotAvailableError, match="rotary frequencies change"):
        generate(compiled(moving, inner="eager", recompute="always", device_kv_budget=60_000), ids, mask)
    device = budgets_of(model, **CHURN)["device_kv_budget"]
    candidate = compiled(
        model, inner="eager", device_kv_budget=device, recompute="always", max_length=CAPACITY, **CHURN
    )
    cache = alisa_compile.AlisaCache(model.config, device_kv_budget=device, recompute="always", max_length=CAPACITY)
    generate(candidate, ids, mask, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(NotAvailableError, match="eager mode"):
        model(ids[:, :3], past_key_values=cache)


def test_a_wrong_producer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """If what would be rebuilt is not what was stored, the first row that would be deleted says so."""
    model = model_of("llama")
    bind = TokenStore.bind_producers

    def wrong(self: TokenStore, producers: Any) -> None:
        bind(self, {layer: producers[(layer + 1) % LAYERS] for layer in producers})

    monkeypatch.setattr(TokenStore, "bind_producers", wrong)
    device = budgets_of(model, **CHURN)["device_kv_budget"]
    with pytest.raises(TierError, match="are not what is rebuilt from its input"):
        run(model, device_kv_budget=device, recompute="always", **CHURN)
