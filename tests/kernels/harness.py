"""Drives the ops through a token store as a model would, and the naive attention to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from alisa_compile import kernels  # noqa: F401  (registers the ops)
from alisa_compile.config import AlisaConfig
from alisa_compile.kernels.quantize_row import quantize_row
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes

ops = torch.ops.alisa


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Shape of attention."""

    query: int = 4
    kv: int = 2
    dim: int = 16

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return 1 / math.sqrt(self.dim)


@dataclasses.dataclass
class Block:
    """Query, key and value of T new tokens in every layer: `[L, B, heads, T, D]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def tokens(self) -> int:
        """How many new tokens."""
        return self.query.shape[3]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key, value `[B, heads, T, D]` of one layer."""
        return self.query[layer], self.key[layer], self.value[layer]


def random_block(
    generator: torch.Generator,
    heads: Heads,
    tokens: int,
    *,
    layers: int = 1,
    batch: int = 1,
    dtype: torch.dtype,
) -> Block:
    """Random rows, laid out as models make them: `[B, T, heads, D]` transposed."""

    def draw(count: int) -> torch.Tensor:
        states = torch.randn((layers, batch, tokens, count, heads.dim), generator=generator, dtype=torch.float64)
        return states.to(dtype).transpose(2, 3)

    return Block(draw(heads.query), draw(heads.kv), draw(heads.kv))


