"""A store with rows below the device does what one with everything on the device does, whatever happens to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, close, random_block

HEADS = Heads()
POLICIES: list[dict[str, Any]] = [
    {"refresh": 5},
    {"sparsity": 0.0},
    {"policy": "churn", "sparsity": 0.6},
    {"policy": "h2o"},
    {"refresh": 5, "head_mode": "per_kv_head"},
    {"paper": True},
]
TIERS = [TierSizes(24, 300, 0, 8), TierSizes(24, 10, 300, 8), TierSizes(30, 0, 300, 16)]

_STEPS = st.one_of(
    st.tuples(st.just("tokens"), st.sampled_from([1, 1, 1, 2, 7, 16, 17, 40])),
    st.tuples(st.just("crop"), st.integers(1, 30)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("resize"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("reserve"), st.integers(1, 60)),
    st.tuples(st.just("abort"), st.sampled_from([1, 5, 20])),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


class Pair:
    """The same history in a store with tiers and in one without."""

    def __init__(self, options: dict[str, Any], sizes: TierSizes, batch: int = 2) -> None:
        common: dict[str, Any] = {"capacity": 64, "layers": 2, "batch": batch, "dtype": torch.float64, **options}
        self.drivers = Driver(HEADS, sizes=sizes, **common), Driver(HEADS, **common)
        self.generator = torch.Generator().manual_seed(0)
        self.padded = torch.zeros(batch, dtype=torch.int64)

    @property
    def stores(self) -> tuple[Any, Any]:
        return self.drivers[0].store, self.drivers[1].store

    def block(self, count: int) -> Block:
        """So many new tokens."""
        batch = self.stores[0].shape.batch_size
        return random_block(self.generator, HEADS, count, layers=2, batch=batch, dtype=torch.float64)

    def tokens(self, count: int) -> None:
        """One forward pass in both; the outputs are near equal."""
        for store in self.stores:
            store.reserve(store.host_length + count)
        block = self.block(count)
        got, expected = (driver.forward(block) for driver in self.drivers)
        close(got, expected, torch.float64)

    def apply(self, name: str, value: Any) -> None:
        """One thing that may happen to a cache."""
        ours = self.stores[0]
        length, batch = ours.host_length, ours.shape.batch_size
        if name == "tokens":
            self.tokens(value)
        elif name == "crop":
            for store in self.stores:
                store.crop(max(0, length - value))
        elif name == "select":
            index = [value[row % 2] % batch for row in range(batch)]
            for store in self.stores:
                store.select_sequences(list(index))
        elif name == "resize":
            for store in self.stores:
                store.select_sequences([row % batch for row in value])
        elif name == "reserve":
            for store in self.stores:
                store.reserve(ours.capacity + value)
        elif name == "abort":
            self._abort(value)
        elif name == "copy":
            for driver in self.drivers:
                driver.store = driver.store.copy()
        else:
            for store in self.stores:
                store.reset()

    def _abort(self, count: int) -> None:
        """A forward pass that fails after its first layer."""
        for store in self.stores:
            store.reserve(store.host_length + count)
        block = self.block(count)
        for driver in self.drivers:
            driver.store.begin_step(count)
            driver.append(block, 0)
            _, mass = driver.attend(block, 0)
            if driver.store.spec:
                driver.select(block, 0, mass)
            driver.move(0)
            driver.append(block, 1)
            driver.store.abort_step()


@settings(max_examples=60, deadline=None)
@given(
    options=st.sampled_from(POLICIES),
    sizes=st.sampled_from(TIERS),
    prompt=st.sampled_from([1, 3, 20, 50]),
    steps=st.lists(_STEPS, max_size=14),
)
def test_whatever_happens(options: dict[str, Any], sizes: TierSizes, prompt: int, steps: list[tuple[str, Any]]) -> None:
    """Prompts, steps, blocks, crops, reorders, other batch sizes, growth, failures, copies and resets in any order."""
    pair = Pair(options, sizes)
    pair.tokens(prompt)
    for name, value in steps:
        pair.apply(name, value)
        # What failed half-way leaves scores behind, the same in both; lengths decide what comes next.
        assert pair.stores[0].host_length == pair.stores[1].host_length
    for count in (1, 1, 6, 1, 30, 1, 1):
        pair.tokens(count)


@pytest.mark.parametrize("sizes", TIERS)
def test_a_lost_row_would_be_seen(sizes: TierSizes) -> None:
    """The comparison fails if one row below the device changes."""
    pair = Pair({"sparsity": 0.0}, sizes)
    pair.tokens(40)
    tiers, disk = pair.stores[0].tiers, pair.stores[0].disk
    if tiers.ring:
        tiers.host[0] += 1
    else:
        disk.write(0, 0, torch.zeros((1, tiers.row_bytes), dtype=torch.uint8))
    with pytest.raises(AssertionError):
        pair.tokens(1)
