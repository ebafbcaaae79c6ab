"""A store that deletes rows and rebuilds them does what one with everything on the device does, whatever happens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile import CacheError, TierError
from alisa_compile.kernels.hidden import HiddenRows
from alisa_compile.kernels.kv_append.reference import rows_of
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, ops
from tests.runtime.test_tiered_store import _STEPS, Pair

HEADS, HIDDEN, LAYERS, BATCH = Heads(), 24, 2, 2
DELETED = 60
SIZES = {
    "host full": TierSizes(24, 10, 0, 8, deleted=300, hidden_size=HIDDEN),
    "disk after": TierSizes(24, 10, 300, 8, deleted=DELETED, hidden_size=HIDDEN),
    "disk only after": TierSizes(24, 0, 300, 16, deleted=20, hidden_size=HIDDEN),
    "always": TierSizes(24, 0, 0, 8, deleted=300, hidden_size=HIDDEN),
}
POLICIES: list[dict[str, Any]] = [
    {"refresh": 5},
    {"sparsity": 0.0},
    {"policy": "churn", "sparsity": 0.6},
    {"policy": "h2o"},
    {"refresh": 5, "head_mode": "per_kv_head"},
]


class Model:
    """Makes K and V of each layer from its input and, K, the position.

    shared: all sequences have the same positions, as in a graph that derives them from the length.
    """

    def __init__(self, *, shared: bool = False, batch: int = BATCH) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (LAYERS, 2, HEADS.kv, HIDDEN, HEADS.dim)
        self.weights = torch.randn(shape, generator=generator, dtype=torch.float64) / HIDDEN**0.5
        self.batch_size, self.shares_positions = batch, shared
        self.made: list[tuple[int, torch.Size]] = []

    def make(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = torch.einsum("bth,sghd->sbgtd", hidden, self.weights[layer])
        return key * (1 + positions[:, None, :, None] / 100).sin(), value

    def producers(self) -> dict[int, Any]:
        return {layer: _Producer(self, layer) for layer in range(LAYERS)}


@dataclasses.dataclass
class _Producer:
    model: Model
    layer: int

    @property
    def batch_size(self) -> int:
        return self.model.batch_size

    @property
    def shares_positions(self) -> bool:
        return self.model.shares_positions

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert hidden.shape[:2] == positions.shape and hidden.shape[0] == self.batch_size
        if self.shares_positions:
            assert bool((positions == positions[:1]).all())
        self.model.made.append((self.layer, hidden.shape))
        return self.model.make(self.layer, hidden, positions)


@dataclasses.dataclass
class ModelBlock(Block):
    """With the layer inputs `[L, B, T, hidden]` and the positions `[B, T]` or `[1, T]`."""

    hidden: torch.Tensor
    positions: torch.Tensor


class RecomputingDriver(Driver):
    """The op sequence of a store that deletes rows."""

    def append(self, block: Block, layer: int, mask: torch.Tensor | None = None) -> None:
        store = self.store
        if not store.hidden_size:
            super().append(block, layer, mask)
            return
        assert isinstance(block, ModelBlock)
        ops.hidden_append(block.hidden[layer], block.positions, store.length, store.ticket, layer)
        _, key, value = block.layer(layer)
        append = ops.kv_append.default if block.tokens == 1 and store.has_history else ops.kv_append.tiered
        extra = () if append is ops.kv_append.default else (store.spec, store.ticket)
        append(store.pool, None, store.table, store.length, store.valid, key, value, None, None, mask, layer, *extra)

    def attend(
        self, block: Block, layer: int, mask: torch.Tensor | None = None, *, dense: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        store = self.store
        if not store.hidden_size or block.tokens > 1 or not store.has_history:
            return super().attend(block, layer, mask, dense=dense)
        result: tuple[torch.Tensor, torch.Tensor] = ops.swa_attention.recomputing(
            block.layer(layer)[0], store.pool, None, store.table, store.length, None, store.rows, store.counts, layer,
            self.heads.scale, store.ticket,
        )  # fmt: skip
        return result

    def move(self, layer: int) -> None:
        store = self.store
        if not store.hidden_size:
            super().move(layer)
            return
        rows = (store.pool, None, store.table, store.length)
        ops.kv_offload.recomputing(*rows, store.ticket, layer, store.spec)
        ops.kv_prefetch.recomputing(*rows, store.rows, store.counts, store.ticket, layer)
        ops.kv_recompute(store.pool, None, store.ticket, layer)


class ModelPair(Pair):
    """The same history in a store that deletes rows and in one that keeps all on the device."""

    def __init__(self, options: dict[str, Any], sizes: TierSizes, model: Model) -> None:
        common: dict[str, Any] = {
            "capacity": 64, "layers": LAYERS, "batch": BATCH, "dtype": torch.float64, **options,
        }  # fmt: skip
        self.drivers = RecomputingDriver(HEADS, sizes=sizes, **common), Driver(HEADS, **common)
        self.generator = torch.Generator().manual_seed(0)
        self.model = model
        self.stores[0].bind_producers(model.producers())

    @property
    def hidden(self) -> HiddenRows:
        found = self.stores[0].tiers.hidden
        assert isinstance(found, HiddenRows)
        return found

    def block(self, count: int) -> ModelBlock:
        store = self.stores[0]
        batch, start = store.shape.batch_size, store.host_length
        shape = (LAYERS, batch, count, HIDDEN)
        hidden = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        positions = torch.arange(start, start + count)[None]
        if not self.model.shares_positions:  # as with padding of several lengths
            positions = positions + 3 * torch.arange(batch)[:, None]
        states = [self.model.make(layer, hidden[layer], positions) for layer in range(LAYERS)]
        key, value = (torch.stack([pair[part] for pair in states]) for part in (0, 1))
        shape = (LAYERS, batch, HEADS.query, count, HEADS.dim)
        return ModelBlock(
            torch.randn(shape, generator=self.generator, dtype=torch.float64), key, value, hidden, positions
        )

    def tokens(self, count: int) -> None:
        for store in self.stores:
            store.reserve(store.host_length + count)
        block = self.block(count)
        got, expected = (driver.forward(block) for driver in self.drivers)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    def _abort(self, count: int) -> None:
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


@settings(max_examples=40, deadline=None)
@given(
    options=st.sampled_from(POLICIES),
    sizes=st.sampled_from(list(SIZES)),
    shared=st.booleans(),
    prompt=st.sampled_from([1, 3, 20, 50]),
    steps=st.lists(_STEPS, max_size=10),
)
def test_whatever_happens(
    options: dict[str, Any], sizes: str, shared: bool, prompt: int, steps: list[tuple[str, Any]]
) -> None:
    """Prompts, steps, blocks, crops, reorders, other batch sizes, growth, failures, copies and resets in any order."""
    pair = ModelPair(options, SIZES[sizes], Model(shared=shared))
    pair.tokens(prompt)
    for name, value in steps:
        pair.apply(name, value)
        assert pair.stores[0].host_length == pair.stores[1].host_length
    for count in (1, 1, 6, 1, 30, 1, 1):
        pair.tokens(count)
    assert pair.hidden.deleted.tolist() == [pair.hidden.deleted[0]] * LAYERS


@pytest.mark.parametrize("sizes", SIZES)
def test_oldest_rows_are_deleted_and_rebuilt(sizes: str) -> None:
    """Rows come back from their inputs alone: nothing below the device holds them."""
    pair = ModelPair({"policy": "churn", "sparsity": 0.6}, SIZES[sizes], Model())
    pair.tokens(40)
    for _ in range(40):
        pair.tokens(1)
    tiers, hidden = pair.stores[0].tiers, pair.hidden
    below, ring = int(tiers.below[0]), tiers.ring
    assert int(hidden.deleted[0]) == min(hidden.most, below - ring) > 0
    assert hidden.rows_recomputed > 40 and pair.stores[0].statistics.phases[-1] == "III"
    # Of one layer in one batch, unless it is a check: never row by row.
    assert max(shape[1] for _, shape in pair.model.made) > 2


def test_a_wrong_input_would_be_seen() -> None:
    """The comparison fails if one saved input changes, or one saved position."""
    for change in ("rows", "positions"):
        pair = ModelPair({"sparsity": 0.0}, SIZES["always"], Model())
        pair.tokens(40)
        getattr(pair.hidden, change)[0] += 1
        with pytest.raises(AssertionError):
            pair.tokens(1)


def test_rows_of_another_model_are_refused() -> None:
    """A producer that does not make what is stored is noticed before a row is deleted."""
    pair = ModelPair({"sparsity": 0.0}, SIZES["host full"], Model())
    pair.model.weights = pair.model.weights.clone()
    pair.tokens(5)
    pair.model.weights[1, 1] *= 1.01  # V of layer 1
    with pytest.raises(TierError, match="layer 1 are not what is rebuilt"):
        for _ in range(60):
            pair.tokens(1)
    assert int(pair.hidden.deleted[1]) == 0


def test_without_producers() -> None:
    """Rows whose part of the model is not known cannot be had again; the error says so."""
    pair = ModelPair({"sparsity": 0.0}, SIZES["always"], Model())
    pair.hidden.producers.clear()
    pair.tokens(40)
    with pytest.raises(TierError, match="cannot be rebuilt"):
        pair.tokens(1)


def test_inputs_that_were_not_saved() -> None:
    """Tokens that came by without their inputs are never deleted."""
    pair = ModelPair({"sparsity": 0.0}, SIZES["host full"], Model())
    store, block = pair.stores[0], pair.block(40)
    _, key, value = block.layer(0)
    rows = rows_of(key, value, store.groups, store.pool.dtype).view(BATCH, store.groups, 40, *store.pool.shape[1:])
    with pytest.raises(CacheError, match="layer inputs were not saved"):
        store.write(0, 0, rows, None)


def test_growth_beyond_what_was_saved() -> None:
    """A larger cache would delete rows whose inputs are gone."""
    pair = ModelPair({"sparsity": 0.0}, SIZES["disk only after"], Model())
    pair.tokens(50)
    store = pair.stores[0]
    store._place = lambda *_: TierSizes(24, 0, 300, 16, deleted=40, hidden_size=HIDDEN)
    with pytest.raises(CacheError, match="cannot grow"):
        store.reserve(200)
    pair.tokens(1)  # as it was


def test_int8_inputs() -> None:
    """Rebuilt int8 rows are within the rounding of the input and of the row."""
    sizes = TierSizes(24, 0, 0, 8, deleted=64, hidden_size=HIDDEN)
    pair = ModelPair({"sparsity": 0.0}, SIZES["always"], Model())
    block = pair.block(40)
    store = Driver(HEADS, capacity=64, layers=LAYERS, batch=BATCH, sizes=sizes, kv_dtype="int8").store
    store.bind_producers({layer: _as_float(p) for layer, p in pair.model.producers().items()})
    hidden = store.tiers.hidden  # type: ignore[union-attr]
    assert hidden is not None and hidden.rows.dtype == torch.int8
    hidden.append(0, 0, block.hidden[0].float(), block.positions, torch.arange(BATCH))
    rows = torch.zeros((BATCH * 40, 2, HEADS.kv, HEADS.dim), dtype=torch.int8)
    scales = torch.zeros((BATCH * 40, 2, HEADS.kv))
    sequences, positions = torch.arange(BATCH).repeat_interleave(40), torch.arange(40).repeat(BATCH)
    places = torch.arange(BATCH * 40)
    hidden.rebuild(0, sequences, positions, torch.zeros_like(places), rows, scales, places)
    got = (rows.double() * scales[..., None].double()).view(BATCH, 40, 2, HEADS.kv, HEADS.dim)
    key, value = block.layer(0)[1:]
    expected = torch.stack((key, value), 1).permute(0, 3, 1, 2, 4)
    half_step = block.hidden[0].abs().amax(-1)[..., None, None, None] / 127 / 2
    largest = pair.model.weights[0].abs().sum(-2)  # [2, heads, dim]
    bound = 1.01 * half_step * largest + 0.51 * scales.view(BATCH, 40, 2, HEADS.kv, 1)
    assert bool(((got - expected).abs() <= bound).all()) and not torch.equal(got, expected)


def _as_float(producer: _Producer) -> Any:
    inner = producer.model.make

    class AsFloat(_Producer):
        def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = inner(self.layer, hidden.double(), positions)
            return key.float(), value.float()

    return AsFloat(producer.model, producer.layer)