class Driver:
    """A store and the op sequence of a model that attends through it."""

    def __init__(
        self,
        heads: Heads,
        *,
        capacity: int,
        layers: int = 1,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        sizes: TierSizes | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.heads, self.soft_cap = heads, 0.0  # of the scores; 0 = none
        shape = StoreShape(layers, batch, heads.kv, heads.dim, dtype, torch.device(device))
        self.store = TokenStore(shape, AlisaConfig(**options), capacity, lambda *_: sizes)

    def permute_slots(self, generator: torch.Generator) -> None:
        """Give every position another slot; only allowed while the store is empty."""
        table = self.store.table
        order = torch.randperm(table.numel(), generator=generator).to(table.dtype)
        table.copy_(order.view(table.shape))

    def poison(self) -> None:
        """Fill rows never written with NaN (with the extreme code and a NaN scale in an int8 store)."""
        store = self.store
        unused = store.table[..., store.host_length :].reshape(-1).long()
        if store.scales is not None:
            store.pool[unused] = 127
            store.scales[unused] = float("nan")
        else:
            store.pool[unused] = float("nan")

    def append(self, block: Block, layer: int, mask: torch.Tensor | None = None) -> None:
        """`kv_append` of one layer, quantised if the store is."""
        store, (_, key, value) = self.store, block.layer(layer)
        key_scale = value_scale = None
        if store.is_int8:
            key, key_scale = quantize_row(key)
            value, value_scale = quantize_row(value)
        arguments = (
            store.pool, store.scales, store.table, store.length, store.valid, key, value, key_scale,
            value_scale, mask, layer,
        )  # fmt: skip
        if store.tiers is None:
            ops.kv_append(*arguments)
            return
        ops.kv_wait(store.pool, store.ticket, key, layer)
        if block.tokens == 1 and store.has_history:
            ops.kv_append(*arguments)
        else:
            ops.kv_append.tiered(*arguments, store.spec, store.ticket)

    def attend(
        self, block: Block, layer: int, mask: torch.Tensor | None = None, *, dense: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention op that fits the block: decode, prefill or extend. dense: without the working set."""
        store, (query, key, value), scale = self.store, block.layer(layer), self.heads.scale
        cap = (self.soft_cap,) if self.soft_cap else ()
        valid = None if mask is None else store.valid
        if block.tokens == 1 and store.has_history:
            rows, counts = (None, None) if dense else (store.rows, store.counts)
            op = ops.swa_attention.default if store.tiers is None else ops.swa_attention.tiered
            return op(
                query, store.pool, store.scales, store.table, store.length, valid, rows, counts, layer, scale,
                *self._ticket(), *cap,
            )  # fmt: skip
        if not store.has_history:
            return ops.prefill_attention(query, key, value, mask, store.groups, store.spec, scale, *cap)
        op = ops.extend_attention.default if store.tiers is None else ops.extend_attention.tiered
        return op(
            query, store.pool, store.scales, store.table, store.length, valid, store.rows, store.counts, layer,
            store.spec, scale, *self._ticket(), *cap,
        )  # fmt: skip

    def _ticket(self) -> tuple[torch.Tensor, ...]:
        return () if self.store.ticket is None else (self.store.ticket,)

    def move(self, layer: int) -> None:
        """`kv_offload` and `kv_prefetch`, where the store has tiers."""
        store = self.store
        if store.tiers is None:
            return
        rows = (store.pool, store.scales, store.table, store.length)
        ops.kv_offload(*rows, store.ticket, layer, store.spec)
        ops.kv_prefetch(*rows, store.rows, store.counts, store.ticket, layer)

    def select(self, block: Block, layer: int, mass: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """`kv_select` after a decode step, `kv_seed` after a block."""
        store = self.store
        assert store.scores is not None and store.rows is not None and store.counts is not None
        valid = None if mask is None else store.valid
        state = (store.scores, store.rows, store.counts, mass, store.length, store.origin, valid)
        if block.tokens == 1 and store.has_history:
            ops.kv_select(*state, layer, store.spec)
        else:
            ops.kv_seed(*state, block.tokens, layer, store.spec)

    def forward(self, block: Block, mask: torch.Tensor | None = None) -> torch.Tensor:
        """All layers of a forward pass, `[L, B, Hq, T, D]`; mask: `[B, tokens with these]`, 0 = padding."""
        outputs = []
        self.store.begin_step(block.tokens)
        for layer in range(self.store.shape.num_layers):
            self.append(block, layer, mask)
            out, mass = self.attend(block, layer, mask)
            if self.store.spec:
                self.select(block, layer, mass, mask)
            self.move(layer)
            outputs.append(out)
        self.store.end_step(block.tokens)
        return torch.stack(outputs)

    def working_set(self, layer: int = 0, sequence: int = 0, group: int = 0) -> list[int] | None:
        """Positions of the coming step in the stored order; None = all."""
        assert self.store.rows is not None and self.store.counts is not None
        count = int(self.store.counts[layer, sequence, group])
        return None if count < 0 else self.store.rows[layer, sequence, group, :count].tolist()

    def set_working_set(self, positions: list[list[list[int]]], garbage: int, layer: int = 0) -> None:
        """Write `positions[sequence][group]` by hand; entries past the count become `garbage`."""
        assert self.store.rows is not None and self.store.counts is not None
        self.store.rows[layer] = garbage
        for sequence, groups in enumerate(positions):
            for group, chosen in enumerate(groups):
                self.store.rows[layer, sequence, group, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
                self.store.counts[layer, sequence, group] = len(chosen)


def naive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attended: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query row `[Hq, D]` over `attended` positions of `[Hkv, T, D]`, head by head in float64.

    Returns the output `[Hq, D]` and the weights `[Hq, len(attended)]`.
    """
    query, key, value = query.double(), key.double(), value.double()
    ratio = query.shape[0] // key.shape[0]
    outputs, weights = [], []
    for head in range(query.shape[0]):
        keys, values = key[head // ratio][attended], value[head // ratio][attended]
        row = torch.softmax((keys @ query[head]) * scale, dim=0)
        weights.append(row)
        outputs.append((row.unsqueeze(1) * values).sum(0))
    return torch.stack(outputs), torch.stack(weights)


def naive_capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attended: list[int], scale: float, soft_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with soft-capped scores, number by number."""
    outputs, weights = [], []
    for head in range(query.shape[0]):
        kv_head = head // (query.shape[0] // key.shape[0])
        scores = [float(key[kv_head, position].double() @ query[head].double()) * scale for position in attended]
        shares = [math.exp(soft_cap * math.tanh(score / soft_cap)) for score in scores]
        row = torch.tensor(shares, dtype=torch.float64) / sum(shares)
        weights.append(row)
        outputs.append(row @ value[kv_head][attended].double())
    return torch.stack(outputs), torch.stack(weights)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal within what `dtype` can hold."""
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


def stored_rows(driver: Driver, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[Hkv, length, D]` float64 of one sequence, slot by slot through the table, scaled by hand."""
    store = driver.store
    tokens = int(store.length[layer])
    out = torch.zeros((2, store.shape.kv_heads, tokens, store.shape.head_dim), dtype=torch.float64)
    per_slot = store.shape.kv_heads // store.groups
    for group in range(store.groups):
        for position in range(tokens):
            slot = int(store.table[layer, sequence, group, position])
            for head in range(per_slot):
                for part in range(2):
                    row = store.pool[slot, part, head].double()
                    if store.scales is not None:
                        row = row * store.scales[slot, part, head].double()
                    out[part, group * per_slot + head, position] = row
    return out[0], out[1]
