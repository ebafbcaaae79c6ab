"""`generate` with less device memory than the KV cache needs: the same tokens, within the budgets."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import alisa_compile
from alisa_compile import InfeasibleError
from alisa_compile.hf.generate import session_of
from alisa_compile.runtime.store import TokenStore
from alisa_compile.runtime.tiers import Pool, Tier
from tests.hf.modes import generate
from tests.support import compiled, left_padded, novel, passage, tiny_model

PROMPT, NEW = 900, 100
#: 25 % of the K and V of 1000 tokens: 8 layers, 1 KiB a row.
DEVICE = 1000 * 8 * 1024 // 4
HOST_FOR_DISK = 300 * 8 * 1024
POLICIES: dict[str, dict[str, Any]] = {"swa": {}, "churn": {"policy": "churn"}}
BELOW: dict[str, dict[str, Any]] = {"host": {}, "disk": {"host_kv_budget": HOST_FOR_DISK, "disk_kv_budget": "64MiB"}}


class CountingAllocator(TorchDispatchMode):
    """Bytes of living memory that a store has asked torch for, by tier: counted where torch hands it out."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = Tier.DEVICE
        self.peak = dict.fromkeys(Tier, 0)
        self.live: dict[int, tuple[Tier, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self.live or storage.nbytes() == 0:
            return
        self.live[key] = (self.tier, storage.nbytes())
        weakref.finalize(storage, self.live.pop, key, None)
        for tier in Tier:
            self.peak[tier] = max(self.peak[tier], self.bytes(tier))

    def bytes(self, tier: Tier) -> int:
        """Living bytes of a tier."""
        return sum(size for kind, size in self.live.values() if kind is tier)


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, budgets: dict[Tier, int]) -> Iterator[CountingAllocator]:
    """Count what stores allocate; what lives is compared with the budgets before and after each step."""
    allocator = CountingAllocator()
    allocate, pool = TokenStore._allocate, Pool.allocate.__func__  # type: ignore[attr-defined]

    def counted_allocate(self: TokenStore, capacity: int) -> None:
        with allocator:
            allocate(self, capacity)

    def counted_pool(cls: Any, tier: Tier, *args: Any) -> Pool:
        allocator.tier = tier
        try:
            made: Pool = pool(cls, tier, *args)
        finally:
            allocator.tier = Tier.DEVICE
        return made

    def checked(method: Any) -> Any:
        def check(self: TokenStore, new_tokens: int) -> None:
            method(self, new_tokens)
            for tier, budget in budgets.items():
                assert allocator.bytes(tier) <= budget, f"{tier} holds {allocator.bytes(tier)} of {budget}"

        return check

    monkeypatch.setattr(TokenStore, "_allocate", counted_allocate)
    monkeypatch.setattr(Pool, "allocate", classmethod(counted_pool))
    monkeypatch.setattr(TokenStore, "begin_step", checked(TokenStore.begin_step))
    monkeypatch.setattr(TokenStore, "end_step", checked(TokenStore.end_step))
    yield allocator
    monkeypatch.undo()


@pytest.fixture(scope="module")
def model() -> Any:
    return novel()[0]


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return passage(novel()[1], PROMPT)


@pytest.fixture(scope="module")
def expected(model: Any, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens of the same policy with everything on the device."""
    return {
        name: generate(compiled(model, inner="eager", **options), prompt, max_new_tokens=NEW, min_new_tokens=NEW)
        for name, options in POLICIES.items()
    }


@pytest.mark.parametrize(
    ("policy", "below"),
    (
        pytest.param("swa", "host", marks=pytest.mark.slow),
        ("churn", "disk"),
        pytest.param("swa", "disk", marks=pytest.mark.slow),
        pytest.param("churn", "host", marks=pytest.mark.slow),
    ),
)
def test_a_quarter_of_the_kv_on_the_device(
    policy: str,
    below: str,
    model: Any,
    prompt: torch.Tensor,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Budgets hold at every step, by what torch hands out; tokens are those of the same policy on the device alone."""
    candidate = compiled(model, inner="inductor", device_kv_budget=DEVICE, **POLICIES[policy], **BELOW[below])
    host = BELOW[below].get("host_kv_budget", 1 << 40)
    budgets = {Tier.DEVICE: DEVICE, Tier.HOST: host}
    with counting(monkeypatch, budgets) as allocator:
        tokens = generate(candidate, prompt, max_new_tokens=NEW, min_new_tokens=NEW)
    assert torch.equal(tokens, expected[policy])
    assert DEVICE // 2 < allocator.peak[Tier.DEVICE] <= DEVICE
    assert 0 < allocator.peak[Tier.HOST] <= host
    report = alisa_compile.report(candidate).to_dict()
    # Our own books say the same as the allocator.
    assert report["peak_bytes"]["device"] == allocator.peak[Tier.DEVICE]
    assert report["peak_bytes"]["host"] == allocator.peak[Tier.HOST]
    assert report["budget_bytes"]["device"] == DEVICE
    assert report["phases"] == [{"phase": "II", "first_step": 0, "last_step": NEW - 1}]
    assert report["bytes_moved"]["host_to_device"] > 0 and report["bytes_moved"]["device_to_host"] > 0
    assert (report["bytes_moved"]["disk_read"] > 0) == (below == "disk")
    assert report["graphs_compiled"] == 2 and not report["skipped"]


def test_nothing_else_holds_rows(model: Any, prompt: torch.Tensor) -> None:
    """After a run all living tensors but weights, tokens and the host tier together are within the device budget."""
    candidate = compiled(model, inner="eager", device_kv_budget=DEVICE)
    before = _living()
    generate(candidate, prompt, max_new_tokens=5)
    host = session_of(candidate).stores[0].tiers.host  # type: ignore[union-attr]
    living = {address: nbytes for address, nbytes in _living().items() if address not in before}
    living.pop(host.untyped_storage().data_ptr())
    assert DEVICE // 2 < sum(living.values()) <= DEVICE


def _living() -> dict[int, int]:
    """Bytes of every storage that a plain tensor of this process has, by address."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({"sparsity": 0.0}, marks=pytest.mark.slow),
        {"kv_dtype": "int8"},
        pytest.param({"policy": "local"}, marks=pytest.mark.slow),
        {"policy": "h2o"},
        pytest.param({"head_mode": "per_kv_head", "refresh": 5}, marks=pytest.mark.slow),
        {"policy": "churn", "kv_dtype": "int8"},
    ),
    ids=str,
)
def test_phase_one_to_two_in_a_padded_batch(options: dict[str, Any]) -> None:
    """Rows leave the device in the middle of a generation; padded batch, Inductor off, further turns on the cache."""
    stock = tiny_model("llama", layers=2, seed=3)
    ids, mask = left_padded(3, 30)
    inner = "aot_eager" if options == {"kv_dtype": "int8"} else "eager"
    alone = compiled(stock, inner=inner, **options)
    want = generate(alone, ids, mask, max_new_tokens=150, min_new_tokens=150)
    full = alisa_compile.report(alone).to_dict()["peak_bytes"]["device"]
    candidate = compiled(stock, inner=inner, device_kv_budget=int(full * 0.7), **options)
    got = generate(candidate, ids, mask, max_new_tokens=150, min_new_tokens=150)
    assert torch.equal(got, want)
    report = alisa_compile.report(candidate).to_dict()
    assert [phase["phase"] for phase in report["phases"]] == ["I", "II"]
    assert report["peak_bytes"]["device"] <= 0.7 * full


@pytest.mark.parametrize("chunk", [pytest.param(64, marks=pytest.mark.slow), 250])
def test_a_prompt_in_chunks_longer_than_the_device(chunk: int, model: Any, prompt: torch.Tensor) -> None:
    """Exact at sparsity 0: chunks attend to a history that streams through the device."""
    want = generate(model, prompt, max_new_tokens=20)
    candidate = compiled(model, inner="eager", sparsity=0.0, device_kv_budget=DEVICE)
    got = generate(candidate, prompt, max_new_tokens=20, prefill_chunk_size=chunk)
    assert torch.equal(got, want)


@pytest.mark.parametrize("options", (pytest.param({"sparsity": 0.0}, marks=pytest.mark.slow), {}), ids=str)
def test_further_turns(options: dict[str, Any], model: Any, prompt: torch.Tensor) -> None:
    """A conversation that outgrows the device, on one cache."""
    tokens = []
    for budget in ("auto", DEVICE):
        cache = alisa_compile.AlisaCache(model.config, device_kv_budget=budget, max_length=PROMPT + 80, **options)
        candidate = compiled(model, inner="eager", **options)
        text = prompt[:, :500]
        for extra in (prompt[:, 500:700], prompt[:, 700:720], prompt[:, 720:]):
            text = generate(candidate, text, max_new_tokens=10, min_new_tokens=10, past_key_values=cache)
            text = torch.cat((text, extra), 1)
        tokens.append(text)
        assert cache.stores[0].is_tiered == (budget == DEVICE)
    assert torch.equal(tokens[0], tokens[1])


def test_too_little_is_said_before_the_first_token(model: Any, prompt: torch.Tensor) -> None:
    """The error names the smallest budget; that works, and a slot less does not."""
    candidate = compiled(model, inner="eager", device_kv_budget="100KiB", max_rows=None)
    with pytest.raises(InfeasibleError) as caught:
        generate(candidate, prompt, max_new_tokens=10)
    smallest = caught.value.smallest_budgets["device"]
    assert 0 < caught.value.longest_context < PROMPT
    want = generate(compiled(model, inner="eager"), prompt, max_new_tokens=10)
    got = generate(compiled(model, inner="eager", device_kv_budget=smallest, max_rows=None), prompt, max_new_tokens=10)
    assert torch.equal(got, want)
    with pytest.raises(InfeasibleError):
        slot = 8 * 1024
        generate(
            compiled(model, inner="eager", device_kv_budget=smallest - slot, max_rows=None), prompt, max_new_tokens=10
        )


def test_everything_fits_without_movement_nodes(model: Any, prompt: torch.Tensor) -> None:
    """A budget that holds everything costs nothing: no tiers, and the graphs are those of an unlimited budget."""
    candidate = compiled(model, inner="eager", device_kv_budget="64MiB")
    generate(candidate, prompt, max_new_tokens=3)
    store = session_of(candidate).stores[0]  # type: ignore[union-attr]
    assert not store.is_tiered
    report = alisa_compile.report(candidate).to_dict()
    assert report["phases"] == [{"phase": "I", "first_step": 0, "last_step": 2}]
    assert report["bytes_moved"] == dict.fromkeys(report["bytes_moved"], 0)


def test_a_budget_below_the_working_sets(model: Any, prompt: torch.Tensor) -> None:
    """`max_rows="auto"`: the working set stays at what fits. The cap is a number of the plan, not of the graph."""
    candidate = compiled(model, inner="aot_eager", device_kv_budget="1.2MiB")
    caps = []
    for length in (700, 900):
        got = generate(candidate, prompt[:, :length], max_new_tokens=30, min_new_tokens=30)
        store = session_of(candidate).stores[0]  # type: ignore[union-attr]
        caps.append(store.selection.max_rows)
        assert 2 <= caps[-1] < 0.2 * length and f"max_rows={caps[-1]}" not in store.spec
        report = alisa_compile.report(candidate).to_dict()
        assert report["graphs_compiled"] == 2 and report["recompiles"] == 0 and report["misses"] == 0
        assert report["effective_sparsity"] > 0.79  # 0.776 without a cap, refreshes included
        alone = compiled(model, inner="eager", max_rows=caps[-1])
        assert torch.equal(got, generate(alone, prompt[:, :length], max_new_tokens=30, min_new_tokens=30))
    assert caps[0] != caps[1]
