"""The native transfers against the plain-torch ones, and what a thread adds: order, waiting, failures, the end."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import kernels
from alisa_compile.errors import TierError
from alisa_compile.kernels.tiers import DISK_STALL_NS, DISK_WRITE, HOST_TO_DEVICE, STALL_NS, TierState, drain, recover
from alisa_compile.runtime.store import TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, random_block

pytestmark = pytest.mark.usefixtures("built")

ops = torch.ops.alisa
_ROOT = Path(__file__).resolve().parents[2]
_SMALL, _LARGE = Heads(dim=16), Heads(dim=2048)  # copied where they are asked for, and on the thread

POLICIES: dict[str, dict[str, Any]] = {
    "swa": {"refresh": 8},
    "dense": {"sparsity": 0.0},
    "churn": {"policy": "churn"},
    "h2o": {"policy": "h2o"},
    "strided": {"policy": "strided"},
    "per head": {"refresh": 8, "head_mode": "per_kv_head"},
    "int8": {"refresh": 8, "kv_dtype": "int8"},
}
SIZES = {
    "host": TierSizes(device=40, host=170, disk=0, staging=16),
    "disk": TierSizes(device=40, host=24, disk=150, staging=16),
    "no host": TierSizes(device=40, host=0, disk=150, staging=16),
    "tight": TierSizes(device=9, host=10, disk=150, staging=16),
}


class Native(Driver):
    """Notes the jobs; `hook(driver, layer)` may change the working set before rows move."""

    hook: Any = None
    jobs = 0

    def move(self, layer: int) -> None:
        if self.hook is not None and self.store.counts is not None:
            self.hook(self, layer)
        super().move(layer)
        assert self.store.ticket is not None
        self.jobs = max(self.jobs, int(self.store.ticket[:-1].max()))


class Reference(Native):
    """Moves rows in plain torch."""

    def move(self, layer: int) -> None:
        if self.hook is not None and self.store.counts is not None:
            self.hook(self, layer)
        store = self.store
        rows = (store.pool, store.scales, store.table, store.length)
        kernels.kv_offload.reference.kv_offload(*rows, store.ticket, layer, store.spec)
        kernels.kv_prefetch.reference.kv_prefetch(*rows, store.rows, store.counts, store.ticket, layer)


def _tiers(driver: Driver) -> TierState:
    assert driver.store.tiers is not None
    return driver.store.tiers


def _file(store: TokenStore) -> bytes:
    if store.disk is None:
        return b""
    size = os.fstat(store.disk.fileno()).st_size
    return os.pread(store.disk.fileno(), size, 0)


def _same(ours: Driver, theirs: Driver) -> None:
    """Every table and every byte of every tier."""
    mine, other = _tiers(ours), _tiers(theirs)
    drain(mine)
    for name in ("owner", "below", "on_disk", "home", "misses", "host", "host_scales"):
        assert _equal(getattr(mine, name), getattr(other, name)), name
    assert mine.traffic[:STALL_NS].tolist() == other.traffic[:STALL_NS].tolist()
    for name in ("pool", "scales", "table", "length", "valid", "rows", "counts"):
        assert _equal(getattr(ours.store, name), getattr(theirs.store, name)), name
    assert _file(ours.store) == _file(theirs.store)


def _equal(mine: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return torch.equal(mine, other)


class _RandomSet:
    """Another working set than the policy's in some layers: any positions in any order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def __call__(self, driver: Driver, layer: int) -> None:
        store = driver.store
        assert store.rows is not None and store.counts is not None
        if self.random.random() < 0.7:
            return
        tokens, width = int(store.length[layer]), store.rows.shape[3]
        for sequence in range(store.shape.batch_size):
            for group in range(store.groups):
                count = self.random.randrange(1, min(width, tokens + 1) + 1)
                chosen = [tokens, *self.random.sample(range(tokens), count - 1)]  # a step always sees its own token
                if self.random.random() < 0.5:
                    chosen.sort()
                store.rows[layer, sequence, group, :count] = torch.tensor(chosen, dtype=torch.int32)
                store.counts[layer, sequence, group] = count


