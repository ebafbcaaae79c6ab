"""A store that deletes rows and rebuilds them does what one with everything on the device does, whatever happens."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile import CacheError, TierError, kernels
from alisa_compile.kernels.hidden import HiddenRows, Pending
from alisa_compile.kernels.kv_append.reference import rows_of
from alisa_compile.kernels.tiers import drain
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
    "shared room": TierSizes(24, 13, 0, 8, deleted=300, hidden_size=HIDDEN, shared_until=36),
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

    shared: all sequences have the same positions, as in a graph that derives them from the length. failing: how many
    of the next calls raise.
    """

    def __init__(self, heads: Heads = HEADS, *, shared: bool = False, batch: int = BATCH) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (LAYERS, 2, heads.kv, HIDDEN, heads.dim)
        self.weights = torch.randn(shape, generator=generator, dtype=torch.float64) / HIDDEN**0.5
        self.batch_size, self.shares_positions = batch, shared
        self.made: list[tuple[int, torch.Size]] = []
        self.failing = 0

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
        if self.model.failing:
            self.model.failing -= 1
            raise MemoryError("no memory for the product")
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
        ops.kv_wait(store.pool, store.ticket, block.key, layer)
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
        ops.kv_prefetch(*rows, store.rows, store.counts, store.ticket, layer)
        ops.kv_recompute(store.pool, None, store.ticket, layer)


COMMON: dict[str, Any] = {"capacity": 64, "layers": LAYERS, "batch": BATCH, "dtype": torch.float64}


def model_block(model: Model, store: Any, count: int, generator: torch.Generator) -> ModelBlock:
    """The next tokens of a store."""
    batch, start, heads = store.shape.batch_size, store.host_length, store.shape.kv_heads
    shape = (LAYERS, batch, count, HIDDEN)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    positions = torch.arange(start, start + count)[None]
    if not model.shares_positions:  # as with padding of several lengths
        positions = positions + 3 * torch.arange(batch)[:, None]
    states = [model.make(layer, hidden[layer], positions) for layer in range(LAYERS)]
    key, value = (torch.stack([pair[part] for pair in states]) for part in (0, 1))
    shape = (LAYERS, batch, 2 * heads, count, store.shape.head_dim)
    return ModelBlock(torch.randn(shape, generator=generator, dtype=torch.float64), key, value, hidden, positions)


class ModelPair(Pair):
    """The same history in a store that deletes rows and in one that keeps all on the device."""

    def __init__(self, options: dict[str, Any], sizes: TierSizes, model: Model) -> None:
        common = {**COMMON, **options}
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
        return model_block(self.model, self.stores[0], count, self.generator)

    def tokens(self, count: int) -> None:
        for store in self.stores:
            store.reserve(store.host_length + count)
        block = self.block(count)
        got, expected = (driver.forward(block) for driver in self.drivers)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


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


def test_rows_have_the_room_of_later_inputs() -> None:
    """The host's bytes stay the same; when inputs need them its rows are deleted, and after a reset it has them."""
    pair = ModelPair({"sparsity": 0.0}, SIZES["shared room"], Model())
    store = pair.stores[0]
    host = store.bytes_by_tier()["host"]
    for _ in range(2):
        pair.tokens(30)
        assert store.tiers.ring == 13 and int(store.tiers.below[0]) > 0 and not pair.hidden.deleted.any()
        first, end = store.tiers.host.data_ptr(), pair.hidden.rows.data_ptr() + pair.hidden.rows.nbytes
        assert pair.hidden.rows.data_ptr() < first < first + store.tiers.host.nbytes <= end
        for _ in range(8):
            pair.tokens(1)
        assert store.statistics.phases[-3:] == ["II", "III", "III"]  # at token 37
        assert store.tiers.ring == 0 and torch.equal(pair.hidden.deleted, store.tiers.below)
        assert store.bytes_by_tier()["host"] == host == pair.hidden.nbytes
        for each in pair.stores:
            each.reset()


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
    sequences, positions = torch.arange(BATCH).repeat_interleave(40), torch.arange(40).repeat(BATCH)
    wanted = Pending(sequences, positions, torch.zeros_like(positions), torch.arange(BATCH * 40))
    rows, scales = hidden.rebuild(0, wanted, HEADS.kv, torch.device("cpu"))
    assert rows.dtype == torch.int8 and scales is not None
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


