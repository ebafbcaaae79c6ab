"""Native `alisa::swa_attention.tiered` and staging: as with everything on the device, bit by bit, whatever is below."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

import pytest
import torch

from alisa_compile.errors import TierError
from alisa_compile.kernels.swa_attention.tiered import swa_attention_tiered
from alisa_compile.kernels.tiers import DISK_READ, HOST_TO_DEVICE, ROWS_MISSED, TierState, drain
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, ops, random_block, torch_threads

pytestmark = pytest.mark.usefixtures("built")

HEADS = Heads(query=8, kv=2, dim=40)  # 40 is no multiple of a vector
QUOTA, STAGING = 90, 64
SIZES = {
    "host": TierSizes(device=QUOTA, host=800, disk=0, staging=STAGING),
    "both": TierSizes(device=QUOTA, host=150, disk=800, staging=STAGING),
    "disk": TierSizes(device=QUOTA, host=0, disk=800, staging=STAGING),
}
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "int8": {"dtype": torch.bfloat16, "kv_dtype": "int8"},
    "int8 of float32": {"dtype": torch.float32, "kv_dtype": "int8"},
}


def _tiers(driver: Driver) -> TierState:
    assert driver.store.tiers is not None
    return driver.store.tiers


def _pair(
    sizes: TierSizes | None, length: int, kind: str, *, batch: int = 2, padded: bool = False, **options: Any
) -> tuple[Driver, Driver, Block, torch.Tensor | None]:
    """Two stores with the same history, the second with everything on the device; appended: one more token.

    In the first one some old rows have slots among others that have none.
    """
    drivers, common = [], {"capacity": length + 9, "batch": batch, "refresh": 0, **KINDS[kind], **options}
    mask = torch.ones((batch, length), dtype=torch.int64) if padded else None
    if mask is not None:
        mask[0, : length // 3] = 0
        mask[-1, 40:75] = 0  # across tiles
    for own in (sizes, None):
        generator = torch.Generator().manual_seed(3)
        driver = Driver(HEADS, sizes=own, **common)
        dtype = driver.store.shape.dtype
        driver.store.begin_step(length - 1)
        history = random_block(generator, HEADS, length - 1, batch=batch, dtype=dtype)
        driver.append(history, 0, None if mask is None else mask[:, :-1])
        driver.store.end_step(length - 1)
        if driver.store.counts is not None and length > 2 * QUOTA:
            picked = range(1, length - QUOTA, 7)
            driver.set_working_set([[list(picked)[:20]] * driver.store.groups] * batch, 0)
        driver.move(0)
        block = random_block(generator, HEADS, 1, batch=batch, dtype=dtype)
        driver.append(block, 0, mask)
        drivers.append(driver)
    ours, theirs = drivers
    if sizes is not None:
        drain(_tiers(ours))
    return ours, theirs, block, mask


def _away(driver: Driver, length: int) -> torch.Tensor:
    """`[B, G, length]`: which rows have no slot."""
    return driver.store.table[0, :, :, :length] < 0


def _attend(driver: Driver, block: Block, mask: torch.Tensor | None, *, dense: bool) -> list[torch.Tensor]:
    return list(driver.attend(block, 0, mask, dense=dense))


def _reference(driver: Driver, block: Block, mask: torch.Tensor | None, *, dense: bool) -> list[torch.Tensor]:
    """The same in Python."""
    store = driver.store
    rows, counts = (None, None) if dense else (store.rows, store.counts)
    assert store.ticket is not None
    return list(
        swa_attention_tiered(
            block.query[0], store.pool, store.scales, store.table, store.length, None if mask is None else store.valid,
            rows, counts, 0, HEADS.scale, store.ticket,
        )
    )  # fmt: skip


def _moved(tiers: TierState) -> list[int]:
    return [int(tiers.traffic[place]) for place in (HOST_TO_DEVICE, DISK_READ, ROWS_MISSED)]


def _same(got: list[torch.Tensor], expected: list[torch.Tensor], columns: int) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1][..., :columns], expected[1][..., :columns])


def _near(got: list[torch.Tensor], expected: list[torch.Tensor], columns: int, kind: str) -> None:
    """Within what the dtypes hold; int8 rows are scaled in the query's dtype by the reference."""
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[KINDS[kind]["dtype"]]
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=bound, atol=bound)
    both = got[1][..., :columns].double(), expected[1][..., :columns].double()
    torch.testing.assert_close(*both, rtol=bound, atol=bound)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("below", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_positions(kind: str, below: str, head_mode: str, padded: bool) -> None:
    """A refresh and a store without selection: the plain kernel's bits, for any number of threads; counted once."""
    length = 600
    ours, theirs, block, mask = _pair(SIZES[below], length, kind, head_mode=head_mode, padded=padded)
    tiers, away = _tiers(ours), _away(ours, length)
    assert bool(away[..., : length - QUOTA].any()) and not bool(away[..., : length - QUOTA].all())
    for driver in (ours, theirs):
        driver.store.attend_to_all()
    fetched = away if mask is None else away & (mask[:, None] != 0)
    counts = [int(fetched.sum()) * tiers.row_bytes, int(fetched[..., : int(tiers.on_disk[0])].sum()) * tiers.row_bytes]
    assert (counts[1] > 0) == (below != "host")
    for dense, threads in itertools.product((False, True), (1, 2)):
        with torch_threads(threads):
            expected, before = _attend(theirs, block, mask, dense=dense), _moved(tiers)
            got = _attend(ours, block, mask, dense=dense)
        _same(got, expected, length)
        assert got[1].shape == ((2, ours.store.groups, 0) if dense else (2, ours.store.groups, length + 9))
        assert [now - old for now, old in zip(_moved(tiers), before, strict=True)] == [*counts, 0]
        _near(got, _reference(ours, block, mask, dense=dense), 0 if dense else length, kind)


@pytest.mark.parametrize("staging", [1, 5, 31, 32, 64, 95, 96, 640])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_size_of_staging(staging: int, kind: str, threads: int) -> None:
    """Less than a tile, one, one and a part, several: no bit changes."""
    sizes = dataclasses.replace(SIZES["both"], staging=staging)
    ours, theirs, block, _ = _pair(sizes, 600, kind, batch=1)
    with torch_threads(threads):
        got, expected = _attend(ours, block, None, dense=True), _attend(theirs, block, None, dense=True)
    _same(got, expected, 0)


@pytest.mark.parametrize("length", [91, 96, 97, 128, 160, 193, 577])
def test_lengths_around_tiles_and_blocks(length: int) -> None:
    """The last tile is short, or the last block is."""
    ours, theirs, block, _ = _pair(SIZES["both"], length, "bfloat16")
    assert int(_tiers(ours).below[0]) > 0
    _same(_attend(ours, block, None, dense=True), _attend(theirs, block, None, dense=True), 0)


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("below", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_working_set_with_rows_that_have_no_slot(kind: str, below: str, head_mode: str) -> None:
    """Sets of different sizes; what was missed is fetched, counted, and gives the plain kernel's bits."""
    length = 500
    ours, theirs, block, _ = _pair(SIZES[below], length, kind, head_mode=head_mode, sparsity=0.3)
    generator = torch.Generator().manual_seed(8)
    tiers, away = _tiers(ours), _away(ours, length)
    sets: list[list[list[int]]] = []
    missed = on_disk = 0
    for sequence in range(2):
        sets.append([])
        for group in range(ours.store.groups):
            order = torch.randperm(length - 1, generator=generator)[: 60 + 90 * sequence + 30 * group]
            chosen = torch.cat((order.sort().values, torch.tensor([length - 1])))
            lost = chosen[away[sequence, group, chosen]]
            missed, on_disk = missed + len(lost), on_disk + int((lost < int(tiers.on_disk[0])).sum())
            sets[sequence].append(chosen.tolist())
    assert missed > 0 and (on_disk > 0) == (below != "host")
    for driver in (ours, theirs):
        driver.set_working_set(sets, length + 5)
    tiers.misses[0] = missed
    before = _moved(tiers)
    for threads in (1, 2):
        with torch_threads(threads):
            got, expected = _attend(ours, block, None, dense=False), _attend(theirs, block, None, dense=False)
        for sequence, groups in enumerate(sets):
            for group, chosen in enumerate(groups):
                both = [result[1][sequence, group, : len(chosen)] for result in (got, expected)]
                assert torch.equal(*both)
        assert torch.equal(got[0], expected[0])
    middle = _moved(tiers)
    step = [missed * tiers.row_bytes, on_disk * tiers.row_bytes, missed]
    assert [now - old for now, old in zip(middle, before, strict=True)] == [2 * count for count in step]
    reference = _reference(ours, block, None, dense=False)
    assert [now - old for now, old in zip(_moved(tiers), middle, strict=True)] == step
    shortest = min(len(chosen) for groups in sets for chosen in groups)
    _near(got, reference, shortest, kind)


def test_what_has_slots_moves_nothing() -> None:
    """A working set on the device, and a history that fits it: the plain op, as the count says."""
    ours, theirs, block, _ = _pair(SIZES["host"], 300, "float32")
    tiers, here = _tiers(ours), ~_away(ours, 300)[0, 0]
    chosen = here.nonzero().flatten().tolist()[-60:]
    for driver in (ours, theirs):
        driver.set_working_set([[chosen]] * 2, 308)
    assert bool(here[chosen].all()) and int(tiers.misses[0]) == 0
    before = _moved(tiers)
    _same(_attend(ours, block, None, dense=False), _attend(theirs, block, None, dense=False), len(chosen))
    assert _moved(tiers) == before
    ours, theirs, block, _ = _pair(SIZES["host"], QUOTA - 5, "float32")
    _same(_attend(ours, block, None, dense=True), _attend(theirs, block, None, dense=True), 0)
    assert _moved(_tiers(ours)) == [0, 0, 0]


def test_copies_of_the_pool() -> None:
    """A compiler may have put copies in place: rows with a slot come from those."""
    ours, theirs, block, _ = _pair(SIZES["both"], 400, "float32")
    store = ours.store
    pool = store.pool.clone()
    store.pool.fill_(float("nan"))
    got = ops.swa_attention.tiered(
        block.query[0], pool, None, store.table, store.length, None, None, None, 0, HEADS.scale, store.ticket
    )
    _same(list(got), _attend(theirs, block, None, dense=True), 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_that_is_cut_short(threads: int) -> None:
    """Attention says so, and so does everything after it until a reset."""
    ours, _, block, _ = _pair(SIZES["both"], 600, "float32")
    store, tiers = ours.store, _tiers(ours)
    assert store.disk is not None
    os.ftruncate(store.disk.fileno(), 0)
    with torch_threads(threads), pytest.raises(RuntimeError, match=r"could not be read: the file is shorter"):
        _attend(ours, block, None, dense=True)
    with pytest.raises(TierError, match="could not be read"):
        drain(tiers)
    with pytest.raises(TierError, match="could not be read"):
        tiers.stage(store.pool, store.scales, store.table, 0, 0, 10)
    store.reset()
    drain(tiers)


def test_a_row_that_is_on_no_tier() -> None:
    """A broken table is told, not followed."""
    ours, _, block, _ = _pair(SIZES["host"], 300, "float32")
    ours.store.table[0, 1, 0, 299] = -1
    with pytest.raises(RuntimeError, match="a row is on no tier"):
        _attend(ours, block, None, dense=True)


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("below", SIZES)
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_staging_is_what_load_gives(kind: str, below: str, head_mode: str) -> None:
    """Rows, scales and counts of every range, with slots and without, on the host and on disk."""
    sizes = dataclasses.replace(SIZES[below], staging=300)
    ours, _, _, _ = _pair(sizes, 600, kind, head_mode=head_mode)
    store, tiers = ours.store, _tiers(ours)
    for first, end in ((0, 1), (0, 300), (130, 430), (440, 475), (300, 600), (599, 600)):
        shape = (2, store.groups, end - first)
        before = _moved(tiers)
        rows, scales, slots = tiers.stage(store.pool, store.scales, store.table, 0, first, end)
        middle = _moved(tiers)
        positions = torch.arange(first, end).expand(shape)
        expected, expected_scales = tiers.load(store.pool, store.scales, store.table, 0, positions)
        assert torch.equal(rows[slots].flatten(0, 2), expected)
        assert (scales is None) == (expected_scales is None) == (kind == "float32")
        if scales is not None and expected_scales is not None:
            assert torch.equal(scales[slots].flatten(0, 2), expected_scales)
        counted = [
            [now - old for now, old in zip(*two, strict=True)] for two in ((middle, before), (_moved(tiers), middle))
        ]
        assert counted[0] == counted[1]
    with pytest.raises(RuntimeError, match="do not fit staging"):
        tiers.stage(store.pool, store.scales, store.table, 0, 0, 301)


def test_opcheck() -> None:
    """Schema, shapes, AOT: with rows below and without."""
    for length in (300, 40):
        ours, _, block, mask = _pair(SIZES["both"], length, "float32", padded=True)
        store = ours.store
        store.attend_to_all()
        results = torch.library.opcheck(
            ops.swa_attention.tiered,
            (
                block.query[0], store.pool, store.scales, store.table, store.length, store.valid, store.rows,
                store.counts, 0, HEADS.scale, store.ticket,
            ),
        )  # fmt: skip
        assert mask is not None and set(results.values()) == {"SUCCESS"}, results
