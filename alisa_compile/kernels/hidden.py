"""Layer inputs of the oldest tokens, from which their K and V are made again once these have been deleted.

They are written when their token is produced, because nothing could make them later. Positions [0, deleted) of a layer
have no K and V below the device; who needs one of them asks here, and gets what the layer's producer makes of the saved
input and the token's own position.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from alisa_compile.errors import CacheError, TierError  # absolute: mypy also sees this folder as `kernels`

from .quantize_row.op import dequantize_row, quantize_row

#: Rebuilt and stored rows of the same token may differ by rounding alone, relative to the largest element.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.int8: 5e-2}


class Producer(Protocol):
    """Makes K and V of one layer: hidden `[B, T, hidden]` and positions `[B, T]` to `[B, Hkv, T, D]`, any T.

    batch_size: B, of whatever sequences. shares_positions: the tokens of a column must have the same position.
    """

    batch_size: int

    @property
    def shares_positions(self) -> bool:
        """See above."""

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V."""


@dataclasses.dataclass(eq=False)
class Pending:
    """Rows that have slots on the device and no content yet: sequence and position of each, its group and its slot."""

    sequences: torch.Tensor
    positions: torch.Tensor
    groups: torch.Tensor
    slots: torch.Tensor


@dataclasses.dataclass(eq=False)
class HiddenRows:
    """Saved layer inputs of the first `most` positions of every layer and sequence.

    rows: `[L * B * most, hidden]` on the host, int8 with scales `[L * B * most]` float32, or in the dtype of the model
    and None; those of the positions from `split` on come last, where before they are saved others may use the memory
    (`room`). positions: `[B, >= most]` int32, what the model calls the position of each token. saved, deleted: `[L]`
    int64, so many first positions have their layer input here, and have lost their K and V. dtype: of the model. A
    sequence is its part of the tiers (`TierState.home`), not its place in the batch. producers: by layer; pending: by
    layer, rows that the coming step waits for. unverified: by layer, positions whose K and V are to be compared with
    rebuilt ones when they go below the device; stages: by layer, for which kinds of forward pass (of one token, of
    several) one has been chosen since the producer was bound. bytes_down, bytes_up: of layer inputs.
    """

    most: int
    split: int
    rows: torch.Tensor
    scales: torch.Tensor | None
    positions: torch.Tensor
    saved: torch.Tensor
    deleted: torch.Tensor
    dtype: torch.dtype
    producers: dict[int, Producer] = dataclasses.field(default_factory=dict)
    pending: dict[int, Pending] = dataclasses.field(default_factory=dict)
    unverified: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    stages: dict[int, set[bool]] = dataclasses.field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    rows_recomputed: int = 0
    nanoseconds: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether rows use the memory of late layer inputs until these come."""
        return self.split < self.most

    @property
    def batch_size(self) -> int:
        """B."""
        return self.positions.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one layer input."""
        return self.rows[:1].nbytes + (0 if self.scales is None else self.scales[:1].nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer inputs, on the host."""
        return self.rows.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def device_nbytes(self) -> int:
        """Bytes of what is kept about them, which counts as on the device."""
        return self.positions.nbytes + self.saved.nbytes + self.deleted.nbytes

    def bind(self, producers: Mapping[int, Producer]) -> None:
        """Use these from now on."""
        self.producers.update(producers)
        for layer in producers:
            self.stages[layer] = set()

    def append(
        self, layer: int, start: int, hidden: torch.Tensor, positions: torch.Tensor | None, home: torch.Tensor
    ) -> int:
        """Save layer inputs `[B, T, hidden]` of the positions from `start` on, as far as they are kept; bytes saved.

        positions: `[B, T]` or `[1, T]`, or None where K does not depend on them.
        """
        end = min(self.most, start + hidden.shape[1])
        if start >= end:
            return 0
        if int(self.saved[layer]) < start:
            raise CacheError(
                "layer inputs of earlier tokens were not saved",
                got=f"{int(self.saved[layer])} of {start} tokens",
                fix="feed all tokens of this cache through the compiled model, or set recompute='off'",
            )
        index = self._index(layer, home[:, None], torch.arange(start, end))
        kept = hidden[:, : end - start].to(self.rows.device)
        if self.scales is not None:
            self.rows[index], self.scales[index] = quantize_row(kept)
        else:
            self.rows[index] = kept
        if positions is not None:
            self.positions[home, start:end] = positions[:, : end - start].to(self.positions).expand(len(home), -1)
        self.saved[layer] = end
        single = hidden.shape[1] == 1
        if layer in self.producers and single not in self.stages[layer]:
            self.stages[layer].add(single)
            self.unverified.setdefault(layer, []).append(end - 1)
        nbytes = index.numel() * self.row_bytes
        self.bytes_down += nbytes
        return nbytes

    def _index(self, layer: int, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        part = layer * self.batch_size + sequences
        early = part * self.split + positions
        if self.split == self.most:
            return early
        late = self._first_late + part * (self.most - self.split) + positions - self.split
        return torch.where(positions < self.split, early, late)

    @property
    def _first_late(self) -> int:
        return len(self.saved) * self.batch_size * self.split

    def room(self, slots: int, row: torch.Size) -> torch.Tensor:
        """Memory `[slots, *row]` that the layer inputs of the positions from `split` on will need."""
        return self.rows[self._first_late :].view(-1)[: slots * row.numel()].view(slots, *row)

    def may_delete(self, layer: int, end: int) -> int:
        """How many of the first `end` positions can be had again without their K and V."""
        return min(end, self.most, int(self.saved[layer]))

    def require_saved(self, kept: range) -> None:
        """Refuse to write rows to disk that the plan has no room for there, because they were to be deleted."""
        if kept and kept.start < self.most:
            raise CacheError(
                "rows that the plan deletes cannot be deleted: their layer inputs were not saved",
                got=f"positions {kept.start} to {kept.stop - 1}",
                fix="feed all tokens of this cache through the compiled model, or set recompute='off'",
            )

    def forget_from(self, length: int) -> None:
        """Positions from `length` on are gone."""
        self.saved.clamp_(max=length)
        self.deleted.clamp_(max=length)
        self.pending.clear()
        for positions in self.unverified.values():
            positions[:] = [p for p in positions if p < length]

    def rebuild(
        self, layer: int, wanted: Pending, heads: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make the rows `[K, 2, P, D]` with P = heads, and scales `[K, 2, P]` where rows are int8, in one batch."""
        began, count = time.perf_counter_ns(), len(wanted.positions)
        if bool(wanted.groups.any()):  # several may want the same token
            tokens, which = torch.unique(wanted.sequences * self.most + wanted.positions, return_inverse=True)
            key, value = self._make(layer, tokens // self.most, tokens % self.most, device)
            rows = self._as_rows(key, value, heads)[which, wanted.groups]
        else:
            key, value = self._make(layer, wanted.sequences, wanted.positions, device)
            rows = self._as_rows(key, value, heads)[:, 0]
        self.rows_recomputed += count
        self.bytes_up += count * self.row_bytes
        made = (rows, None) if self.scales is None else quantize_row(rows)
        self.nanoseconds += time.perf_counter_ns() - began
        return made

    def _as_rows(self, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
        """K and V `[K, Hkv, D]` as `[K, G, 2, P, D]`."""
        both = torch.stack((key, value), 1)
        return both.view(*both.shape[:2], -1, heads, both.shape[3]).transpose(1, 2)

    def _make(
        self, layer: int, sequences: torch.Tensor, positions: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[K, Hkv, D]` in one batch, whatever sequences the tokens are of."""
        producer = self.producers.get(layer)
        if producer is None:
            raise TierError(
                "K and V of deleted rows cannot be rebuilt",
                got=f"layer {layer} without the part of the model that makes them",
                fix="feed the prompt through the compiled model first, or set recompute='off'",
            )
        index, count = self._index(layer, sequences, positions), len(positions)
        hidden = self.rows[index]
        if self.scales is not None:
            hidden = dequantize_row(hidden, self.scales[index], self.dtype)
        hidden, at = hidden.to(device), self.positions[sequences, positions].long().to(device)
        batch = producer.batch_size
        if producer.shares_positions:  # a column for each token
            key, value = producer(hidden.expand(batch, -1, -1), at.expand(batch, -1))
            return key[0].transpose(0, 1), value[0].transpose(0, 1)
        columns = -(-count // batch)
        cells = torch.arange(batch * columns, device=device).clamp_max(count - 1).view(batch, columns)
        key, value = producer(hidden[cells], at[cells])
        key, value = (part.transpose(1, 2).flatten(0, 1)[:count] for part in (key, value))
        return key, value

    def verify(
        self, layer: int, first: int, rows: torch.Tensor, scales: torch.Tensor | None, home: torch.Tensor
    ) -> None:
        """Compare rows that go below the device with what their producer makes, where that has made none like them yet.

        rows: `[B, G, K, 2, P, D]`, scales: `[B, G, K, 2, P]` or None, of the positions from `first` on.
        """
        due = [p for p in self.unverified.get(layer, ()) if first <= p < first + rows.shape[2]]
        for position in due:
            self.unverified[layer].remove(position)
            own = rows[:, :, position - first]
            if scales is not None:
                own = dequantize_row(own, scales[:, :, position - first], self.dtype)
            key, value = self._make(layer, home, torch.full_like(home, position), own.device)
            error = (self._as_rows(key, value, own.shape[3]) - own).abs().amax() / own.abs().amax().clamp_min(1e-30)
            limit = _TOLERANCE[rows.dtype]
            if not error <= limit:
                raise TierError(
                    f"K and V of layer {layer} are not what is rebuilt from its input",
                    got=f"a relative difference of {float(error):.2g} at position {position}",
                    expected=f"at most {limit}",
                    fix="set recompute='off' for this model, and please report its class",
                )

    def take(self, source: HiddenRows, index: list[int], home: torch.Tensor, used: int) -> None:
        """Copy what `source` has of the first `used` positions of its sequences `index`, those of `home` there."""
        end = min(used, self.most)
        if end > source.most:
            raise CacheError(
                "this cache cannot grow: layer inputs of some tokens were not saved",
                got=f"{source.most} tokens with saved inputs",
                expected=f"{end}",
                fix="set max_length to the most tokens that the cache will hold",
            )
        sequences = home[index]
        for layer in range(len(self.saved)):
            theirs = source._index(layer, sequences[:, None], torch.arange(end))
            mine = self._index(layer, torch.arange(len(index))[:, None], torch.arange(end))
            self.rows[mine] = source.rows[theirs]
            if self.scales is not None and source.scales is not None:
                self.scales[mine] = source.scales[theirs]
        self.positions[:, :end] = source.positions[sequences, :end]
        self.saved.copy_(source.saved.clamp_max(end))
        self.producers, self.stages = dict(source.producers), {layer: set(k) for layer, k in source.stages.items()}
        self.unverified = {layer: list(positions) for layer, positions in source.unverified.items()}

    def copy_sequence(self, here: int, there: int) -> None:
        """Let part `there` hold what part `here` does."""
        for layer, saved in enumerate(self.saved.tolist()):
            mine, theirs = (self._index(layer, torch.tensor(part), torch.arange(saved)) for part in (there, here))
            self.rows[mine] = self.rows[theirs]
            if self.scales is not None:
                self.scales[mine] = self.scales[theirs]
        self.positions[there] = self.positions[here]
