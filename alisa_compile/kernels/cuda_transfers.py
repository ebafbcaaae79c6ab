"""Transfers between a CUDA device and pinned host memory: on a stream of their own, ordered by events.

Host code of a step knows only numbers (lengths, which layers are dense); which rows move is decided on the device and
stays there, so a steady step never waits for the device. Three orders matter, and each has its event:

- A transfer starts when the compute stream has come to its start: attention has read the slots that leave, and the
  tables say which rows move. `_start` lets the transfer stream wait for an event of the compute stream.
- A layer's append and attention come after its transfers: `wait` lets the compute stream wait for the layer's event.
- What a transfer reads must not be freed before: torch's allocator hands memory out again in the order of the stream
  that it was allocated on, so references are kept until the compute stream has been told to wait.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from alisa_compile.errors import NotAvailableError, TierError  # absolute: mypy also sees this folder as `kernels`

from .assign_slots.reference import assign_block

if TYPE_CHECKING:
    from .tiers import TierState

#: Rows `[N, 2, P, D]` and, of an int8 store, their scales `[N, 2, P]`.
Rows = tuple[torch.Tensor, "torch.Tensor | None"]
#: Arguments of `alisa::copy_rows`.
Copy = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Stream(Protocol):
    """What is used of a `torch.cuda.Stream`."""

    def record_event(self) -> Any:
        """An event that is reached when all work given to the stream so far has been done."""

    def wait_event(self, event: Any) -> None:
        """Let work given from now on wait for an event."""

    def synchronize(self) -> None:
        """Let the host wait for all work."""


class CudaStreams:
    """The streams of one device: the one that computes, and one for transfers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.transfers: Stream = torch.cuda.Stream(device)

    def compute(self) -> Stream:
        """The stream that operators are given to."""
        return torch.cuda.current_stream(self._device)

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        """Call a function whose operators go to a stream; what they allocate belongs to it."""
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            work()


class HostMemory:
    """A host pool, pinned, as tensors of the device that share its memory: rows `[N, 2, P, D]`, scales `[N, 2, P]`."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor | None, device: torch.device) -> None:
        self._unpin: list[weakref.finalize[Any, Any]] = []
        self.pool: Rows = (self._alias(rows, device), None if scales is None else self._alias(scales, device))

    def _alias(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        with torch.cuda.device(device):
            # Not `pin_memory`: torch's allocator of pinned memory rounds up to a power of two.
            cudart = torch.cuda.cudart()
            status = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
            if int(status) != 0:
                raise TierError(
                    "the host tier cannot be pinned",
                    got=f"CUDA error {int(status)} for {tensor.nbytes} bytes",
                    fix="set a lower host_kv_budget, or raise the limit on locked memory (ulimit -l)",
                )
            # The finaliser's reference keeps the memory until it is no longer pinned.
            self._unpin.append(weakref.finalize(self, _unregister, cudart, tensor, device))
            alias = torch.as_tensor(_ByAddress(tensor), device=device)
        if alias.data_ptr() != tensor.data_ptr():
            raise NotAvailableError(
                "this GPU cannot read host memory in place",
                got=f"{device}, without unified addressing of pinned memory",
                fix="raise device_kv_budget until all rows fit the device",
            )
        return alias.view(tensor.dtype).view(tensor.shape)

    def release(self) -> None:
        """Unpin the memory; its tensors on the device are void from then on."""
        for unpin in self._unpin:
            unpin()


class _ByAddress:
    """Tells torch to take memory for a device's, by the address under which the device sees it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _unregister(cudart: Any, tensor: torch.Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a transfer may still run
    cudart.cudaHostUnregister(tensor.data_ptr())


@dataclasses.dataclass
class _Pending:
    """A layer's transfers that the compute stream has not been told to wait for."""

    event: Any = None
    kept: list[torch.Tensor | None] = dataclasses.field(default_factory=list)