# ---------------------------------------------------------------------------------------- beside the native transfers


class ReferenceDriver(RecomputingDriver):
    """Moves rows in plain torch."""

    def move(self, layer: int) -> None:
        store = self.store
        rows = (store.pool, None, store.table, store.length)
        kernels.kv_offload.reference.kv_offload(*rows, store.ticket, layer, store.spec)
        kernels.kv_prefetch.reference.kv_prefetch(*rows, store.rows, store.counts, store.ticket, layer)
        ops.kv_recompute(store.pool, None, store.ticket, layer)


def move_cases() -> Iterator[Any]:
    """Small rows are copied where they are asked for, large ones on the thread."""
    for options, (name, sizes) in itertools.product(POLICIES[1:], SIZES.items()):
        yield pytest.param(options, name, 16, id=f"{options}, {name}")
        if not sizes.shared_until:  # large rows do not fit the room of these layer inputs
            quick = options.get("policy") == "churn" and name in ("host full", "disk after")
            yield pytest.param(
                options, name, 2048, id=f"{options}, {name}, large rows", marks=[] if quick else pytest.mark.slow
            )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("options", "sizes", "dim"), move_cases())
def test_rows_move_as_in_the_reference(options: dict[str, Any], sizes: str, dim: int) -> None:
    """The same decisions, tables, counts of bytes and rows after every step, whatever came before."""
    heads = Heads(dim=dim)
    model = Model(heads)
    drivers = [kind(heads, sizes=SIZES[sizes], **COMMON, **options) for kind in (RecomputingDriver, ReferenceDriver)]
    ours, theirs = (driver.store for driver in drivers)
    for store in (ours, theirs):
        store.bind_producers(model.producers())
    generator, choice = torch.Generator().manual_seed(1), random.Random(dim)
    for step in range(40):
        count = 30 if step == 0 else choice.choice([1] * 9 + [3, 20])
        for store in (ours, theirs):
            store.reserve(store.host_length + count)
        block = model_block(model, ours, count, generator)
        got, expected = (driver.forward(block) for driver in drivers)
        assert torch.equal(got, expected), f"step {step}"
        drain(ours.tiers)
        for name in ("owner", "below", "on_disk", "misses", "host"):
            assert torch.equal(getattr(ours.tiers, name), getattr(theirs.tiers, name)), (step, name)
        for name in ("pool", "table", "length"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (step, name)
        assert ours.tiers.hidden.deleted.tolist() == theirs.tiers.hidden.deleted.tolist()
        assert ours.counters()[:4] == theirs.counters()[:4]
        assert (ours.disk is None) or file_of(ours) == file_of(theirs)
        event = choice.random()
        for store in (ours, theirs):
            if event < 0.06:
                store.crop(max(1, store.host_length - 6))
            elif event < 0.1:
                store.select_sequences([1, 0] if event < 0.08 else [1, 1])
            elif event < 0.13:
                store.abort_step()
    assert ours.tiers.hidden.rows_recomputed == theirs.tiers.hidden.rows_recomputed > 0


def file_of(store: Any) -> bytes:
    return os.pread(store.disk.fileno(), os.fstat(store.disk.fileno()).st_size, 0)


@pytest.mark.usefixtures("built")
def test_rebuilding_runs_while_rows_are_fetched() -> None:
    """The producer is called after the transfers of its layer were started, and before anybody waits for them."""
    heads = Heads(dim=4096)  # rows of 128 KiB: fetched by the thread
    model, started = Model(heads), []
    driver = RecomputingDriver(heads, sizes=SIZES["host full"], **COMMON, policy="churn", sparsity=0.6)
    store, make = driver.store, model.make

    def watched(layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        started.append(int(store.ticket[layer]) > 0)  # type: ignore[index]
        return make(layer, hidden, positions)

    store.bind_producers(model.producers())
    generator = torch.Generator().manual_seed(0)
    for count in (40, *[1] * 10):
        block = model_block(model, store, count, generator)
        model.make = watched  # type: ignore[method-assign]
        store.tiers.hidden.unverified.clear()  # type: ignore[union-attr]
        started.clear()
        driver.forward(block)
        model.make = make  # type: ignore[method-assign]
    assert len(started) == LAYERS and all(started)


@pytest.mark.usefixtures("built")
def test_a_row_is_written_down_before_a_rebuilt_one_takes_its_slot() -> None:
    """A long transfer of another layer holds the thread up, while a producer needs no time at all."""
    heads, sizes = Heads(query=2, kv=2, dim=1 << 15), TierSizes(40, 10, 0, 1, deleted=64, hidden_size=HIDDEN)
    common = {**COMMON, "batch": 1, "dtype": torch.float64}  # rows of 1 MiB
    driver = RecomputingDriver(heads, sizes=sizes, **common, policy="churn", sparsity=0.3)
    store = driver.store
    tiers, hidden = store.tiers, store.tiers.hidden  # type: ignore[union-attr]
    rows = torch.arange(1.0, 43)[:, None, None, None].expand(-1, 2, 2, 1 << 15).double()
    key, value = (rows[:, part].transpose(0, 1)[None, None].expand(LAYERS, -1, -1, -1, -1) for part in (0, 1))
    made = rows[:1, 0].transpose(0, 1)[None]

    class Ready(_Producer):
        def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            both = made.expand(-1, -1, hidden.shape[1], -1)
            return both, both

    model = Model(Heads(dim=1), shared=True, batch=1)
    store.bind_producers({layer: Ready(model, layer) for layer in range(LAYERS)})
    # 39 tokens; then one more that sends 15 rows of layer 1 below, of which the first five are deleted.
    inputs = torch.zeros((LAYERS, 1, 42, HIDDEN), dtype=torch.float64)
    query = torch.zeros((LAYERS, 1, 2, 42, 1 << 15), dtype=torch.float64)

    def block(first: int, end: int) -> ModelBlock:
        parts = (query[..., first:end, :], key[..., first:end, :], value[..., first:end, :])
        return ModelBlock(*parts, inputs[:, :, first:end], torch.arange(first, end)[None])

    driver.forward(block(0, 39))
    hidden.unverified.clear()  # the producer is made up
    moved = (store.pool, None, store.table, store.length)
    for layer in (0, 1):
        driver.append(block(39, 40), layer)
    driver.set_working_set([[list(range(20, 41))]], 0, layer=1)
    ops.kv_offload.recomputing(*moved, store.ticket, 1, store.spec)
    ops.kv_prefetch(*moved, store.rows, store.counts, store.ticket, 1)
    ops.kv_recompute(store.pool, None, store.ticket, 1)
    below, deleted = int(tiers.below[1]), int(hidden.deleted[1])
    assert deleted > 0 and int(store.table[1, 0, 0, 0]) < 0
    driver.append(block(40, 41), 1)
    # Of layer 0 fifteen rows leave; of layer 1 one, whose slot a deleted row then takes.
    ops.kv_offload.recomputing(*moved, store.ticket, 0, store.spec)
    present = (store.table[1, 0, 0, :below] >= 0).nonzero().flatten().tolist()
    driver.set_working_set([[[0, *present, 41]]], 0, layer=1)
    leaving = int(store.table[1, 0, 0, below])
    ops.kv_offload.recomputing(*moved, store.ticket, 1, store.spec)
    ops.kv_prefetch(*moved, store.rows, store.counts, store.ticket, 1)
    assert int(store.table[1, 0, 0, 0]) == leaving and int(store.ticket[0]) > 0  # type: ignore[index]
    ops.kv_recompute(store.pool, None, store.ticket, 1)
    drain(tiers)
    assert torch.all(store.pool[leaving] == 1) and not hidden.pending
    at = (1 * tiers.groups) * tiers.ring + below % tiers.ring
    assert torch.all(tiers.host[at] == below + 1)


@pytest.mark.parametrize("sizes", ["host full", "always"])
def test_rows_that_could_not_be_rebuilt_have_no_slots(sizes: str) -> None:
    """A step that fails while it rebuilds leaves nothing behind that looks like their K and V."""
    pair = ModelPair({"policy": "churn", "sparsity": 0.6}, SIZES[sizes], Model())
    pair.tokens(40)
    pair.tokens(1)
    for _ in range(3):
        for count in (1, 1, 1):
            pair.tokens(count)
        pair.model.failing = 1
        blocks = pair.block(1)
        with pytest.raises(MemoryError):
            pair.drivers[0].forward(blocks)
        assert pair.model.failing == 0
        pair.stores[0].abort_step()
        assert not pair.hidden.pending
        pair.stores[1].begin_step(1)
        pair.stores[1].abort_step()