def _run(policy: str, tiers: str, heads: Heads, *, padded: bool, seed: int, steps: int) -> Native:
    """The same random history in two stores; every step gives the same outputs and leaves the same state."""
    options: dict[str, Any] = {"capacity": 150, "layers": 2, "batch": 2, "sizes": SIZES[tiers], **POLICIES[policy]}
    ours, theirs = Native(heads, **options), Reference(heads, **options)
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    limit = 165  # the stores grow on the way
    mask = torch.ones((2, limit), dtype=torch.int64)
    if padded:
        mask[1, :7] = 0
        mask[0, 20:25] = 0
    for step in range(steps):
        for driver in (ours, theirs):
            driver.hook = _RandomSet(step * 1000 + seed) if step % 3 == 2 else None
        stored = ours.store.host_length
        tokens = 30 if stored == 0 else choice.choice([1] * 12 + [3, 20])
        tokens = min(tokens, ours.store.capacity - stored, limit - stored)
        if tokens == 0:
            break
        block = random_block(generator, heads, tokens, layers=2, batch=2, dtype=torch.float32)
        known = mask[:, : stored + tokens] if padded else None
        got, expected = ours.forward(block, known), theirs.forward(block, known)
        assert torch.equal(got, expected), f"step {step}"
        _same(ours, theirs)
        event = choice.random()
        for driver in (ours, theirs):
            if event < 0.04:
                driver.store.crop(max(1, driver.store.host_length - 6))
            elif event < 0.08:
                driver.store.select_sequences([1, 0] if event < 0.06 or padded else [1, 1])
            elif event < 0.10:
                driver.store.abort_step()
    return ours


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tiers", SIZES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_small_rows_move_as_in_the_reference(policy: str, tiers: str, padded: bool) -> None:
    """Decisions, tables, counts of bytes and every row, after every step."""
    driver = _run(policy, tiers, _SMALL, padded=padded, seed=3, steps=70)
    assert driver.jobs > 0 or tiers == "host", "the disk is a matter of the thread"


@pytest.mark.parametrize("policy", ["swa", "churn", "per head", "int8"])
@pytest.mark.parametrize("tiers", ["host", "disk"])
def test_large_rows_move_as_in_the_reference(policy: str, tiers: str) -> None:
    """On the thread, while the next layer attends; attention waits for its own rows alone."""
    driver = _run(policy, tiers, _LARGE, padded=False, seed=4, steps=60)
    assert driver.jobs > 0
    assert driver.store.counters()[HOST_TO_DEVICE] > 0


