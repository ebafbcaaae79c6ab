from __future__ import annotations

import torch

from ..kv_select.reference import ranking_of, working_set, write_ring
from ..selection import decode_spec


def buffer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: torch.Tensor,
    observed: torch.Tensor,
    layer: int,
    spec: str,
    scale: float,
) -> torch.Tensor:
    """One decode step of sparse window attention over a dense buffer: select, attend, score.

    query: `[B, Hq, 1, D]`; key, value: `[B, Hkv, N, D]`; mask: `[B or 1, 1, 1, N]` bool, True = may be attended, the
    last True being the current token; None = all N. scores: `[B, G, R, N]` as one layer of `kv_select`; observed: `[1]`
    int64, attention rows scored since the last prompt. The module's own prefill returns no attention mass, so the first
    step is dense and scoring starts with it. Returns `[B, Hq, 1, Dv]`.
    """
    policy = decode_spec(spec)
    batch_size, query_heads, _, head_dim = query.shape
    kv_heads, capacity = key.shape[1], key.shape[2]
    groups = scores.shape[1]
    clock = int(observed)
    if mask is None:
        real = torch.ones((batch_size, capacity), dtype=torch.bool, device=query.device)
    else:
        real = mask[:, 0, 0].expand(batch_size, capacity)
    length = real.sum(-1)
    if clock == 0 or policy.is_refresh_step(clock, layer):
        chosen = real[:, None].expand(batch_size, groups, capacity)
    else:
        chosen = working_set(ranking_of(scores, real, policy), real, policy)
        if policy.rank == "sum":
            scores[:, :, 0].masked_fill_(real[:, None] & ~chosen, float("-inf"))
    count = chosen.sum(-1)
    width = int(count.max())
    rows = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    kept = torch.arange(width, device=query.device) < count.unsqueeze(-1)
    # Entries past the count point at the current token, whose row is always written.
    rows = torch.where(kept, rows, rows.gather(-1, (count - 1).clamp_min(0).unsqueeze(-1)))
    per_head = rows.repeat_interleave(kv_heads // groups, dim=1).unsqueeze(-1)
    key = key.gather(2, per_head.expand(-1, -1, -1, head_dim))
    value = value.gather(2, per_head.expand(-1, -1, -1, value.shape[3]))
    packed = query.reshape(batch_size, kv_heads, query_heads // kv_heads, head_dim)
    logits = (packed @ key.transpose(-1, -2)).to(scores.dtype) * scale
    attends = kept.repeat_interleave(kv_heads // groups, dim=1).unsqueeze(2)
    weights = logits.masked_fill(~attends, float("-inf")).softmax(-1)
    out = weights.to(query.dtype) @ value
    mass = weights.reshape(batch_size, groups, -1, width).sum(2)
    row = torch.zeros((batch_size, groups, capacity), dtype=scores.dtype, device=query.device)
    row.scatter_add_(-1, rows, mass.masked_fill(~kept, 0))
    _score(scores, row, length, clock, spec)
    observed += 1
    return out.reshape(batch_size, query_heads, 1, value.shape[3])


def _score(scores: torch.Tensor, row: torch.Tensor, length: torch.Tensor, clock: int, spec: str) -> None:
    """Add one attention row, as `kv_select` does, with the number of scored rows as the clock."""
    policy = decode_spec(spec)
    if policy.rank == "decay":
        exponent = policy.decay_exponent(clock)
        if exponent == 0 and clock:
            scores *= policy.decay ** (16 * policy.window)
        scores[:, :, 0] += row * policy.decay**-exponent
    elif policy.rank == "sum":
        scores[:, :, 0] += row
    elif policy.rank == "ring":
        write_ring(scores, row.unsqueeze(2), length, torch.ones_like(length))