class TransferEngine:
    """Moves the rows of one store's tiers. Used by the ops where `TierState.engine` is one.

    tokens: positions stored in a layer once it has appended; dense: by layer, whether the step attends to all rows.
    Both are known to the host, and the store says them before each step.
    """

    def __init__(self, state: TierState, device: torch.device) -> None:
        self.tokens = 0
        self.dense = [True] * state.below.shape[0]
        self._reserved = [-1] * state.below.shape[0]  # by layer, the coming token that has a slot
        self._device = device
        self._streams = CudaStreams(device)
        self._memory = HostMemory(state.host, state.host_scales, device)
        self._host: Rows = self._memory.pool
        self._pending: dict[int, _Pending] = {}
        self._entered = torch.zeros(2, dtype=torch.int64, device=device)  # rows fetched, and that found no slot
        self._read = torch.zeros(2, dtype=torch.int64, device=device)  # rows read from the host by attention
        self.reorder(state)

    # What the host knows.

    def reorder(self, state: TierState) -> None:
        """Take over which parts of the tiers belong to which sequence, after it has changed."""
        regions = [state.regions(layer) for layer in range(state.below.shape[0])]
        self._regions = torch.stack(regions).to(self._device)  # [L, B, G]

    def layers_without_room(self) -> list[int]:
        """Layers that have not kept a slot for the coming token, number `tokens`."""
        return [layer for layer, token in enumerate(self._reserved) if token != self.tokens]

    def begin_step(self, tokens: int, dense: list[bool]) -> None:
        """Take over what the store knows of the coming step."""
        self.tokens, self.dense = tokens, list(dense)

    def forget(self) -> None:
        """Slots have been taken away: what is known of coming tokens is void."""
        self._reserved = [-1] * len(self._reserved)

    # Streams.

    def _start(self, layer: int, work: Callable[[], None], *tensors: torch.Tensor | None) -> None:
        """Give work on tensors of the compute stream to that of transfers, when the former has come to here."""
        pending = self._pending.setdefault(layer, _Pending())
        stream = self._streams.transfers
        stream.wait_event(self._streams.compute().record_event())
        self._streams.launch(stream, work)
        pending.kept += tensors
        pending.event = stream.record_event()

    def wait(self, layer: int) -> None:
        """Let what the compute stream is given from now on come after the layer's transfers."""
        pending = self._pending.pop(layer, None)
        if pending is not None:
            self._streams.compute().wait_event(pending.event)

    def _wait_for_all(self) -> None:
        for layer in list(self._pending):
            self.wait(layer)

    def drain(self) -> tuple[int, int]:
        """Let the host wait until all transfers have ended.

        Returns how many rows have gone up since the last call, and how many of them attention had to fetch because they
        had found no slot.
        """
        self._wait_for_all()
        self._streams.compute().synchronize()
        (fetched, _), (streamed, missed) = self._entered.tolist(), self._read.tolist()
        self._entered.zero_()
        self._read.zero_()
        return fetched + streamed + missed, missed

    def close(self) -> None:
        """Unpin the host's memory, when all transfers have ended."""
        self._wait_for_all()
        self._streams.compute().synchronize()
        self._memory.release()

    # Rows.

    @staticmethod
    def _copies(
        source: Rows,
        source_slots: torch.Tensor,
        target: Rows,
        target_slots: torch.Tensor,
    ) -> list[Copy]:
        """Arguments of `copy_rows` for rows and, if the store has them, scales."""
        source_slots, target_slots = source_slots.reshape(-1), target_slots.reshape(-1)
        parts: list[Copy] = [(source[0], source_slots, target[0], target_slots)]
        if source[1] is not None and target[1] is not None:
            parts.append((source[1], source_slots, target[1], target_slots))
        return parts

    def _ring_slots(self, state: TierState, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Where the host has positions `[B, G, K]`; -1 for those below 0."""
        slots = self._regions[layer].unsqueeze(-1) * state.ring + positions % max(1, state.ring)
        return torch.where(positions < 0, -1, slots)

    def offload(
        self,
        state: TierState,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        layer: int,
        first: int,
        end: int,
    ) -> None:
        """Start to write the rows of the positions [first, end) to the host."""

        def work() -> None:
            _copy(self._down(state, (pool, scales), table[layer, :, :, first:end], layer, first))

        self._start(layer, work, pool, scales, table)

    def _down(
        self,
        state: TierState,
        source: Rows,
        slots: torch.Tensor,
        layer: int,
        first: int,
    ) -> list[Copy]:
        """The copies of rows in slots `[B, G, K]` of a source to the host, as the positions from `first` on."""
        end = first + slots.shape[-1]
        positions = torch.arange(first, end, device=self._device).expand(slots.shape)
        state.note_below(layer, end)
        return self._copies(source, slots, self._host, self._ring_slots(state, layer, positions))

    def prefetch(
        self,
        state: TierState,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        rows: torch.Tensor | None,
        counts: torch.Tensor | None,
        layer: int,
    ) -> None:
        """Start to fetch what the coming working set lacks; see `kv_prefetch`."""
        below = int(state.below[layer])

        def work() -> None:
            slots, positions = torch.ops.alisa.assign_slots(
                table, state.owner, self._entered, self._regions, rows, counts, layer, self.tokens, below
            )
            if rows is not None:
                _copy(self._copies(self._host, self._ring_slots(state, layer, positions), (pool, scales), slots))

        self._start(layer, work, pool, scales, table, rows, counts)
        self._reserved[layer] = self.tokens

    def place(
        self,
        state: TierState,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        layer: int,
        start: int,
        rows: torch.Tensor,
        row_scales: torch.Tensor | None,
        first: int,
    ) -> None:
        """`place_rows` with its first position that stays on the device; in the order of the compute stream."""
        self._wait_for_all()
        below, tokens = int(state.below[layer]), rows.shape[2]
        kept, end = max(start, first), start + tokens
        own = (rows.flatten(0, 2), None if row_scales is None else row_scales.flatten(0, 2))
        own_slots = torch.arange(math.prod(rows.shape[:3]), device=self._device).view(rows.shape[:3])
        copies: list[Copy] = []
        if below < min(first, start):
            slots = table[layer, :, :, below : min(first, start)].clone()
            copies += self._down(state, (pool, scales), slots, layer, below)
        if start < kept:
            copies += self._down(state, own, own_slots[..., : kept - start], layer, start)
        assign_block(table, state.owner, self._regions, layer, start, kept, end, first)
        _copy(
            [*copies, *self._copies(own, own_slots[..., kept - start :], (pool, scales), table[layer, :, :, kept:end])]
        )

    def load(
        self,
        state: TierState,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        layer: int,
        positions: torch.Tensor,
        target: Rows,
        *,
        missed: bool = False,
    ) -> None:
        """Rows of positions `[B, G, K]` wherever they are, to the first slots of `target`; none for those below 0.

        In the order of the compute stream, after the layer's transfers. missed: those on the host had found no slot.
        """
        self.wait(layer)
        slots = table[layer].gather(-1, positions.clamp_min(0).long())
        away = (slots < 0) & (positions >= 0)
        self._read[int(missed)] += away.sum()
        here = torch.arange(positions.numel(), device=self._device)
        ring = self._ring_slots(state, layer, torch.where(away, positions, -1))
        resident = torch.where(positions < 0, -1, slots)
        _copy(self._copies((pool, scales), resident, target, here))
        _copy(self._copies(self._host, ring, target, here))

    def working_set(
        self,
        state: TierState,
        pool: torch.Tensor,
        scales: torch.Tensor | None,
        table: torch.Tensor,
        rows: torch.Tensor,
        counts: torch.Tensor,
        layer: int,
    ) -> Rows:
        """All rows of a working set `rows [L, B, G, W]`, packed: `[B * G * W, 2, P, D]` and scales, in that order."""
        chosen = torch.arange(rows.shape[-1], device=self._device) < counts[layer].unsqueeze(-1)
        positions = torch.where(chosen, rows[layer], -1)
        packed = pool.new_empty((positions.numel(), *pool.shape[1:]))
        packed_scales = None if scales is None else scales.new_empty((positions.numel(), *scales.shape[1:]))
        self.load(state, pool, scales, table, layer, positions, (packed, packed_scales), missed=True)
        return packed, packed_scales


def _copy(copies: list[Copy]) -> None:
    for arguments in copies:
        torch.ops.alisa.copy_rows(*arguments)