def test_stores_in_two_threads() -> None:
    """Each has its own transfers."""
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            _run("churn", "disk", _SMALL, padded=False, seed=seed, steps=40)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in (5, 6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors[0]


def test_no_job_where_nothing_moves() -> None:
    """Everything fits: the ticket stays 0."""
    driver = Native(_LARGE, capacity=40, sizes=SIZES["host"])
    generator = torch.Generator().manual_seed(0)
    for tokens in (10, 1, 1, 1):
        driver.forward(random_block(generator, _LARGE, tokens, dtype=torch.float32))
    assert driver.jobs == 0 and _tiers(driver).traffic.sum() == 0


# --------------------------------------------------------------------------------------------------- one large transfer

_MEGABYTE = Heads(query=2, kv=2, dim=1 << 16)  # float32 rows of 1 MiB
_QUOTA = 40


def _place(driver: Driver, position: int, slot: int) -> None:
    """Write a row into a slot, as `kv_append` would."""
    store, owner = driver.store, _tiers(driver).owner
    if int(owner[slot]) >= 0:
        store.table[0, 0, 0, int(owner[slot])] = -1
    owner[slot], store.table[0, 0, 0, position] = position, slot
    store.pool[slot] = position + 1.0


def _large(*, disk: bool = False, both: bool = False) -> Native:
    """A store whose next step has to write 21 rows of 1 MiB below the device; position p is filled with p + 1."""
    sizes = TierSizes(device=_QUOTA, host=0 if disk else 64, disk=64 if disk or both else 0, staging=1)
    driver = Native(_MEGABYTE, capacity=64, sizes=sizes, sparsity=0.02)
    store = driver.store
    for position in range(_QUOTA - 1):
        store.write(0, position, torch.full((1, 1, 1, 2, 2, 1 << 16), position + 1.0), None)
    free = int((_tiers(driver).owner < 0).nonzero())
    _place(driver, _QUOTA - 1, free)
    store.length.fill_(_QUOTA)
    store.host_length, store.has_history = _QUOTA, True
    assert int(_tiers(driver).below[0]) == 0
    return driver


def _offload(driver: Driver) -> None:
    store = driver.store
    ops.kv_offload(store.pool, store.scales, store.table, store.length, store.ticket, 0, store.spec)


def _prefetch(driver: Driver) -> None:
    store = driver.store
    rows = (store.pool, store.scales, store.table, store.length, store.rows, store.counts)
    ops.kv_prefetch(*rows, store.ticket, 0)


def _wait(driver: Driver) -> None:
    ops.kv_wait(driver.store.pool, driver.store.ticket, driver.store.pool, 0)


@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk"])
def test_a_slot_may_be_reused_before_its_row_is_written_down(disk: bool) -> None:
    """Rows leave and others enter their slots in one step: each is where it should be once the layer has waited."""
    driver = _large(disk=disk)
    store, tiers = driver.store, _tiers(driver)
    assert store.ticket is not None and store.counts is not None
    driver.set_working_set([[list(range(30, 41))]], 0)
    _offload(driver)
    _prefetch(driver)  # position 40 takes the slot of position 0
    _wait(driver)
    assert int(store.table[0, 0, 0, 0]) < 0 and int(tiers.below[0]) == 21
    # Three more tokens, in slots of rows that are below; so 21 to 23 are to go down in the next step.
    store.length.fill_(43)
    for position in (40, 41, 42):
        kept = int(store.table[0, 0, 0, position])
        _place(driver, position, kept if kept >= 0 else int(store.table[0, 0, 0, position - 38]))
    leaving = {int(store.table[0, 0, 0, position]): position for position in range(21, 24)}
    assert min(leaving) >= 0
    # All that is below stays, but for the leaving ones: nothing else is there to reuse.
    below = store.table[0, 0, 0, :21]
    absent, present = (below < 0).nonzero().flatten().tolist(), (below >= 0).nonzero().flatten().tolist()
    entering = absent[:2]
    driver.set_working_set([[entering + present]], 0)
    _offload(driver)
    _prefetch(driver)
    assert int(store.ticket[0]) > 0, "this must be a job"
    assert len(entering) == 2 and all(int(store.table[0, 0, 0, position]) in leaving for position in entering)
    _wait(driver)
    for position in entering:
        assert torch.all(store.pool[int(store.table[0, 0, 0, position])] == position + 1)
    assert int(store.ticket[0]) == 0
    rows, _ = store.read(0, 0, 43)
    expected = torch.arange(1.0, 44).view(1, 1, 43, 1, 1, 1)
    assert torch.equal(rows, expected.expand_as(rows))


def test_waiting_is_counted() -> None:
    """In nanoseconds, and apart if the disk is what was waited for."""
    for disk in (False, True):
        driver = _large(disk=disk)
        traffic = _tiers(driver).traffic
        started = time.perf_counter_ns()
        _offload(driver)
        assert int(traffic[STALL_NS]) == 0
        _wait(driver)
        blocked, on_disk = int(traffic[STALL_NS]), int(traffic[DISK_STALL_NS])
        assert 100_000 < blocked < time.perf_counter_ns() - started  # 21 MiB take milliseconds
        assert on_disk == (blocked if disk else 0)
        _wait(driver)  # the ticket has been given back
        assert int(traffic[STALL_NS]) == blocked


def _thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")
def test_a_store_goes_with_a_transfer_in_flight() -> None:
    """Its thread ends, its memory is given back, and nothing else is disturbed."""
    gc.collect()
    before = _thread_count()
    driver = _large(disk=True)
    state, pool = weakref.ref(_tiers(driver)), weakref.ref(driver.store.pool)
    _offload(driver)
    assert _thread_count() == before + 1
    assert driver.store.ticket is not None and int(driver.store.ticket[0]) == 1
    del driver
    gc.collect()
    assert state() is None and pool() is None
    assert _thread_count() == before


def test_after_close_the_references_serve_no_op() -> None:
    """A ticket of a store that is gone is refused; Python's side still works."""
    driver = _large()
    _offload(driver)
    tiers = _tiers(driver)
    tiers.close()
    tiers.close()
    assert not tiers.is_open
    drain(tiers)
    recover(tiers)
    with pytest.raises(RuntimeError, match="names no open store"):
        _wait(driver)


_EXIT = """
import torch
from tests.kernels.test_tiers_native import _large, _offload
driver = _large(disk=True)
_offload(driver)
print("job", int(driver.store.ticket[0]))
"""


def test_a_process_ends_with_a_transfer_in_flight() -> None:
    """Without a crash, and without waiting for what nobody reads."""
    result = subprocess.run([sys.executable, "-c", _EXIT], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "job 1\n", "")


_OFF = """
import torch
from tests.kernels.test_tiers_native import SIZES, _SMALL, _tiers
from tests.kernels.harness import Driver, random_block
from alisa_compile.kernels.tiers import drain, recover
driver = Driver(_SMALL, capacity=100, sizes=SIZES["disk"], refresh=8)
generator = torch.Generator().manual_seed(0)
for tokens in (60, *[1] * 9):
    driver.forward(random_block(generator, _SMALL, tokens, dtype=torch.float32))
drain(_tiers(driver)), recover(_tiers(driver))
driver.store.reset()
print(_tiers(driver).is_open, int(_tiers(driver).traffic[2]) > 0)
"""


def test_without_native_kernels_no_thread_moves_rows() -> None:
    """The references need nothing of it."""
    result = subprocess.run(
        [sys.executable, "-c", _OFF], cwd=_ROOT, env={**os.environ, "ALISA_NATIVE": "0"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "False True\n"), result.stderr


# ------------------------------------------------------------------------------------------------------------- copies


def test_copies_of_the_store_are_served_at_once() -> None:
    """An eager AOT graph works on copies, and no later op can wait for those."""
    for disk in (False, True):
        ours, theirs = _large(disk=disk), _large(disk=disk)
        pools, tables = [], []
        for driver, offload, prefetch in (
            (ours, ops.kv_offload, ops.kv_prefetch),
            (theirs, kernels.kv_offload.reference.kv_offload, kernels.kv_prefetch.reference.kv_prefetch),
        ):
            store = driver.store
            assert store.ticket is not None
            driver.set_working_set([[list(range(30, 41))]], 0)
            _offload(driver)  # on the store itself: in flight when the copies come
            _prefetch(driver)
            drain(_tiers(driver))
            store.ticket[0] = 0
            store.length.fill_(41)
            driver.set_working_set([[[0, *range(31, 42)]]], 0)
            before = store.pool.clone()
            pool, table = store.pool.clone(), store.table.clone()
            pool[table[0, 0, 0, 40].long()] = 41.0
            offload(pool, None, table, store.length, store.ticket, 0, store.spec)
            prefetch(pool, None, table, store.length, store.rows, store.counts, store.ticket, 0)
            assert int(store.ticket[0]) == 0
            assert torch.equal(store.pool, before), "the store itself is not to be touched"
            pools.append(pool)
            tables.append(table)
        assert torch.equal(pools[0], pools[1]) and torch.equal(tables[0], tables[1])
        assert torch.all(pools[0][int(tables[0][0, 0, 0, 0])] == 1)
        assert torch.equal(_tiers(ours).owner, _tiers(theirs).owner)
        assert torch.equal(_tiers(ours).host, _tiers(theirs).host)


# ----------------------------------------------------------------------------------------------------------- failures


def _with_rows_on_disk() -> Native:
    driver = Native(_SMALL, capacity=120, sizes=SIZES["disk"], refresh=0)
    generator = torch.Generator().manual_seed(1)
    for tokens in (90, 1, 1, 1):
        driver.forward(random_block(generator, _SMALL, tokens, dtype=torch.float32))
    assert int(_tiers(driver).on_disk[0]) > 10
    return driver


def test_a_file_that_is_cut_short() -> None:
    """The layer that waits says so, then everything does until a reset; afterwards the store works."""
    driver = _with_rows_on_disk()
    store, tiers = driver.store, _tiers(driver)
    assert store.disk is not None and store.counts is not None
    drain(tiers)  # a write behind the cut would make the file long again
    os.ftruncate(store.disk.fileno(), 0)
    absent = [position for position in range(10) if int(store.table[0, 0, 0, position]) < 0]
    assert absent
    driver.set_working_set([[absent]], 0)
    _prefetch(driver)
    with pytest.raises(RuntimeError, match=r"^alisa: rows on disk could not be read: the file is shorter"):
        _wait(driver)
    with pytest.raises(RuntimeError, match="shorter"):
        _offload(driver)
    with pytest.raises(TierError, match=r"^rows on disk could not be read.*reset the cache"):
        drain(tiers)
    with pytest.raises(TierError):
        store.crop(store.host_length - 1)
    store.abort_step()
    assert isinstance(store.broken, TierError)
    with pytest.raises(TierError):
        store.begin_step(1)

    store.reset()
    fresh = Native(_SMALL, capacity=120, sizes=SIZES["disk"], refresh=0)
    generators = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for tokens in (90, *[1] * 12):
        outputs = [
            one.forward(random_block(generator, _SMALL, tokens, dtype=torch.float32))
            for one, generator in zip((driver, fresh), generators, strict=True)
        ]
        assert torch.equal(*outputs)
    drain(tiers)


def _with_file(driver: Driver, stack: contextlib.ExitStack, path: Path, flags: int) -> None:
    """Let the native side have another file, opened with `flags`."""
    path.touch()
    file = os.open(path, flags)
    stack.callback(os.close, file)
    tiers = _tiers(driver)
    assert tiers.disk is not None
    tiers.close()
    stack.enter_context(pytest.MonkeyPatch.context()).setattr(tiers.disk, "fileno", lambda: file)
    tiers.open(driver.store.pool, driver.store.scales)


def test_a_file_that_refuses_to_be_written(tmp_path: Path) -> None:
    """The reason is told, and no byte is counted."""
    with contextlib.ExitStack() as stack:
        driver = _large(disk=True)
        _with_file(driver, stack, tmp_path / "rows", os.O_RDONLY)
        _offload(driver)
        with pytest.raises(RuntimeError, match="could not be written: Bad file descriptor"):
            _wait(driver)
        assert int(_tiers(driver).traffic[DISK_WRITE]) == 0
        recover(_tiers(driver))
        drain(_tiers(driver))


def test_transfers_behind_one_that_failed_are_dropped(tmp_path: Path) -> None:
    """What they would move is not what the tables say."""
    with contextlib.ExitStack() as stack:
        driver = _large(both=True)
        store, tiers = driver.store, _tiers(driver)
        assert store.counts is not None
        _with_file(driver, stack, tmp_path / "rows", os.O_WRONLY)
        slots = store.table[0, 0, 0, :3].clone().long()
        _offload(driver)  # takes milliseconds, in which the others queue up
        tiers.on_disk[0] = 1
        store.table[0, 0, 0, :3], tiers.owner[slots] = -1, -1
        for position in (0, 1):
            driver.set_working_set([[[position]]], 0)
            with contextlib.suppress(RuntimeError):  # if the first one has failed already
                _prefetch(driver)
        with pytest.raises(RuntimeError, match="could not be read: Bad file descriptor"):
            _wait(driver)
        assert torch.all(store.pool[slots[2]] == 3), "position 1 was to come from the host, to where 2 had been"
