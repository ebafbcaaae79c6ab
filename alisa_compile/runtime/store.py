"""The token store: rows, residency, scores and working sets of all layers with one K/V shape."""

from __future__ import annotations

import copy
import dataclasses
import time
import weakref
from collections.abc import Callable, Mapping

import torch

from .. import compat
from ..config import AlisaConfig
from ..errors import AlisaError, CacheError, InfeasibleError, NotAvailableError, TierError
from ..kernels.hidden import HiddenRows, Producer
from ..kernels.kv_append.tiered import place_rows
from ..kernels.kv_select.reference import choose
from ..kernels.selection import SPARSE_BLOCK, SelectionSpec
from ..kernels.swa_attention.reference import score_dtype
from ..kernels.tiers import TRAFFIC_PLACES, TierState, drain, recover
from ..kernels.triton_launch import is_installed
from . import trace
from .disk import DiskFile
from .policies import head_groups, selection_spec
from .report import COUNTERS, RunStatistics
from .tiers import Pool, RowForm, RowShape, Tier, TierSizes, identity_table

#: Sizes of the tiers for a batch size and a capacity; None = everything fits the device.
Place = Callable[[int, int], TierSizes | None]

_COPIED_POSITIONS = 256  # at a time, where rows go from one store to another
_LESS_MEMORY = "lower max_new_tokens, max_length or the batch size, or set kv_dtype='int8'"


