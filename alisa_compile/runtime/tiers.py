"""Tiers, row forms, pools and residency tables: the vocabulary of where a KV row is."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import mmap

import torch

_HUGE_PAGE = 1 << 21


class Tier(enum.Enum):
    """A place where rows can live."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class RowForm(enum.Enum):
    """How a row is encoded in its slot."""

    KV = "kv"
    KV_INT8 = "kv_int8"


@dataclasses.dataclass(frozen=True)
class RowShape:
    """What one slot holds: K and V of one token for `heads_per_slot` KV heads.

    Stored contiguously as `[K|V, heads_per_slot, head_dim]`; `kv_int8` adds `[K|V, heads_per_slot]` float32 scales.
    """

    heads_per_slot: int
    head_dim: int
    dtype: torch.dtype
    form: RowForm

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the pool."""
        return torch.int8 if self.form is RowForm.KV_INT8 else self.dtype

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one slot, scales included."""
        values = 2 * self.heads_per_slot * self.head_dim * self.stored_dtype.itemsize
        scales = 2 * self.heads_per_slot * torch.float32.itemsize if self.form is RowForm.KV_INT8 else 0
        return values + scales


@dataclasses.dataclass(frozen=True)
class TierSizes:
    """Positions of each (layer, sequence, group) that the tiers of a store hold, and that are staged at a time.

    device: slots, the coming token's included. host, disk: together they take whatever the device does not keep.
    staging: positions of one layer that stream through the device at a time. max_rows: cap on the working set that the
    device's budget forces; None = none beside the option's. deleted: so many first positions have their layer inputs,
    of width hidden_size, saved on the host, and lose K and V when the host is full. shared_until: the host's rows lie
    where layer inputs come once there are more tokens than that, and are then deleted; 0 = they have room of their own.
    """

    device: int
    host: int
    disk: int
    staging: int
    max_rows: int | None = None
    deleted: int = 0
    hidden_size: int = 0
    shared_until: int = 0


@dataclasses.dataclass
class Pool:
    """Fixed-capacity storage of one row form in one tier, shared by all layers and sequences of a store."""

    tier: Tier
    shape: RowShape
    rows: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def allocate(cls, tier: Tier, shape: RowShape, num_slots: int, device: torch.device) -> Pool:
        """`rows [N, 2, P, D]`, `scales [N, 2, P]`; zeroed, so that a dense read of unwritten positions is finite."""
        rows = _zeros((num_slots, 2, shape.heads_per_slot, shape.head_dim), shape.stored_dtype, device)
        scales = None
        if shape.form is RowForm.KV_INT8:
            scales = _zeros((num_slots, 2, shape.heads_per_slot), torch.float32, device)
        return cls(tier, shape, rows, scales)

    @property
    def num_slots(self) -> int:
        """Slots in the pool."""
        return self.rows.shape[0]


def identity_table(num_layers: int, batch_size: int, groups: int, capacity: int, device: torch.device) -> torch.Tensor:
    """A residency table `[L, B, G, C]` int32 in which each (layer, sequence, group) has a quota of C slots in order."""
    count = num_layers * batch_size * groups * capacity
    slots = torch.arange(count, dtype=torch.int32, device=device)
    return slots.view(num_layers, batch_size, groups, capacity)


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux to back a tensor that nothing has touched yet with huge pages; elsewhere, and if refused, do nothing.

    Rows are read in no order, and with small pages a row costs a page walk as well.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        advise_huge_pages(tensor)
    return tensor.zero_()
