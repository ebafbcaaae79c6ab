"""Rows below the device, as ops see them: where each row is, and the primitives that copy it.

A store whose rows do not all fit the device has a `TierState`. Its device pool is divided into quotas of `quota` slots,
one for each (layer, sequence, group). A position is *below* once its row has been written under the device; rows never
change, so this happens once, and its device slot may then be given away. The host holds the last H positions below as
a ring, position p in ring slot p mod H; older ones are on disk at an address that is their position. Where the plan
deletes rows, the oldest are on no tier: they are rebuilt from their layer inputs (`hidden.py`).

Ops find the state through the last entry of `ticket [L + 1]` int64, a tensor of the store and an input of its graphs.
The entries before it are the transfers that each layer has started; 0 = none. The device tensors that ops change are
arguments, because a compiler may have put copies in their place; everything else is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from alisa_compile.errors import CacheError, TierError  # absolute: mypy also sees this folder as `kernels`

from .cuda_transfers import TransferEngine
from .hidden import HiddenRows, Pending
from .library import LIBRARY
from .native import interval_calls, register_native, tiers_calls
from .selection import capped, decode_spec

_COPIED_POSITIONS = 1024  # on disk at a time, from one sequence to another

#: Places in `TierState.traffic`.
DEVICE_TO_HOST, HOST_TO_DEVICE, DISK_WRITE, DISK_READ, STALL_NS, DISK_STALL_NS, ROWS_MISSED = range(7)
TRAFFIC_PLACES = 7

#: What an interval is of, as numbered in tiers.h: rows going down and up, those that the host's ring loses to the disk,
#: those that go down to the disk and up from it without the host, an op that waits for a job that copies in memory or
#: one that uses the disk; and, in Python alone, rows rebuilt from layer inputs. Beside each the places in `traffic`
#: where its bytes count; those of layer inputs count in `HiddenRows`, and in the same places of the store's counters.
INTERVAL_KINDS: dict[str, tuple[int, ...]] = {
    "down": (DEVICE_TO_HOST,),
    "up": (HOST_TO_DEVICE,),
    "lost": (DISK_WRITE,),
    "through": (DEVICE_TO_HOST, DISK_WRITE),
    "fetch": (HOST_TO_DEVICE, DISK_READ),
    "wait": (STALL_NS,),
    "disk_wait": (STALL_NS, DISK_STALL_NS),
    "recompute": (HOST_TO_DEVICE,),
}


@dataclasses.dataclass(frozen=True)
class Interval:
    """Time that copies of one kind have taken, or that an op has waited. begin, end: as `time.perf_counter_ns()`.

    kind: of `INTERVAL_KINDS`. layer: that asked for the copies. store: `TierState.number`.
    """

    begin: int
    end: int
    kind: str
    nbytes: int
    layer: int
    store: int


# Native only, as is all that it leads to: without the native kernels ops copy rows where they are called.
LIBRARY.define(
    "tiers_open(int number, Tensor pool, Tensor? scales, Tensor host, Tensor? host_scales, Tensor owner, Tensor below, "
    "Tensor on_disk, Tensor home, Tensor traffic, Tensor misses, Tensor staging, Tensor? staging_scales, "
    "Tensor? deleted, Tensor? saved, int groups, int quota, int max_rows, int disk, int disk_positions, "
    "int most_deleted) -> ()"
)
LIBRARY.define(
    "tiers_stage(int number, Tensor pool, Tensor? scales, Tensor table, int layer, int first, int end) -> ()"
)
LIBRARY.define("tiers_pending(Tensor ticket, int layer) -> Tensor")
LIBRARY.define("tiers_settle(Tensor ticket, int layer) -> ()")


class Disk(Protocol):
    """A file of rows: regions of equal size, one for each (layer, sequence, group), addressed by position."""

    positions: int

    def fileno(self) -> int:
        """Descriptor of the open file."""

    def write(self, region: int, first: int, records: torch.Tensor) -> None:
        """Store `[K, bytes]` uint8 records of the positions from `first` on."""

    def read(self, region: int, first: int, records: torch.Tensor) -> None:
        """Fill `[K, bytes]` uint8 records of the positions from `first` on."""


@dataclasses.dataclass(eq=False)
class TierState:
    """Where the rows of one store are.

    quota: device slots of each (layer, sequence, group). groups: G. max_rows: cap on working sets that the device
    forces; 0 = none. host: `[pairs * H, 2, P, D]` with pairs = L * B * G, perhaps in the memory of `hidden.rows`;
    host_scales: `[pairs * H, 2, P]` or None.
    owner: `[N]` int32, the position in each device slot, -1 = free. below: `[L]` int64, so many first positions have a
    row below the device; on_disk: `[L]` int64, so many of them have it on disk, the others on the host. home: `[B]`
    int64, which part of host, disk and pool belongs to a sequence. traffic: `[7]` int64: bytes copied, counted where
    they are copied; nanoseconds that `kv_wait` has blocked, and how many of those for a transfer with the disk; rows of
    working sets that attention has fetched because they had found no device slot. misses: `[L]` int64, rows of the
    coming step's working sets that found no device slot. staging: `[B * G * S, 2, P, D]` on the device, for S positions
    on their way.
    """

    quota: int
    groups: int
    max_rows: int
    host: torch.Tensor
    host_scales: torch.Tensor | None
    owner: torch.Tensor
    below: torch.Tensor
    on_disk: torch.Tensor
    home: torch.Tensor
    traffic: torch.Tensor
    misses: torch.Tensor
    staging: torch.Tensor
    staging_scales: torch.Tensor | None
    disk: Disk | None
    hidden: HiddenRows | None = None  # where the plan deletes the oldest rows
    engine: TransferEngine | None = None  # of a store on a GPU, from `open` on
    number: int = dataclasses.field(default_factory=itertools.count(1).__next__)
    _calls: dict[str, Callable[[int], bytes | None]] | None = None  # of the native side, from `open` on
    _closer: weakref.finalize | None = None  # type: ignore[type-arg]

    def __post_init__(self) -> None:
        _states[self.number] = self

    def open(self, pool: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Let the native kernels move the rows of a store on a thread, while ops compute; on a GPU, another stream.

        pool, scales: the store's. They and all tensors of this state must stay the same ones until `close`.
        """
        if pool.device.type == "cuda":
            self.engine = TransferEngine(self, pool.device)
            return
        if pool.device.type != "cpu" or not register_native():
            return
        torch.ops.alisa.tiers_open(
            self.number, pool, scales, self.host, self.host_scales, self.owner, self.below, self.on_disk, self.home,
            self.traffic, self.misses, self.staging, self.staging_scales,
            None if self.hidden is None else self.hidden.deleted,
            None if self.hidden is None else self.hidden.saved,
            self.groups, self.quota, self.max_rows,
            -1 if self.disk is None else self.disk.fileno(),
            0 if self.disk is None else self.disk.positions,
            self._first_on_disk,
        )  # fmt: skip
        self._calls = tiers_calls()
        if _intervals is not None:  # the kernels may not have served when recording began
            _record_natively(True)
        self._closer = weakref.finalize(self, self._calls["close"], self.number)
        self._closer.atexit = False  # the process takes the thread along; nothing is to be waited for then

    def close(self) -> None:
        """End the thread and let go of the tensors; as when the state is collected."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None
        if self._closer is not None:
            self._closer()

    @property
    def is_open(self) -> bool:
        """Whether the native kernels move the rows."""
        return self._closer is not None and self._closer.alive

    def call(self, name: str) -> str | None:
        """Call the native side, if it is open: `drain` or `recover`; the message of a transfer that failed."""
        if self._calls is None or not self.is_open:
            return None
        message = self._calls[name](self.number)
        return None if message is None else message.decode()

    @property
    def batch_size(self) -> int:
        """B."""
        return self.home.shape[0]

    @property
    def lists(self) -> int:
        """L * B * G: quotas on the device, rings on the host, regions of the file."""
        return self.below.shape[0] * self.batch_size * self.groups

    @property
    def ring(self) -> int:
        """H, positions that the host holds of each (layer, sequence, group)."""
        return self.host.shape[0] // self.lists

    @property
    def staging_positions(self) -> int:
        """S."""
        return self.staging.shape[0] // (self.batch_size * self.groups)

    @property
    def rows_missed(self) -> int:
        """In all steps so far."""
        return int(self.traffic[ROWS_MISSED])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, scales included."""
        scales = 0 if self.staging_scales is None else self.staging_scales[:1].nbytes
        return self.staging[:1].nbytes + scales

    def regions(self, layer: int) -> torch.Tensor:
        """`[B, G]`: which part of owner, host and disk belongs to each sequence and group of a layer."""
        first = (layer * self.batch_size + self.home) * self.groups
        return first[:, None] + torch.arange(self.groups)

    @contextlib.contextmanager
    def _recorded(self, kind: str, rows: int, layer: int) -> Iterator[None]:
        """Keep the time of copies made in Python, if somebody records."""
        begin = time.perf_counter_ns()
        yield
        self.note_interval(kind, begin, rows * self.row_bytes, layer)

    def note_interval(self, kind: str, begin: int, nbytes: int, layer: int) -> None:
        """Keep the time since `begin` as that of so many bytes, if somebody records."""
        if _intervals is not None and nbytes:
            _intervals.append(Interval(begin, time.perf_counter_ns(), kind, nbytes, layer, self.number))

    def note_below(self, layer: int, end: int) -> None:
        """The rows of the positions up to `end` have gone below the device, counted from those that had before."""
        positions = end - int(self.below[layer])
        self.traffic[DEVICE_TO_HOST] += positions * self.batch_size * self.groups * self.row_bytes
        self.below[layer] = end

    def down(self, layer: int, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Write the rows `[B, G, K, 2, P, D]` (scales `[B, G, K, 2, P]`) of the positions from `below` on."""
        if self.hidden is not None:
            self.hidden.verify(layer, int(self.below[layer]), rows, scales, self.home)
        start = self._delete_at_once(layer, rows.shape[2])
        while start < rows.shape[2]:
            end = min(rows.shape[2], start + max(1, self.ring))
            self._down(layer, rows[:, :, start:end], None if scales is None else scales[:, :, start:end])
            start = end

    def _delete_at_once(self, layer: int, count: int) -> int:
        """How many of the next positions to go below are deleted by the last of them; those need not be written."""
        first = int(self.below[layer])
        gone = 0 if self.hidden is None else self.hidden.may_delete(layer, first + count - self.ring)
        if gone <= first or self.hidden is None:
            return 0
        self.below[layer] = self.on_disk[layer] = self.hidden.deleted[layer] = gone
        return gone - first

    def _down(self, layer: int, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
        """At most H positions: first those that the ring loses are deleted, or go to disk."""
        first, ring = int(self.below[layer]), self.ring
        end = first + rows.shape[2]
        lost = range(int(self.on_disk[layer]), max(0, end - ring))
        if self.hidden is not None and lost:
            gone = self.hidden.may_delete(layer, lost.stop)
            if gone > lost.start:
                self.on_disk[layer] = self.hidden.deleted[layer] = gone
            lost = range(int(self.on_disk[layer]), lost.stop)
            self.hidden.require_saved(lost)
        lists = self.batch_size * self.groups
        if ring == 0:
            with self._recorded("through", (end - first) * lists, layer):
                self._to_disk(layer, first, rows, scales)
            self.on_disk[layer] = end
        else:
            if lost:
                slots = self._ring_slots(layer, torch.arange(lost.start, lost.stop))
                own = None if self.host_scales is None else self.host_scales[slots]
                with self._recorded("lost", len(lost) * lists, layer):
                    self._to_disk(layer, lost.start, self.host[slots], own)
                self.on_disk[layer] = lost.stop
            slots = self._ring_slots(layer, torch.arange(first, end))
            with self._recorded("down", (end - first) * lists, layer):
                self.host[slots] = rows.to(self.host.device)
                if self.host_scales is not None and scales is not None:
                    self.host_scales[slots] = scales.to(self.host.device)
        self.note_below(layer, end)

    def _ring_slots(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        return self.regions(layer)[..., None] * self.ring + positions % self.ring

    def _to_disk(self, layer: int, first: int, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
        assert self.disk is not None, "the plan has no disk, and the host is full"
        for sequence, regions in enumerate(self.regions(layer).tolist()):
            for group, region in enumerate(regions):
                own = None if scales is None else scales[sequence, group]
                records = _pack(rows[sequence, group], own)
                self.disk.write(region, first - self._first_on_disk, records)
                self.traffic[DISK_WRITE] += records.numel()

    @property
    def _first_on_disk(self) -> int:
        """The position at address 0 of a region: those before it are never written."""
        return 0 if self.hidden is None else self.hidden.most

    def load(
        self,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
        into: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of `positions [B, G, K]` wherever they are: `[B * G * K, 2, P, D]` and scales, on the device.

        into: where to put them; default: new memory.
        """
        count = positions.numel()
        if into is None:
            rows = pool.new_empty((count, *pool.shape[1:]))
            packed = None if scales is None else scales.new_empty((count, *scales.shape[1:]))
        else:
            rows, packed = into[0][:count], None if into[1] is None else into[1][:count]
        if self.engine is not None:
            self.engine.load(self, pool, scales, table, layer, positions, (rows, packed))
            return rows, packed
        drain(self)
        slots = table[layer].gather(-1, positions).reshape(-1)
        resident = slots >= 0
        here, away = resident.nonzero().flatten(), (~resident).nonzero().flatten()
        rows[here] = pool[slots[here].long()]
        if scales is not None and packed is not None:
            packed[here] = scales[slots[here].long()]
        regions = self.regions(layer)[..., None].expand_as(positions).reshape(-1)
        self.up(layer, regions[away], positions.reshape(-1)[away], rows, packed, away)
        return rows, packed

    def up(
        self,
        layer: int,
        regions: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        places: torch.Tensor,
    ) -> None:
        """Copy rows from below: `positions [K]` of `regions [K]` to `rows[places]`, `scales[places]` on the device.

        Deleted ones are rebuilt.
        """
        if self.hidden is not None:
            gone = self._pending(layer, regions, positions, places)
            if gone is not None:
                self._rebuild(layer, gone, rows, scales)
                left = positions >= self.hidden.deleted[layer]
                regions, positions, places = regions[left], positions[left], places[left]
        from_host = positions >= self.on_disk[layer]
        slots = (regions * self.ring + positions % max(1, self.ring))[from_host]
        with self._recorded("up", len(slots), layer):
            rows[places[from_host]] = self.host[slots].to(rows.device)
            if scales is not None and self.host_scales is not None:
                scales[places[from_host]] = self.host_scales[slots].to(scales.device)
        on_disk = (~from_host).nonzero().flatten()
        with self._recorded("fetch", len(on_disk), layer):
            for run in _runs(regions[on_disk], positions[on_disk]):
                here = on_disk[run]
                self._read_disk(int(regions[here[0]]), positions[here], rows, scales, places[here])
        self.traffic[HOST_TO_DEVICE] += len(positions) * self.row_bytes

    def enter(
        self,
        layer: int,
        regions: torch.Tensor,
        positions: torch.Tensor,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        slots: torch.Tensor,
    ) -> None:
        """As `up`, for rows of the coming step: `kv_recompute` rebuilds those that are deleted."""
        if self.hidden is not None:
            gone = self._pending(layer, regions, positions, slots)
            if gone is not None:
                self.hidden.pending[layer] = gone
                left = positions >= self.hidden.deleted[layer]
                regions, positions, slots = regions[left], positions[left], slots[left]
        self.up(layer, regions, positions, pool, scales, slots)

    def _pending(
        self, layer: int, regions: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> Pending | None:
        """Those of `positions [K]` that are deleted, with their places; None if none is."""
        assert self.hidden is not None
        gone = positions < self.hidden.deleted[layer]
        if not bool(gone.any()):
            return None
        sequences = regions[gone] // self.groups - layer * self.batch_size
        return Pending(sequences, positions[gone], regions[gone] % self.groups, slots[gone])

    def _read_disk(
        self,
        region: int,
        positions: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        places: torch.Tensor,
    ) -> None:
        assert self.disk is not None
        records = torch.empty((len(positions), self.row_bytes), dtype=torch.uint8)
        self.disk.read(region, int(positions[0]) - self._first_on_disk, records)
        self.traffic[DISK_READ] += records.numel()
        _unpack(records, rows, scales, places)

    def copy_sequence(
        self, pool: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor, source: int, target: int
    ) -> None:
        """Let sequence `target` have the same rows in the same places of its own parts of every tier."""
        if self.hidden is not None:
            self.hidden.copy_sequence(int(self.home[source]), int(self.home[target]))
        for layer in range(self.below.shape[0]):
            for group, (here, there) in enumerate(self.regions(layer)[[source, target]].T.tolist()):
                mine, theirs = (slice(region * self.quota, (region + 1) * self.quota) for region in (there, here))
                pool[mine] = pool[theirs]
                if scales is not None:
                    scales[mine] = scales[theirs]
                self.owner[mine] = self.owner[theirs]
                slots = table[layer, source, group]
                table[layer, target, group] = torch.where(slots < 0, slots, slots + (there - here) * self.quota)
                mine, theirs = (slice(region * self.ring, (region + 1) * self.ring) for region in (there, here))
                self.host[mine] = self.host[theirs]
                if self.host_scales is not None:
                    self.host_scales[mine] = self.host_scales[theirs]
                written = int(self.on_disk[layer]) - self._first_on_disk
                for first in range(0, written, _COPIED_POSITIONS):
                    assert self.disk is not None
                    count = min(_COPIED_POSITIONS, written - first)
                    records = torch.empty((count, self.row_bytes), dtype=torch.uint8)
                    self.disk.read(here, first, records)
                    self.disk.write(there, first, records)

    def blocks(self, tokens: int, split: int) -> list[tuple[int, int]]:
        """Ranges of positions up to `tokens` that fit the staging, none across position `split`."""
        size = self.staging_positions
        ends = [range(0, split, size), range(split, tokens, size)]
        return [(first, min(first + size, part.stop)) for part in ends for first in part]

    def stage(
        self, pool: torch.Tensor, scales: torch.Tensor | None, table: torch.Tensor, layer: int, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Rows of the positions [first, end) in staging: rows, scales, and their slots there `[B, G, end - first]`."""
        shape = (self.batch_size, self.groups, end - first)
        if self.is_open:
            try:
                torch.ops.alisa.tiers_stage(self.number, pool, scales, table, layer, first, end)
            except RuntimeError:
                drain(self)  # a TierError, if a transfer has failed
                raise
            self._rebuild_staged(table, layer, first, end)
        else:
            positions = torch.arange(first, end, device=pool.device).expand(shape)
            self.load(pool, scales, table, layer, positions, (self.staging, self.staging_scales))
        slots = torch.arange(math.prod(shape), device=pool.device).view(shape)
        return self.staging, self.staging_scales, slots

    def _rebuild_staged(self, table: torch.Tensor, layer: int, first: int, end: int) -> None:
        """Put the deleted ones of the positions [first, end) to staging, which has the others."""
        if self.hidden is None or first >= self.hidden.deleted[layer]:
            return
        positions = torch.arange(first, end).expand(self.batch_size, self.groups, -1)
        away = (table[layer, :, :, first:end] < 0).flatten().nonzero().flatten()
        regions = self.regions(layer)[..., None].expand_as(positions).flatten()[away]
        gone = self._pending(layer, regions, positions.flatten()[away], away)
        if gone is not None:
            self._rebuild(layer, gone, self.staging, self.staging_scales)

    def rebuild_pending(
        self, ticket: torch.Tensor, layer: int, pool: torch.Tensor, scales: torch.Tensor | None
    ) -> None:
        """Make the rows of the coming step that are deleted, while transfers for the layer are on their way."""
        wanted = self._take_pending(ticket, layer)
        if wanted is not None:
            settle = None if not self.is_open else lambda: torch.ops.alisa.tiers_settle(ticket, layer)
            self._rebuild(layer, wanted, pool, scales, settle)
            del hidden_of(self).pending[layer]

    def _take_pending(self, ticket: torch.Tensor, layer: int) -> Pending | None:
        pending = hidden_of(self).pending
        if self.is_open:
            found = torch.ops.alisa.tiers_pending(ticket, layer)
            if found.shape[1]:
                pending[layer] = Pending(*found)
        return pending.get(layer)

    def forget_pending(self, ticket: torch.Tensor, table: torch.Tensor) -> None:
        """Take the slots away from rows that should have been rebuilt, and were not because the step has failed."""
        places = self.home.argsort()
        for layer in range(self.below.shape[0]):
            if self._take_pending(ticket, layer) is None:
                continue
            left = hidden_of(self).pending.pop(layer)
            index = layer, places[left.sequences], left.groups, left.positions
            table[index] = table[index].masked_fill(table[index] == left.slots, -1)

    def _rebuild(
        self,
        layer: int,
        wanted: Pending,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        settle: Callable[[], None] | None = None,
    ) -> None:
        """Make deleted rows and put them where they are wanted, once `settle` has returned."""
        began, hidden = time.perf_counter_ns(), hidden_of(self)
        made, made_scales = hidden.rebuild(layer, wanted, rows.shape[2], rows.device)
        self.note_interval("recompute", began, len(wanted.slots) * hidden.row_bytes, layer)
        if settle is not None:
            settle()
        rows[wanted.slots] = made.to(rows.dtype)
        if scales is not None and made_scales is not None:
            scales[wanted.slots] = made_scales


_states: weakref.WeakValueDictionary[int, TierState] = weakref.WeakValueDictionary()


def state_of(ticket: torch.Tensor) -> TierState:
    """The state that a store's `ticket` names."""
    return _states[int(ticket[-1])]


def hidden_of(state: TierState) -> HiddenRows:
    """The saved layer inputs of a store that deletes rows."""
    if state.hidden is None:
        raise CacheError("this cache deletes no rows, so nothing is rebuilt", fix="make a new cache")
    return state.hidden


def engine_of(state: TierState) -> TransferEngine:
    """What moves the rows of a store on a GPU."""
    if state.engine is None:
        raise CacheError("the tiers of this cache are closed", fix="reset the cache, or make a new one")
    return state.engine


def drain(state: TierState) -> None:
    """Wait until all started transfers have ended; a TierError if one failed since the last `recover`."""
    if state.engine is not None:
        rows, missed = state.engine.drain()
        state.traffic[HOST_TO_DEVICE] += rows * state.row_bytes
        state.traffic[ROWS_MISSED] += missed
    message = state.call("drain")
    if message is not None:
        raise TierError(
            message.removeprefix("alisa: "),
            got="the disk tier of this cache",
            fix="reset the cache; set disk_path to a folder on a healthy disk",
        )


def recover(state: TierState) -> None:
    """Wait until all started transfers have ended, and forget that one failed: all rows are about to be forgotten."""
    if state.engine is not None:
        drain(state)
    state.call("recover")


_intervals: list[Interval] | None = None  # of copies made in Python, while somebody records


def record_intervals() -> None:
    """Keep the intervals of all stores' transfers from now on, until `take_intervals`. Not those on a GPU."""
    global _intervals
    _intervals = []
    _take_native()
    _record_natively(True)


def take_intervals() -> list[Interval]:
    """End recording, once the transfers that have been started are over; what was kept, by begin."""
    global _intervals
    for state in list(_states.values()):
        state.call("drain")  # a transfer that failed is the next step's to report
    _record_natively(False)
    kept, _intervals = [*(_intervals or ()), *_take_native()], None
    return sorted(kept, key=lambda interval: interval.begin)


def _record_natively(on: bool) -> None:
    calls = interval_calls()
    if calls is not None:
        calls[0](int(on))


def _take_native() -> list[Interval]:
    calls, room, kinds = interval_calls(), 4096, tuple(INTERVAL_KINDS)
    kept: list[Interval] = []
    if calls is None:
        return kept
    buffer = (ctypes.c_int64 * (6 * room))()
    while count := calls[1](buffer, room):
        for i in range(0, 6 * count, 6):
            begin, end, kind, nbytes, layer, store = buffer[i : i + 6]
            kept.append(Interval(begin, end, kinds[kind], nbytes, layer, store))
    return kept


def first_recent(tokens: int, quota: int, spec: str, max_rows: int) -> int:
    """First of the most recent positions that stay on the device, when the next token will be number `tokens`.

    Nothing leaves while all positions and the coming one fit. After that the quota holds the dynamic rows of the
    coming step's working set and the most recent positions, the coming one included. max_rows: as in `capped`.
    """
    context = tokens + 1
    if context <= quota:
        return 0
    dynamic = int(capped(decode_spec(spec), max_rows).dynamic_rows(context)) if spec else 0
    return min(tokens, context - quota + dynamic)


def _runs(regions: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Indices cut where the region changes or positions do not go on by one."""
    if not len(positions):
        return []
    cuts = ((regions.diff() != 0) | (positions.diff() != 1)).nonzero().flatten() + 1
    return list(torch.tensor_split(torch.arange(len(positions)), cuts.tolist()))


def _pack(rows: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """`[K, 2, P, D]` and `[K, 2, P]` as bytes `[K, bytes of a row]`."""
    count = rows.shape[0]
    parts = [rows] if scales is None else [rows, scales]
    return torch.cat([part.cpu().contiguous().view(torch.uint8).view(count, -1) for part in parts], dim=1)


def _unpack(records: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor | None, places: torch.Tensor) -> None:
    """Inverse of `_pack`, into `rows[places]` and `scales[places]`."""
    size = rows[:1].nbytes
    values = records[:, :size].contiguous().view(rows.dtype).view(len(places), *rows.shape[1:])
    rows[places] = values.to(rows.device)
    if scales is not None:
        packed = records[:, size:].contiguous().view(scales.dtype).view(len(places), *scales.shape[1:])
        scales[places] = packed.to(scales.device)