@dataclasses.dataclass(frozen=True)
class StoreShape:
    """What decides a store's tensors, besides its capacity."""

    num_layers: int
    batch_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def fits(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a store of this shape serves a request; its layers and heads are the model's anyway."""
        return (self.batch_size, self.dtype, self.device) == (batch_size, dtype, device)


def row_shape(shape: StoreShape, config: AlisaConfig) -> RowShape:
    """What one slot of a store holds."""
    form = RowForm.KV_INT8 if config.kv_dtype == "int8" else RowForm.KV
    return RowShape(shape.kv_heads // head_groups(config, shape.kv_heads), shape.head_dim, shape.dtype, form)


class TokenStore:
    """Storage of one K/V shape; a layer is an integer argument of every op.

    The tensors are attributes because traced code reads them there, which makes each a graph input shared by all
    layers: `pool [N, 2, P, D]`, `scales [N, 2, P]` or None, `table [L, B, G, C]` int32, `length [L]` int64,
    `valid [B, C]` bool, and for sparse policies `scores [L, B, G, R, C]`, `rows [L, B, G, W]` int32, `counts [L, B, G]`
    int32 and `origin [2]` int64: the length after the last dense block, from which refresh steps are counted, and
    the cap on working sets that the budget forces (0 = none).
    Capacity is never a number in traced code: it is `table.shape[3]`, so a graph serves every capacity.

    place: where rows go by batch size and capacity; None, or a result of None: all of them to the device. Where
    they do not all fit, `tiers` holds the others, the table says -1 for a row without a device slot, and `ticket
    [L + 1]` int64 leads the ops to `tiers` (see `kernels/tiers.py`).
    """

    def __init__(
        self,
        shape: StoreShape,
        config: AlisaConfig,
        capacity: int,
        place: Place | None = None,
    ) -> None:
        self.shape = shape
        self.config = config
        self.groups = head_groups(config, shape.kv_heads)
        self.row = row_shape(shape, config)
        self.selection: SelectionSpec | None = None
        self.spec = ""  # read while tracing: strings and flags become constants and guards of the graph
        self.is_int8 = self.row.form is RowForm.KV_INT8
        self.padded = True
        self.has_history = False
        self.host_length = self.host_origin = 0
        self.statistics = RunStatistics()
        self._step_started = 0  # nanoseconds
        self._stage = ""  # of the step that runs
        self._profiled: torch.profiler.record_function | None = None
        self._length_before = 0  # the latest step
        self._in_step = False
        self._sparse_layers = 0
        self._dense = [True] * shape.num_layers  # by layer, whether the coming step attends to all rows
        self.is_validated = False  # somebody sees to the option `validate`
        self._place = place
        self._counted = (0,) * len(COUNTERS)  # of tiers that are no more
        self.tiers: TierState | None = None
        self.ticket: torch.Tensor | None = None
        self.broken: TierError | None = None  # rows are lost until the next reset
        self._no_room: AlisaError | None = None  # why the store has not grown for the coming token
        self.disk: DiskFile | None = None
        self._allocate(capacity)

    @torch.inference_mode(False)  # tensors made in inference mode could not be written to outside it later
    def _allocate(self, capacity: int) -> None:
        """Make all tensors, then switch to them: a failure leaves the store as it was."""
        began = time.perf_counter_ns()
        shape, groups, device = self.shape, self.groups, self.shape.device
        leading = (shape.num_layers, shape.batch_size, groups)
        lists = shape.num_layers * shape.batch_size * groups
        sizes = None if self._place is None else self._place(shape.batch_size, capacity)
        if sizes is not None:
            _refuse_tiers(sizes, device, capacity)
        slots = lists * (capacity if sizes is None else sizes.device)
        cap = None if sizes is None else sizes.max_rows
        selection = selection_spec(self.config if cap is None else dataclasses.replace(self.config, max_rows=cap))
        tiers = ticket = disk = None
        scores = rows = counts = origin = None
        try:
            pool = self._make_pool(Tier.DEVICE, slots, device, capacity)
            if sizes is None:
                table = identity_table(*leading, capacity, device)
            else:
                table = torch.full((*leading, capacity), -1, dtype=torch.int32, device=device)
                if sizes.disk:
                    disk = DiskFile(self.config.disk_path, lists, sizes.disk, self.row.bytes_per_row)
                tiers = self._make_tiers(sizes, disk, capacity)
                ticket = torch.zeros(shape.num_layers + 1, dtype=torch.int64)
                ticket[-1] = tiers.number
                tiers.open(pool.rows, pool.scales)
            length = torch.zeros(shape.num_layers, dtype=torch.int64, device=device)
            valid = torch.ones((shape.batch_size, capacity), dtype=torch.bool, device=device)
            if selection is not None:
                # One more than fits: a step that fills the store selects for the token that growth makes room for.
                ring, width = selection.score_rows(capacity + 1), selection.rows_capacity(capacity + 1)
                scores = torch.zeros((*leading, ring, capacity), dtype=score_dtype(shape.dtype), device=device)
                rows = torch.zeros((*leading, width), dtype=torch.int32, device=device)
                counts = torch.full(leading, -1, dtype=torch.int32, device=device)
                origin = torch.tensor([0, cap or 0], dtype=torch.int64, device=device)
        except AlisaError:  # some of them are RuntimeErrors as well
            raise
        except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
            raise CacheError(
                "there is not enough memory for the tables of the KV store",
                got=f"{capacity} tokens x {shape.batch_size} sequences on {device}",
                fix=_LESS_MEMORY,
            ) from error
        self.device_pool, self.pool, self.scales = pool, pool.rows, pool.scales
        self.table, self.length, self.valid = table, length, valid
        self.scores, self.rows, self.counts, self.origin = scores, rows, counts, origin
        self.tiers, self.ticket, self.disk = tiers, ticket, disk
        self._shared_ring = sizes.host if sizes is not None and sizes.shared_until else 0
        self.selection = selection
        # Without the plan's cap, which reaches the graph as a number in `origin`: no other graph for another budget.
        plain = selection_spec(self.config)
        self.spec = plain.encode() if plain else ""
        self.pool.alisa_store = weakref.ref(self)  # type: ignore[attr-defined]
        self._note_bytes()
        dynamic = [(id(tensor), dim) for tensor, dim in self.dynamic_dimensions()]
        for tensor in self.tensors():
            compat.mark_static_address(tensor)
            for dim in range(tensor.dim()):
                # The others are the model's and the batch's: each has graphs of its own, however many a process meets.
                mark = compat.mark_dynamic if (id(tensor), dim) in dynamic else compat.mark_static
                mark(tensor, dim)
        if trace.active is not None:
            names = ("device", "host", "disk", "staging")
            positions = {} if sizes is None else {f"{name}_positions": getattr(sizes, name) for name in names}
            trace.active.span(
                "planner", "make the KV store", began, time.perf_counter_ns(), capacity=capacity, **positions
            )

    def _note_bytes(self) -> None:
        for tier, nbytes in self.bytes_by_tier().items():
            self.statistics.note_bytes(tier, nbytes)

    def _make_pool(self, tier: Tier, slots: int, device: torch.device, capacity: int) -> Pool:
        """capacity: for the error alone, whose user knows tokens and not slots."""
        try:
            return Pool.allocate(tier, self.row, slots, device)
        except (RuntimeError, MemoryError) as error:
            size = slots * self.row.bytes_per_row / 2**20
            below = "host_kv_budget" if tier is Tier.DEVICE else "disk_kv_budget"
            raise CacheError(
                f"there is not enough memory for the {tier.value} tier of the KV store",
                got=f"{size:.2f} MiB of rows on {device}, for {capacity} tokens x {self.shape.batch_size} sequences",
                fix=f"set a lower {tier.value}_kv_budget and a {below} for the other rows; {_LESS_MEMORY}",
            ) from error

    def _make_tiers(self, sizes: TierSizes, disk: DiskFile | None, capacity: int) -> TierState:
        shape, device = self.shape, self.shape.device
        lists = shape.num_layers * shape.batch_size * self.groups
        hidden = self._make_hidden(sizes, capacity)
        host_slots = 0 if sizes.shared_until else lists * sizes.host
        host = self._make_pool(Tier.HOST, host_slots, torch.device("cpu"), capacity)
        if hidden is not None and sizes.shared_until:
            host.rows = hidden.room(lists * sizes.host, host.rows.shape[1:])
        staging = self._make_pool(Tier.DEVICE, shape.batch_size * self.groups * sizes.staging, device, capacity)
        return TierState(
            quota=sizes.device,
            max_rows=sizes.max_rows or 0,
            groups=self.groups,
            host=host.rows,
            host_scales=host.scales,
            owner=torch.full((lists * sizes.device,), -1, dtype=torch.int32, device=device),
            below=torch.zeros(shape.num_layers, dtype=torch.int64),
            on_disk=torch.zeros(shape.num_layers, dtype=torch.int64),
            home=torch.arange(shape.batch_size),
            traffic=torch.zeros(TRAFFIC_PLACES, dtype=torch.int64),
            misses=torch.zeros(shape.num_layers, dtype=torch.int64),
            staging=staging.rows,
            staging_scales=staging.scales,
            disk=disk,
            hidden=hidden,
        )

    def _make_hidden(self, sizes: TierSizes, capacity: int) -> HiddenRows | None:
        if not sizes.deleted:
            return None
        shape = self.shape
        slots = shape.num_layers * shape.batch_size * sizes.deleted
        stored = torch.int8 if self.is_int8 else shape.dtype
        try:
            rows = torch.zeros((slots, sizes.hidden_size), dtype=stored)
        except RuntimeError as error:
            raise CacheError(
                "there is not enough memory for the saved layer inputs",
                got=f"{slots * sizes.hidden_size * stored.itemsize / 2**20:.2f} MiB on the host",
                fix=f"set a lower host_kv_budget and a disk_kv_budget, or recompute='off'; {_LESS_MEMORY}",
            ) from error
        return HiddenRows(
            sizes.deleted,
            sizes.shared_until or sizes.deleted,
            rows,
            torch.zeros(slots) if self.is_int8 else None,
            torch.zeros((shape.batch_size, capacity), dtype=torch.int32),
            saved=torch.zeros(shape.num_layers, dtype=torch.int64),
            deleted=torch.zeros(shape.num_layers, dtype=torch.int64),
            dtype=shape.dtype,
        )

    @property
    def hidden_size(self) -> int:
        """Width of the layer inputs that are saved, 0 where no row is deleted; read while tracing, as `is_tiered`."""
        return 0 if self.tiers is None or self.tiers.hidden is None else self.tiers.hidden.rows.shape[1]

    @property
    def lacks_producers(self) -> bool:
        """Whether rows may be deleted that nothing could make again so far: the first prompt has a single token."""
        return self.tiers is not None and self.tiers.hidden is not None and not self.tiers.hidden.producers

    def bind_producers(self, producers: Mapping[int, Producer]) -> None:
        """By layer, what makes K and V again where rows are deleted."""
        if self.tiers is not None and self.tiers.hidden is not None:
            self.tiers.hidden.bind(producers)

    @property
    def is_tiered(self) -> bool:
        """Whether rows may be below the device; read while tracing, so a graph is for one or the other."""
        return self.tiers is not None

    @property
    def ticket_argument(self) -> tuple[torch.Tensor, ...]:
        """What the ops of a store with tiers take as well."""
        return () if self.ticket is None else (self.ticket,)

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self.table.shape[3]

    def dynamic_dimensions(self) -> list[tuple[torch.Tensor, int]]:
        """The tensor dimensions that depend on the capacity: a compiler must not specialise on them."""
        dims = [(self.pool, 0), (self.table, 3), (self.valid, 1)]
        if self.scales is not None:
            dims.append((self.scales, 0))
        if self.scores is not None and self.rows is not None:
            dims += [(self.scores, 4), (self.rows, 3)]
            if self.selection is not None and self.selection.rank == "ring":
                dims.append((self.scores, 3))
        return dims

    def tensors(self) -> list[torch.Tensor]:
        """Everything that persists between steps."""
        every = (
            self.pool,
            self.scales,
            self.table,
            self.length,
            self.valid,
            self.scores,
            self.rows,
            self.counts,
            self.origin,
            self.ticket,
        )
        return [tensor for tensor in every if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: rows, scales, tables, scores, index sets, staging."""
        return self.bytes_by_tier()[Tier.DEVICE.value]

    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes allocated on each tier."""
        device = sum(tensor.nbytes for tensor in self.tensors())
        if self.tiers is None:
            return {Tier.DEVICE.value: device}
        tiers = self.tiers
        device += sum(
            tensor.nbytes
            for tensor in (
                tiers.staging, tiers.staging_scales, tiers.owner, tiers.below, tiers.on_disk, tiers.home,
                tiers.traffic, tiers.misses,
            )
            if tensor is not None
        )  # fmt: skip
        host = tiers.host.nbytes + (0 if tiers.host_scales is None else tiers.host_scales.nbytes)
        if tiers.hidden is not None:
            host = tiers.hidden.nbytes + (0 if tiers.hidden.is_shared else host)
            device += tiers.hidden.device_nbytes
        disk = 0 if self.disk is None else self.disk.positions * tiers.lists * tiers.row_bytes
        return {Tier.DEVICE.value: device, Tier.HOST.value: host, Tier.DISK.value: disk}

    def row_bytes_by_tier(self) -> dict[str, int]:
        """Bytes of the rows and layer inputs that each tier holds now; a row may be on the device and below it."""
        row, positions = self.row.bytes_per_row, self.shape.batch_size * self.groups
        if self.tiers is None:
            return {Tier.DEVICE.value: self.shape.num_layers * positions * self.host_length * row}
        below, on_disk = int(self.tiers.below.sum()), int(self.tiers.on_disk.sum())
        hidden = self.tiers.hidden
        deleted = 0 if hidden is None else int(hidden.deleted.sum())
        inputs = 0 if hidden is None else int(hidden.saved.sum()) * hidden.batch_size * hidden.row_bytes
        return {
            Tier.DEVICE.value: int((self.tiers.owner >= 0).sum()) * row,
            Tier.HOST.value: (below - on_disk) * positions * row + inputs,
            Tier.DISK.value: (on_disk - deleted) * positions * row,
        }

    def copy(self) -> TokenStore:
        """An independent store with the same contents."""
        return self._copy_of(list(range(self.shape.batch_size)))

    def _copy_of(self, index: list[int]) -> TokenStore:
        """A store whose sequence b is a copy of this one's sequence `index[b]`."""
        shape = dataclasses.replace(self.shape, batch_size=len(index))
        other = TokenStore(shape, self.config, self.capacity, self._place)
        other._take_hidden(self, index)
        other._take_rows(self, index, self.host_length)
        other.length.copy_(self.length)
        other.valid.copy_(self.valid[index])
        for mine, theirs in zip(self._selection_state(), other._selection_state(), strict=True):
            theirs.copy_(mine[:, index])
        other.host_length, other.has_history, other.padded = self.host_length, self.has_history, self.padded
        other._length_before, other._dense = self._length_before, list(self._dense)
        other._set_origin(self.host_origin)
        other.statistics.budget_bytes = self.statistics.budget_bytes
        return other

    def _take_hidden(self, source: TokenStore, index: list[int]) -> None:
        """Copy the saved layer inputs of the sequences `index` of another store, before its rows."""
        if self.tiers is None or self.tiers.hidden is None:
            return
        if source.tiers is None or source.tiers.hidden is None:
            if not source.host_length:
                return
            raise CacheError(
                "this cache cannot grow: rows would be deleted whose layer inputs were not saved",
                got=f"{source.host_length} tokens in {source.capacity} places",
                fix="set max_length to the most tokens that the cache will hold",
            )
        if source.host_length > self.tiers.hidden.split:
            self._use_host_for_inputs()
        self.tiers.hidden.take(source.tiers.hidden, index, source.tiers.home, source.host_length)

    def _use_host_for_inputs(self) -> None:
        """Delete all rows that lie where the layer inputs of the coming tokens will be saved."""
        tiers = self.tiers
        if tiers is None or tiers.hidden is None or not tiers.hidden.is_shared or tiers.ring == 0:
            return
        drain(tiers)
        tiers.hidden.deleted.copy_(tiers.below)
        tiers.on_disk.copy_(tiers.below)
        self._set_ring(0)

    def _set_ring(self, positions: int) -> None:
        """Let the host hold rows of so many positions of each layer, sequence and group in the room of layer inputs."""
        assert self.tiers is not None and self.tiers.hidden is not None and self.ticket is not None
        self.tiers.close()
        self.ticket[:-1] = 0  # transfers are numbered anew
        self.tiers.host = self.tiers.hidden.room(self.tiers.lists * positions, self.tiers.host.shape[1:])
        self.tiers.open(self.pool, self.scales)

    def _take_rows(self, source: TokenStore, index: list[int], used: int) -> None:
        """Copy the first `used` rows of the sequences `index` of another store with the same layers and heads."""
        if source.tiers is None and self.tiers is None:
            _move_rows(source.device_pool, source.table[:, index], self.device_pool, self.table, used)
            return
        for layer in range(self.shape.num_layers):
            for first in range(0, used, _COPIED_POSITIONS):
                rows, scales = source.read(layer, first, min(used, first + _COPIED_POSITIONS))
                self.write(layer, first, rows[index], None if scales is None else scales[index])

    def read(self, layer: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows `[B, G, K, 2, P, D]` and scales `[B, G, K, 2, P]` of the positions [first, end), wherever they are."""
        shape = (self.shape.batch_size, self.groups, end - first)
        if self.tiers is None:
            slots = self.table[layer, :, :, first:end].long()
            return self.pool[slots], None if self.scales is None else self.scales[slots]
        positions = torch.arange(first, end, device=self.shape.device).expand(shape)
        rows, scales = self.tiers.load(self.pool, self.scales, self.table, layer, positions)
        return rows.view(*shape, *rows.shape[1:]), None if scales is None else scales.view(*shape, *scales.shape[1:])

    def write(self, layer: int, first: int, rows: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Store rows, as `read` returns them, at the positions from `first` on; all before must be stored already."""
        if self.tiers is not None:
            place_rows(self.tiers, self.pool, self.scales, self.table, layer, first, rows, scales, self.spec)
            return
        slots = self.table[layer, :, :, first : first + rows.shape[2]].long()
        self.pool[slots] = rows
        if self.scales is not None and scales is not None:
            self.scales[slots] = scales

    def _selection_state(self) -> list[torch.Tensor]:
        """The tensors that hold scores and working sets, `[L, B, ...]`; none without selection."""
        return [tensor for tensor in (self.scores, self.rows, self.counts) if tensor is not None]

    def reset(self) -> None:
        """Forget all tokens; storage and compiled graphs stay."""
        self.length.zero_()
        self.valid.fill_(True)
        if self.scores is not None:
            self.scores.zero_()
        self.attend_to_all()
        self.broken = self._no_room = None
        disk_has_failed = self._disk_has_failed()
        if self.tiers is not None:
            recover(self.tiers)
        self._forget_from(0)
        if self.tiers is not None and self._shared_ring and self.tiers.ring == 0:
            self._set_ring(self._shared_ring)
        self.has_history = False
        self.host_length = 0
        self._set_origin(0)
        self._in_step = False
        if disk_has_failed:
            self._replace_file()  # the old one may fail again

    def _disk_has_failed(self) -> bool:
        """Whether a transfer with the disk ever went wrong; waits for those that run."""
        if self.tiers is None or self.disk is None:
            return False
        try:
            drain(self.tiers)
        except TierError:
            return True
        return self.disk.has_failed

    def _replace_file(self) -> None:
        """Let an empty store go on with a new file."""
        assert self.tiers is not None and self.ticket is not None and self.disk is not None
        self.tiers.close()
        self.disk.close()  # first: there may be no space for two
        self.ticket[:-1] = 0  # transfers are numbered anew
        try:
            file = DiskFile(self.config.disk_path, self.tiers.lists, self.disk.positions, self.row.bytes_per_row)
        except TierError as error:
            self.disk.has_failed = True
            self.broken = error
            raise
        self.disk = self.tiers.disk = file
        self.tiers.open(self.pool, self.scales)

    def crop(self, length: int) -> None:
        """Forget the tokens from position `length` on, as after rejected drafts. Not inside a step.

        Sparse policies: the coming step's working set is chosen again. Attention that the forgotten tokens paid stays
        in the scores of the others; Algorithm 1's ring loses the rows that they had overwritten, and what H2O dropped
        for them stays dropped.
        """
        removed = self.host_length - length
        if removed <= 0:
            return
        if length == 0:
            self.reset()
            return
        if self.selection is not None:
            self._crop_selection(self.selection, length)
        self._forget_from(length)
        self.length.fill_(length)
        self.valid[:, length:] = True
        self.host_length = length
        self._set_origin(min(self.host_origin, length))

    def _forget_from(self, length: int) -> None:
        """Give the slots of the positions from `length` on away, with their rows below the device."""
        tiers = self.tiers
        if tiers is None:
            return
        drain(tiers)
        tiers.below.clamp_(max=length)
        tiers.on_disk.clamp_(max=length)
        tiers.misses.zero_()
        if tiers.hidden is not None and self.ticket is not None:
            tiers.forget_pending(self.ticket, self.table)
            tiers.hidden.forget_from(length)
        self.table[..., length:] = -1
        if tiers.engine is not None:
            tiers.engine.forget()
        # From the table, which a step that failed in a compiler's copies has left as it was.
        tiers.owner.fill_(-1)
        used = (self.table >= 0).nonzero()
        tiers.owner[self.table[tuple(used.T)].long()] = used[:, 3].to(tiers.owner.dtype)

    def _make_room(self) -> None:
        """Give the coming token a slot where the step before has not: after a crop, in a layer left dense."""
        tiers, ticket = self.tiers, self.ticket
        if tiers is None or ticket is None:
            return
        if tiers.engine is None:
            lacking = (self.table[..., self.host_length] < 0).flatten(1).any(1).nonzero().flatten().tolist()
        else:  # the host knows, and must not wait for the device to say it
            tiers.engine.tokens = self.host_length
            lacking = tiers.engine.layers_without_room()
        if not lacking:
            return
        if tiers.engine is None:
            drain(tiers)  # the ops would not say in a TierError what failed before
        ops = torch.ops.alisa
        stored = self.pool, self.scales, self.table, self.length
        for layer in lacking:
            offload = ops.kv_offload.default if tiers.hidden is None else ops.kv_offload.recomputing
            offload(*stored, ticket, layer, self.spec)
            ops.kv_prefetch(*stored, self.rows, self.counts, ticket, layer)
            if tiers.hidden is not None:
                ops.kv_recompute(self.pool, self.scales, ticket, layer)
            ops.kv_wait(self.pool, ticket, self.pool, layer)
        if tiers.engine is None:
            drain(tiers)

    def _crop_selection(self, selection: SelectionSpec, length: int) -> None:
        assert self.scores is not None and self.rows is not None and self.counts is not None
        self.scores[..., length:] = 0
        if selection.rank == "decay":
            # Undo the fading of the forgotten steps, and go back to the exponent that `length` implies.
            old, new = selection.decay_exponent(self.host_length), selection.decay_exponent(length)
            self.scores *= selection.decay ** (old - new - (self.host_length - length))
        elif selection.rank == "ring":
            before, after = (self.valid[:, :tokens].sum(-1).tolist() for tokens in (self.host_length, length))
            ring = self.scores.shape[3]
            for sequence, (last, first) in enumerate(zip(before, after, strict=True)):
                gone = {rank % ring for rank in range(max(first, last - ring), last)}
                self.scores[:, sequence, :, sorted(gone)] = 0
        valid = self.valid if self.padded else None
        # A refresh is due where the tokens that stay pass one, once: rejected drafts may pass it again and again.
        accepted = max(1, length - self._length_before)
        for layer in range(self.shape.num_layers):
            if length > self.host_origin and selection.is_refresh_step(length + 1 - self.host_origin, layer, accepted):
                self.counts[layer], self._dense[layer] = -1, True
            else:
                choose(self.scores, self.rows, self.counts, length, valid, layer, selection)
                self._dense[layer] = False

    def select_sequences(self, index: list[int]) -> None:
        """Let sequence b be a copy of what sequence `index[b]` was, for beam search and the like. Not inside a step.

        Every sequence owns its slots. One that is kept takes its slots along, in the table alone; only the rows of
        those that are kept more than once are copied.
        """
        if len(index) != self.shape.batch_size:
            other, statistics = self._copy_of(index), self.statistics
            counted = self.counters()
            vars(self).update(vars(other))
            self._counted = counted
            self.pool.alisa_store = weakref.ref(self)  # type: ignore[attr-defined]
            self.statistics = statistics
            self._note_bytes()
            return
        if index == list(range(len(index))):
            return
        unused = iter(sorted(set(range(len(index))) - set(index)))
        owner: dict[int, int] = {}
        originals, duplicates, moved = [], [], []
        for target, source in enumerate(index):
            if source in owner:
                originals.append(owner[source])
                duplicates.append(target)
                moved.append(next(unused))
            else:
                owner[source] = target
                moved.append(source)
        if self.tiers is not None:
            drain(self.tiers)
        self.table.copy_(self.table[:, moved])
        if self.tiers is None:
            pool, used = self.device_pool, self.host_length
            _move_rows(pool, self.table[:, originals], pool, self.table[:, duplicates], used)
        else:
            self.tiers.home.copy_(self.tiers.home[moved])
            if self.tiers.engine is not None:
                self.tiers.engine.reorder(self.tiers)
            try:
                for original, duplicate in zip(originals, duplicates, strict=True):
                    self.tiers.copy_sequence(self.pool, self.scales, self.table, original, duplicate)
            except TierError as error:  # some sequences are neither what they were nor what they were to be
                self.broken = error
                raise
        for tensor in self._selection_state():
            tensor.copy_(tensor[:, index])
        self.valid.copy_(self.valid[index])

    def suits(self, capacity: int) -> bool:
        """Whether the storage serves a new sequence of so many tokens: large enough, and no tiers if all would fit."""
        if self.capacity < capacity:
            return False
        return self.tiers is None or self._place is None or self._place(self.shape.batch_size, capacity) is not None

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all, by doubling; contents are kept. Not inside a compiled step."""
        if tokens <= self.capacity:
            return
        old = copy.copy(self)
        length, valid, scores, rows, counts = self.length, self.valid, self.scores, self.rows, self.counts
        old_capacity = self.capacity
        try:
            try:
                self._allocate(max(tokens, 2 * self.capacity))
            except InfeasibleError:  # twice as many do not fit the budgets; fewer may
                self._allocate(self._largest_capacity(tokens, 2 * self.capacity))
            everyone = list(range(self.shape.batch_size))
            self._take_hidden(old, everyone)
            self._take_rows(old, everyone, self.host_length)
        except BaseException:  # rows that could not be moved, or an interrupt while they were
            vars(self).update(vars(old))
            raise
        self._no_room = None
        self._counted = old.counters()
        self.length.copy_(length)
        self._set_origin(self.host_origin)
        self.valid[:, :old_capacity] = valid
        if scores is not None and rows is not None and counts is not None:
            self._carry_selection(scores, rows, counts, old_capacity)

    def _largest_capacity(self, least: int, most: int) -> int:
        """The largest capacity in [least, most) that the budgets allow; an `InfeasibleError` if there is none."""
        assert self._place is not None
        self._place(self.shape.batch_size, least)
        low, high = least, most
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._place(self.shape.batch_size, middle)
                low = middle
            except InfeasibleError:
                high = middle
        return low

    def _set_origin(self, tokens: int) -> None:
        self.host_origin = tokens
        if self.origin is not None:
            self.origin[0] = tokens

    def _carry_selection(
        self, scores: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, old_capacity: int
    ) -> None:
        assert self.scores is not None and self.rows is not None and self.counts is not None
        old_ring, ring = scores.shape[3], self.scores.shape[3]
        if ring == old_ring:
            self.scores[..., :old_capacity] = scores
        else:  # the ring of Algorithm 1: the j-th real token's row moves from j mod old to j mod new
            tokens = self.valid[:, : self.host_length].sum(-1)
            for sequence, count in enumerate(tokens.tolist()):
                ranks = torch.arange(max(0, count - old_ring), count, device=scores.device)
                source = scores[:, sequence, :, ranks % old_ring]
                self.scores[:, sequence, :, ranks % ring, :old_capacity] = source
        if rows.shape[-1] <= self.rows.shape[-1]:
            self.rows[..., : rows.shape[-1]] = rows
            self.counts.copy_(counts)
            return
        # Larger tables leave the device fewer rows, and the working sets are smaller now.
        assert self.selection is not None
        valid = self.valid if self.padded else None
        for layer, dense in enumerate((counts < 0).flatten(1).any(1).tolist()):
            if not dense:
                choose(self.scores, self.rows, self.counts, self.host_length, valid, layer, self.selection)

    @property
    def last_layer(self) -> int:
        """The layer whose append ends a step."""
        return self.shape.num_layers - 1

    def begin_step(self, new_tokens: int) -> None:
        """Host work before the ops of a forward pass run."""
        if self._in_step:  # the one before was interrupted where nobody could say so
            self.abort_step()
        if self.broken is not None:
            raise self.broken
        if self.host_length + new_tokens > self.capacity:
            if self._no_room is not None:
                raise self._no_room
            raise CacheError(
                "the cache is full",
                got=f"{self.host_length} tokens stored and {new_tokens} new ones",
                expected=f"at most {self.capacity} in all",
                fix=f"call cache.reserve({self.host_length + new_tokens}) before this forward pass, or pass a larger "
                "max_length when the cache is built",
            )
        if self.config.validate and not self.is_validated:
            raise NotAvailableError(
                "option 'validate' works in generate() of torch.compile(model, backend='alisa') alone",
                got=f"validate={self.config.validate} in another forward pass",
                fix="leave validate at its default (0) here",
            )
        hidden = None if self.tiers is None else self.tiers.hidden
        if hidden is not None and self.host_length + new_tokens > hidden.split:
            self._use_host_for_inputs()
        if new_tokens == 1:
            self._make_room()
        if self.tiers is not None and self.tiers.engine is not None:
            self.tiers.engine.begin_step(self.host_length + new_tokens, self._dense)
        if self.statistics.steps == 0:
            self.statistics.counters_before = self.counters()
        if new_tokens == 1 and not self.statistics.decode_ms:
            self.statistics.counters_after_prefill = self.counters()
        self._length_before = self.host_length
        self._in_step = True
        self._sparse_layers = 0
        self._stage = "decode" if new_tokens == 1 else "extend" if self.has_history else "prefill"
        if compat.profiler_is_on():
            self._profiled = torch.profiler.record_function(f"alisa {self._stage}")
            self._profiled.__enter__()
        self._step_started = time.perf_counter_ns()

    def _phase(self) -> str:
        if self.tiers is None or not bool(self.tiers.below.any()):
            return "I"
        hidden = self.tiers.hidden
        return "III" if hidden is not None and bool(hidden.deleted.any()) else "II"

    def counters(self) -> tuple[int, ...]:
        """What was moved, waited for and missed since the store was made, as in `COUNTERS`; waits for transfers."""
        if self.tiers is None:
            return self._counted
        drain(self.tiers)
        hidden = self.tiers.hidden
        down, up, *others = self.tiers.traffic.tolist()
        now = (down, up, *others, 0, 0)
        if hidden is not None:
            rebuilt = hidden.rows_recomputed, hidden.nanoseconds
            now = (down + hidden.bytes_down, up + hidden.bytes_up, *others, *rebuilt)
        return tuple(earlier + count for earlier, count in zip(self._counted, now, strict=True))

    @property
    def bytes_saved(self) -> int:
        """On the host, by the K and V that are deleted now, less what they are rebuilt from."""
        if self.tiers is None or self.tiers.hidden is None:
            return 0
        rows = int(self.tiers.hidden.deleted.sum()) * self.shape.batch_size * self.groups
        return max(0, rows * self.row.bytes_per_row - self.tiers.hidden.nbytes)

    def note_sparse_layers(self, count: int) -> None:
        """So many layers of this step attend to their working set; the report must not claim it of the others."""
        self._sparse_layers += count

    def end_step(self, new_tokens: int) -> None:
        """Host work after the ops of a forward pass: lengths, statistics, and room for one more token."""
        if self.disk is not None:
            try:
                self.disk.check()
            except TierError as error:
                self.broken = error
                raise
        self.host_length += new_tokens
        if not self.has_history or new_tokens > SPARSE_BLOCK:
            self._set_origin(self.host_length)
        self.has_history = True
        if self.selection is not None:  # the rule by which selection makes a layer's coming step dense
            step, refresh = self.host_length + 1 - self.host_origin, self.selection.is_refresh_step
            new = new_tokens if self.host_origin < self.host_length else 1
            self._dense = [refresh(step, layer, new) for layer in range(self.shape.num_layers)]
        self._in_step = False
        ended = time.perf_counter_ns()
        self._end_profiled()
        since = self.host_length - self.host_origin
        phase = self._phase()
        elapsed_ms = (ended - self._step_started) / 1e6
        self.statistics.note_step(new_tokens, self.host_length, since, self._sparse_layers, elapsed_ms, phase)
        if trace.active is not None:
            self._trace_step(trace.active, new_tokens, ended, phase)
        if self.host_length >= self.capacity:
            try:
                self.reserve(self.host_length + 1)
            except AlisaError as error:  # this step has its result; the next one, if there is one, cannot begin
                self._no_room = error.with_traceback(None)  # which would keep what was allocated before it

    def _end_profiled(self) -> None:
        if self._profiled is not None:
            self._profiled.__exit__(None, None, None)
            self._profiled = None

    def _trace_step(self, recording: trace.Recording, new_tokens: int, ended: int, phase: str) -> None:
        recording.span(
            "compute",
            f"alisa {self._stage}",
            self._step_started,
            ended,
            new_tokens=new_tokens,
            tokens=self.host_length,
            layers=self.shape.num_layers,
            sparse_layers=self._sparse_layers,
            phase=phase,
        )
        recording.samples.append(trace.Sample(ended, id(self), self.row_bytes_by_tier()))

    def abort_step(self) -> None:
        """A forward pass failed half-way: forget its tokens, and attend to everything in the next step.

        Layers that had finished hold a row too many, and a working set chosen for a token that is not there.
        """
        self.length.fill_(self.host_length)
        self.valid[:, self.host_length :] = True
        self.attend_to_all()
        self._in_step = False
        self._end_profiled()
        try:
            self._forget_from(self.host_length)
        except TierError as error:
            self.broken = error

    def attend_to_all(self) -> None:
        """Make the coming step dense, as a refresh would."""
        self._dense = [True] * self.shape.num_layers
        if self.counts is not None:
            self.counts.fill_(-1)

    def effective_sparsity(self) -> float:
        """Share of past rows that the coming step leaves out, averaged over layers, sequences and groups."""
        if self.counts is None or self.host_length == 0:
            return 0.0
        kept = torch.where(self.counts < 0, self.host_length + 1, self.counts).double().mean()
        return 1 - float(kept) / (self.host_length + 1)

    def sparsity_of_decode_steps(self) -> list[float]:
        """Share of rows left out in each decode step so far, averaged over layers; computed from the policy alone.

        Padding is not subtracted: in a padded batch the shorter rows keep a little less.
        """
        return [self._sparsity_at(*step) for step in self.statistics.decode_steps]

    def _sparsity_at(self, length: int, since: int, sparse_layers: int) -> float:
        if self.selection is None or since == 0:
            return 0.0
        layers = self.shape.num_layers
        dense = sum(self.selection.is_refresh_step(since, layer) for layer in range(layers))
        kept = self.selection.local_rows(length) + self.selection.dynamic_rows(length)
        return float(max(0, sparse_layers - dense) / layers * (1 - kept / length))


def _refuse_tiers(sizes: TierSizes, device: torch.device, capacity: int) -> None:
    """Raise if rows below a device of this kind cannot be served."""
    if device.type == "cpu":
        return
    fix = f"raise device_kv_budget, or {_LESS_MEMORY}"
    got = f"{capacity} tokens a sequence, {sizes.device} of which fit {device}"
    if device.type != "cuda":
        raise NotAvailableError(f"rows below the device are not available on {device.type}", got=got, fix=fix)
    if sizes.disk:
        more = f"raise host_kv_budget, {fix}"
        raise NotAvailableError("the disk tier is not available yet on a GPU", got=got, fix=more)
    if not is_installed():
        raise NotAvailableError(
            "rows below a GPU are moved by Triton kernels, and Triton is not installed",
            got=got,
            fix="pip install 'alisa-compile[gpu]'",
        )


def _move_rows(source: Pool, there: torch.Tensor, target: Pool, here: torch.Tensor, used: int) -> None:
    """Copy the first `used` positions `[..., C]` of one table to those of another, in the same order."""
    ops = torch.ops.alisa
    from_slots, to_slots = there[..., :used].reshape(-1), here[..., :used].reshape(-1)
    ops.scatter_rows(target.rows, to_slots, ops.gather_rows(source.rows, from_slots))
    if source.scales is not None and target.scales is not None:
        ops.scatter_rows(target.scales, to_slots, ops.gather_rows(source.scales, from_slots))
