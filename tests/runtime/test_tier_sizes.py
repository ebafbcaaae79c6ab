"""What each tier holds: to the byte what stores allocate, and in each step the bytes that they really move."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile import AlisaConfig, InfeasibleError
from alisa_compile.kernels.tiers import first_recent
from alisa_compile.runtime.budgets import Budgets
from alisa_compile.runtime.footprint import tier_bytes
from alisa_compile.runtime.plan import ModelShape, Plan, make_plan, tier_sizes
from alisa_compile.runtime.profile import MachineProfile, Table
from alisa_compile.runtime.report import COUNTERS
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, random_block

CPU = torch.device("cpu")
HEADS = Heads()
TIERS = ("device", "host", "disk")
RATE = Table(((4096.0, 1e9),))
PROFILE = MachineProfile(
    machine="test", device="cpu", dtype="float32", device_to_host=RATE, host_to_device=RATE, disk_write=RATE,
    disk_read=RATE, attention=Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
    linear=Table(((1.0, 1e-9), (64.0, 1e-9)), grows=True), layer_seconds=1e-6,
)  # fmt: skip
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"sparsity": 0.0},
    {"policy": "local"},
    {"policy": "strided"},
    {"policy": "churn", "kv_dtype": "int8"},
    {"paper": True},
    {"head_mode": "per_kv_head", "max_rows": 20},
    {"max_rows": None, "kv_dtype": "int8", "head_mode": "per_kv_head"},
)


def budgets(device: int, host: int = 1 << 30, disk: int = 0) -> Budgets:
    return Budgets(device, host, disk, dict.fromkeys(TIERS, "as given"))


def store_shape(**changes: Any) -> StoreShape:
    return StoreShape(
        **{"num_layers": 2, "batch_size": 1, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32, **changes},
        device=CPU,
    )


def allocated(model: ModelShape, config: AlisaConfig, capacity: int, sizes: TierSizes | None) -> dict[str, int]:
    """Bytes of real stores by tier, which must be what `tier_bytes` says of each."""
    if sizes is not None and sizes.max_rows is not None:
        config = AlisaConfig(**{**vars(config), "max_rows": sizes.max_rows})
    total = dict.fromkeys(TIERS, 0)
    for shape in model.stores:
        found = TokenStore(shape, config, capacity, lambda *_: sizes).bytes_by_tier()
        assert found == tier_bytes(shape, config, capacity, sizes)
        total = {tier: total[tier] + found.get(tier, 0) for tier in TIERS}
    return total


@settings(max_examples=80, deadline=None)
@given(
    options=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    capacity=st.integers(2, 400),
    share=st.floats(0, 1.1),
    host_share=st.floats(0, 1.1),
    two=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_stores_keep_the_budgets(
    options: dict[str, Any], batch: int, capacity: int, share: float, host_share: float, two: bool, dtype: torch.dtype
) -> None:
    """Real stores, of one K/V shape or two, take no byte more than asked; one byte less than all fit makes tiers."""
    config = AlisaConfig(**options)
    shapes = (store_shape(batch_size=batch, dtype=dtype),)
    if two:
        shapes += (store_shape(batch_size=batch, dtype=dtype, num_layers=3, kv_heads=4, head_dim=8),)
    model = ModelShape(shapes, 64, 0)
    everything = sum(tier_bytes(shape, config, capacity, None)["device"] for shape in shapes)
    assert tier_sizes(model, config, budgets(everything, 0), capacity) is None
    assert allocated(model, config, capacity, None)["device"] == everything
    limits = budgets(min(everything - 1, int(share * everything)), int(host_share * everything), everything)
    try:
        sizes = tier_sizes(model, config, limits, capacity)
    except InfeasibleError:
        return
    assert sizes is not None and 1 <= sizes.device < capacity
    found = allocated(model, config, capacity, sizes)
    assert all(found[tier] <= getattr(limits, tier) for tier in TIERS), (found, limits)
    position = sum(tier_bytes(shape, config, capacity, TierSizes(0, 1, 0, 0))["host"] for shape in shapes)
    owners = 4 * sum(TokenStore(shape, config, 2).table.numel() // 2 for shape in shapes)
    # Not a position more would fit, except where the cap of the working set took the rest.
    assert sizes.max_rows is not None or found["device"] + position + owners > limits.device
    assert sizes.disk == 0 or found["host"] + position > limits.host


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_smallest_budget_runs_and_one_byte_less_is_refused(options: dict[str, Any], tier: str) -> None:
    """To the last position that fits and past it, and without misses."""
    capacity, config = 160, AlisaConfig(**options, recompute="off")
    shape = store_shape(batch_size=2)
    model = ModelShape((shape,), 64, 0)
    given_bytes = tier_bytes(shape, config, capacity, TierSizes(80, 20, 0, 128))
    if tier == "device":
        given_bytes |= {"device": 10, "host": 1 << 30}
    with pytest.raises(InfeasibleError, match="160 tokens do not fit the KV budgets") as caught:
        tier_sizes(model, config, budgets(**given_bytes), capacity)
    smallest = caught.value.smallest_budgets[tier]
    with pytest.raises(InfeasibleError):
        tier_sizes(model, config, budgets(**{**given_bytes, tier: smallest - 1}), capacity)
    sizes = tier_sizes(model, config, budgets(**{**given_bytes, tier: smallest}), capacity)
    assert sizes is not None
    assert allocated(model, config, capacity, sizes)[tier] <= smallest
    if sizes.max_rows is not None:
        options = {**options, "max_rows": sizes.max_rows}
    driver = Driver(HEADS, capacity=capacity, layers=2, batch=2, sizes=sizes, **options)
    generator = torch.Generator().manual_seed(1)
    tiers = driver.store.tiers
    assert tiers is not None
    for tokens in (100, *[1] * 40, 5, *[1] * (capacity - 146)):
        driver.forward(random_block(generator, HEADS, tokens, layers=2, batch=2, dtype=torch.float32))
    assert driver.store.host_length == capacity - 1 and tiers.rows_missed == 0
    # The last token that fits leaves no slot for another; below is then what the sizes have room for.
    driver.store.reserve = lambda tokens: None  # type: ignore[method-assign]
    driver.forward(random_block(generator, HEADS, 1, layers=2, batch=2, dtype=torch.float32))
    assert tiers.below.tolist() == [sizes.host + sizes.disk] * 2
    assert tiers.on_disk.tolist() == [sizes.disk] * 2 or sizes.host == 0


def test_a_longer_context_is_offered() -> None:
    """What the error names works, and one token more does not."""
    model, config = ModelShape((store_shape(),), 64, 0), AlisaConfig(max_rows=None, recompute="auto")
    with pytest.raises(InfeasibleError, match=r"a context of at most \d+ tokens") as caught:
        tier_sizes(model, config, budgets(60_000, 30_000), 4000)
    longest = caught.value.longest_context
    tier_sizes(model, config, budgets(60_000, 30_000), longest)
    with pytest.raises(InfeasibleError):
        tier_sizes(model, config, budgets(60_000, 30_000), longest + 1)


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"recompute": "always"}], ids=str)
def test_rows_are_deleted_where_nothing_else_makes_room(options: dict[str, Any]) -> None:
    """As few as possible, and none with `off`; stores of these sizes keep the budgets, and are as large as said."""
    shape, capacity = store_shape(kv_heads=8, num_layers=4), 400
    model, config = ModelShape((shape,), 32, 0), AlisaConfig(**options)
    off = dataclasses.replace(config, recompute="off")
    device = int(0.6 * tier_bytes(shape, config, capacity, None)["device"])
    in_full = tier_sizes(model, off, budgets(device), capacity)
    assert in_full is not None
    needed = tier_bytes(shape, config, capacity, in_full)["host"]
    assert tier_sizes(model, off, budgets(device, needed), capacity) == in_full
    for share in (0.5, 0.6, 0.9):
        host = int(share * needed)
        with pytest.raises(InfeasibleError):
            tier_sizes(model, off, budgets(device, host), capacity)
        sizes = tier_sizes(model, config, budgets(device, host), capacity)
        assert sizes is not None and sizes.deleted and sizes.hidden_size == 32 and sizes.disk == 0
        store = TokenStore(shape, config, capacity, lambda *_, s=sizes: s)  # type: ignore[misc]
        found = store.bytes_by_tier()
        assert found == tier_bytes(shape, config, capacity, sizes)
        assert found["device"] <= device and found["host"] <= host
        below = first_recent(capacity, sizes.device, store.spec, sizes.max_rows or 0)
        if config.recompute == "always":
            assert (sizes.deleted, sizes.host) == (below, 0)
            continue
        assert sizes.host + sizes.deleted >= below
        fewer = dataclasses.replace(sizes, deleted=sizes.deleted - 1, host=below - sizes.deleted + 1, shared_until=0)
        assert tier_bytes(shape, config, capacity, fewer)["host"] > host


# what moves


def moved(
    prompt: int, steps: int, device: int, host: int, disk: int, **options: Any
) -> tuple[Plan, list[dict[str, int]]]:
    """The plan where the tiers hold so many positions, and what a store of the same sizes moves in each step."""
    shape, config = store_shape(num_layers=3, batch_size=2), AlisaConfig(**options, recompute="off")
    model = ModelShape((shape,), 64, 100_000)
    limits = budgets(**tier_bytes(shape, config, prompt + steps, TierSizes(device, host, disk, 128)))
    plan = make_plan(model, config, limits, PROFILE, prompt_length=prompt, max_new_tokens=steps)
    sizes = tier_sizes(model, config, limits, prompt + steps)
    assert sizes is not None and plan.max_rows is None and sizes.device == device
    driver = Driver(HEADS, capacity=prompt + steps, layers=3, batch=2, sizes=sizes, **options)
    assert driver.store.bytes_by_tier() == plan.peak_bytes
    generator = torch.Generator().manual_seed(3)
    before, found = (0,) * len(COUNTERS), []
    for tokens in (prompt, *[1] * (steps - 1)):
        driver.forward(random_block(generator, HEADS, tokens, layers=3, batch=2, dtype=torch.float32))
        now = driver.store.counters()
        found.append({name: a - b for name, a, b in zip(COUNTERS, now, before, strict=True)})
        before = now
    below = [phase != "I" for phase in driver.store.statistics.phases]
    assert below == [plan.p1 is not None and step >= plan.p1 for step in range(steps)]
    return plan, found


LONG, SHORT = 200, 90  # more and fewer positions than the device holds
CASES: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0},
    "local": {"policy": "local"},
    "strided": {"policy": "strided"},
    "churn": {"policy": "churn"},
    "int8": {"policy": "churn", "kv_dtype": "int8"},
    "swa": {"refresh": 8},
    "h2o": {"policy": "h2o"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [LONG, SHORT])
@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_the_plan_moves_what_the_store_moves(case: str, prompt: int, on_disk: bool) -> None:
    """Down and to disk: exact, step by step. Up: exact where no choice depends on the data."""
    options = CASES[case]
    plan, found = moved(prompt, 100, 100, 30 if on_disk else 1000, 1000 if on_disk else 0, **options)
    assert plan.p1 == (0 if prompt == LONG else 100 - SHORT)
    for name in ("device_to_host", "disk_write"):
        assert list(plan.bytes_moved[name]) == [step[name] for step in found], name
    assert (sum(plan.bytes_moved["disk_write"]) > 0) == on_disk
    up, real = plan.bytes_moved["host_to_device"], [step["host_to_device"] for step in found]
    read, really_read = plan.bytes_moved["disk_read"], [step["disk_read"] for step in found]
    if case in ("dense", "local"):
        assert list(up) == real and list(read) == really_read
        assert (sum(up) > 0) == (case == "dense")
    elif case in ("churn", "int8"):
        later = slice(plan.p1 + 1, None)
        assert sum(up[later]) == pytest.approx(sum(real[later]), rel=0.05) and sum(real[later]) > 0
        # Rows that have just gone below are still resident, so those that come are older than the others.
        assert 0.75 * sum(really_read[later]) <= sum(read[later]) <= 1.05 * sum(really_read[later])
    elif case == "strided":
        assert not any(real[1:]) and not any(up[1:])
    elif case == "swa":  # mostly the refreshes
        assert sum(up[1:]) == pytest.approx(sum(real[1:]), rel=0.05)
    # What a long prompt seeds: of random attention, old positions have received the most.
    near = 0.6 if case in ("swa", "h2o") else 0.9
    assert near * real[0] <= up[0] <= 1.1 * real[0]
    assert (real[0] > 0) == (prompt == LONG and case not in ("dense", "local"))
    assert all(step["rows_missed"] == 0 for step in found)
