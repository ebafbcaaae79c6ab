"""Attention over rows that come in blocks, merged by log-sum-exp: no more than a block is on the device at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from alisa_compile.compat import attention_with_lse  # absolute: mypy also sees this folder as `kernels`

from .capped_attention import soft_capped
from .selection import last_queries

Block = tuple[int, int]
#: K and V `[B, Hkv, K, D]` of the positions [first, end).
Read = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

_MASS_ELEMENTS = 1 << 20  # logits of a block of query rows; several passes go over them


def decode_in_blocks(
    query: torch.Tensor,
    read: Read,
    blocks: list[Block],
    valid: torch.Tensor | None,
    scale: float,
    dtype: torch.dtype,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query row `[B, Hq, 1, D]` over all blocks: its output, and its attention weights `[B, Hq, T]` of `dtype`.

    valid: `[B, T]` or None. soft_cap: as in `swa_attention`.
    """
    batch, heads, _, head_dim = query.shape
    tokens = blocks[-1][1]
    logits = torch.empty((batch, heads, tokens), dtype=dtype, device=query.device)
    summed = torch.zeros((batch, heads, head_dim), dtype=dtype, device=query.device)
    largest = torch.full((batch, heads), float("-inf"), dtype=dtype, device=query.device)
    for first, end in blocks:
        key, value = read(first, end)
        packed = query.reshape(batch, key.shape[1], -1, head_dim)
        block = soft_capped((packed @ key.transpose(-1, -2)).to(dtype).mul_(scale), soft_cap)
        block = block.reshape(batch, heads, -1)
        if valid is not None:
            block.masked_fill_(~valid[:, None, first:end], float("-inf"))
        logits[..., first:end] = block
        peak = torch.maximum(largest, block.amax(-1))
        safe = torch.where(peak == float("-inf"), 0, peak)  # nothing attended so far
        weights = (block - safe.unsqueeze(-1)).exp_().to(query.dtype)
        added = weights.reshape(batch, key.shape[1], -1, end - first) @ value
        summed.mul_((largest - safe).exp_().unsqueeze(-1)).add_(added.reshape(batch, heads, head_dim))
        largest = peak
    weights = logits.softmax(-1).nan_to_num_(0.0)  # a sequence that attends to nothing gets zeros
    total = (logits - torch.where(largest == float("-inf"), 0, largest).unsqueeze(-1)).exp_().sum(-1, keepdim=True)
    return (summed / total.masked_fill(total == 0, 1)).to(query.dtype).unsqueeze(2), weights


def attend_in_blocks(
    query: torch.Tensor,
    read: Read,
    blocks: list[Block],
    valid: torch.Tensor | None,
    start: int,
    scale: float,
    dtype: torch.dtype,
    soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T query rows `[B, Hq, T, D]` at the positions from `start` on, causally: output and log-sum-exp `[B, Hq, T]`.

    blocks: none reaches across `start`. valid: `[B, start + T]` or None; a query row before which there is no valid
    position attends to itself alone.
    """
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:3], float("-inf"), dtype=dtype, device=query.device)
    for first, end in blocks:
        key, value = read(first, end)
        skipped = max(0, first - start)  # query rows before this block
        rows = query[:, :, skipped:]
        mask = None if valid is None else _mask(valid, first, end, start + skipped, rows.shape[2])
        part, part_lse = attention_with_lse(rows, key, value, mask, scale, soft_cap, is_causal=first >= start)
        _merge(out[:, :, skipped:], lse[:, :, skipped:], part.to(dtype), part_lse.to(dtype))
    return out.to(query.dtype), lse


def _mask(valid: torch.Tensor, first: int, end: int, start: int, rows: int) -> torch.Tensor:
    """`[B, 1, rows, end - first]`: what query rows from position `start` on attend to in a block of positions."""
    columns = torch.arange(first, end, device=valid.device)
    positions = torch.arange(start, start + rows, device=valid.device)
    alone = valid.long().cumsum(-1) == 0
    itself = (columns == positions[:, None]) & alone[:, None, start : start + rows].transpose(1, 2)
    return (((columns <= positions[:, None]) & valid[:, None, first:end]) | itself).unsqueeze(1)


def _merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add a block's attention to what came before, both weighted by their share of the exponentials."""
    both = torch.logaddexp(lse, part_lse)
    safe = torch.where(both == float("-inf"), 0, both)
    out.mul_((lse - safe).exp_().unsqueeze(-1)).add_(part.mul_((part_lse - safe).exp_().unsqueeze(-1)))
    lse.copy_(both)


def mass_in_blocks(
    query: torch.Tensor,
    lse: torch.Tensor,
    read: Read,
    blocks: list[Block],
    valid: torch.Tensor | None,
    start: int,
    groups: int,
    seed_rows: int,
    scale: float,
    soft_cap: float,
    *,
    total: bool,
) -> torch.Tensor:
    """Attention rows of the last `seed_rows` valid queries, summed over heads: `[B, groups, seed_rows, tokens]`.

    As `last_rows_mass`, with the log-sum-exp of all rows known. total: one row, the sum over all queries.
    """
    batch, heads, length, head_dim = query.shape
    tokens, dtype = blocks[-1][1], lse.dtype
    mass = torch.zeros((batch, groups, 1 if total else seed_rows, tokens), dtype=dtype, device=query.device)
    count = length if total else seed_rows
    chosen, real = last_queries(query, valid, start, count)
    at_once = max(1, _MASS_ELEMENTS // (batch * heads * max(end - first for first, end in blocks)))
    for first, end in blocks:
        key, _ = read(first, end)
        columns = torch.arange(first, end, device=query.device)
        for begin in range(0, count, at_once):
            index = chosen[:, begin : begin + at_once]
            wide = index[:, None, :].expand(-1, heads, -1)
            rows = query.gather(2, wide.unsqueeze(-1).expand(-1, -1, -1, head_dim))
            packed = rows.reshape(batch, key.shape[1], -1, head_dim)
            logits = soft_capped((packed @ key.transpose(-1, -2)).to(dtype).mul_(scale), soft_cap)
            logits = logits.reshape(batch, heads, -1, end - first)
            weights = (logits - lse.gather(2, wide).unsqueeze(-1)).exp_()
            attends = columns <= (index + start)[..., None]
            if valid is not None and real is not None:
                itself = columns == (index + start)[..., None]
                attends = ((attends & valid[:, None, first:end]) | itself) & real[:, begin : begin + at_once, None]
            received = weights.masked_fill_(~attends[:, None], 0).reshape(batch, groups, -1, *attends.shape[1:]).sum(2)
            if total:
                mass[..., first:end] += received.sum(2, keepdim=True)
            else:
                mass[:, :, begin : begin + at_once, first:end] = received
    return mass
