from __future__ import annotations

import torch
import torch.nn.functional as F

from ..selection import SPARSE_BLOCK, SelectionSpec, capped, decode_spec

ALL_ROWS = -1  # a count that stands for every valid position


def kv_select(
    scores: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    mass: torch.Tensor,
    length: torch.Tensor,
    origin: torch.Tensor,
    valid: torch.Tensor | None,
    layer: int,
    spec: str,
) -> None:
    """After a decode step: add its attention mass to the scores, then choose the next step's working set.

    scores: `[L, B, G, R, C]`, a sum (R = 1) or a ring of the last R attention rows; rows: `[L, B, G, W]` int32; counts:
    `[L, B, G]` int32; mass: `[B, G, C]` from `swa_attention`; length: `[L]`; origin: `[2]` int64, tokens there were
    after the last dense block, and the cap on rows that the device's budget forces (0 = none); valid: `[B, C]` or None.
    Rows that were not attended add nothing: the paper leaves this open, and writing zeros is its literal reading.
    """
    policy = capped(decode_spec(spec), int(origin[1]))
    tokens = int(length[layer])
    count = counts[layer]
    row = torch.zeros_like(mass)
    if bool((count < 0).any()):
        row[..., :tokens] = mass[..., :tokens]
    else:
        width = int(count.max())
        kept = torch.arange(width, device=mass.device) < count.unsqueeze(-1)
        # Padding entries of `rows` repeat position 0, hence scatter_add of zeros rather than scatter.
        row.scatter_add_(-1, rows[layer, :, :, :width].long(), mass[..., :width].masked_fill(~kept, 0))
    own = _valid_tokens(valid, tokens, mass) - _valid_tokens(valid, tokens - 1, mass)
    row *= own[:, None, None]  # the attention row of a padding token counts for nothing
    state = scores[layer]
    if policy.rank == "decay":
        exponent = policy.decay_exponent(tokens)
        if exponent == 0:
            state *= policy.decay ** (16 * policy.window)
        state[:, :, 0] += row * policy.decay**-exponent
    elif policy.rank == "ring":
        write_ring(state, row.unsqueeze(2), _valid_tokens(valid, tokens, mass), own)
    elif policy.rank == "sum":
        state[:, :, 0] += row
    _choose_next(scores, rows, counts, tokens, int(origin[0]), valid, 1, layer, policy)


def kv_seed(
    scores: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    mass: torch.Tensor,
    length: torch.Tensor,
    origin: torch.Tensor,
    valid: torch.Tensor | None,
    new_tokens: int,
    layer: int,
    spec: str,
) -> None:
    """After `new_tokens` tokens in one block: the same, from the mass `[B, G, R, <= C]` of the block's last rows."""
    policy = capped(decode_spec(spec), int(origin[1]))
    tokens = int(length[layer])
    seed_rows, columns = mass.shape[2], mass.shape[3]
    state = scores[layer]
    own = _valid_tokens(valid, tokens, mass) - _valid_tokens(valid, tokens - new_tokens, mass)
    if policy.rank == "decay":
        age = torch.arange(seed_rows - 1, -1, -1, device=mass.device, dtype=mass.dtype)
        recent = torch.einsum("bgrc,r->bgc", mass, policy.decay**age)
        before, after = policy.decay_exponent(tokens - new_tokens), policy.decay_exponent(tokens)
        # Older scores fade by the block's real tokens: padding must not age them.
        state *= (policy.decay ** (before + own - after).double()).to(state.dtype)[:, None, None, None]
        state[:, :, 0, :columns] += recent * policy.decay**-after
    elif policy.rank == "ring":
        padded = torch.zeros((*mass.shape[:3], state.shape[-1]), dtype=mass.dtype, device=mass.device)
        padded[..., :columns] = mass
        write_ring(state, padded, _valid_tokens(valid, tokens, mass), own)
    elif policy.rank == "sum":
        state[:, :, 0, :columns] += mass[:, :, 0]
    _choose_next(scores, rows, counts, tokens, int(origin[0]), valid, new_tokens, layer, policy)


def _valid_tokens(valid: torch.Tensor | None, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """Real tokens of each sequence, `[B]` int64."""
    if valid is None:
        return torch.full((like.shape[0],), tokens, dtype=torch.int64, device=like.device)
    return valid[:, :tokens].sum(-1)


def write_ring(ring: torch.Tensor, new_rows: torch.Tensor, valid_tokens: torch.Tensor, own: torch.Tensor) -> None:
    """Put T attention rows `[B, G, T, C]`, newest last, where the j-th real token of a sequence has row j mod R.

    own: `[B]`, how many of the block's tokens are real. Only their rows are written: rows before
    them stand for no token, and their places in the ring belong to the history.
    """
    size, new = ring.shape[2], new_rows.shape[2]
    new_rows = new_rows[:, :, max(0, new - size) :]
    new = new_rows.shape[2]
    order = torch.arange(-new, 0, device=ring.device)
    index = (valid_tokens[:, None] + order).remainder(size)[:, None, :, None].expand_as(new_rows)
    written = (order >= -own[:, None])[:, None, :, None]
    ring.scatter_(2, index, torch.where(written, new_rows, ring.gather(2, index)))


def ranking_of(state: torch.Tensor, real: torch.Tensor, policy: SelectionSpec) -> torch.Tensor:
    """The score of every position, `[B, G, T]`: larger is kept first.

    state: `[B, G, R, C]`; real: `[B, T]` bool, the last real position of a sequence being its current token, whose
    score does not matter. Padding has no part in any score.
    """
    groups, size, capacity = state.shape[1:]
    positions = real.shape[1]
    if policy.rank in ("decay", "sum"):
        return F.pad(state[:, :, 0, :positions], (0, max(0, positions - capacity)))
    past = real.sum(-1) - 1
    if policy.rank == "ring":
        slot = torch.arange(size, device=state.device)
        # Age of the row in ring slot s: how many real tokens ago it was written.
        age = (past[:, None] - 1 - slot).remainder(size)
        window = torch.as_tensor(policy.local_rows(past + 1))
        used = (age < window[:, None]) & (age < past[:, None])
        summed = (state * used[:, None, :, None]).sum(2)
        return F.pad(summed[..., :positions], (0, max(0, positions - capacity)))
    rank = real.long().cumsum(-1) - 1
    if policy.rank == "stride":
        share = policy.dynamic
        order = (rank * share.numerator % share.denominator < share.numerator).long()
    else:
        order = _hash(rank, past[:, None])
    return order.to(state.dtype)[:, None].expand(-1, groups, -1)


def _hash(rank: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
    """24 pseudo-random bits for each (rank, clock): exact in float32."""
    mixed = (rank * 2654435761 + clock * 2246822519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 3266489917) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) >> 8


def _choose_next(
    scores: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: int,
    origin: int,
    valid: torch.Tensor | None,
    new_tokens: int,
    layer: int,
    policy: SelectionSpec,
) -> None:
    """Choose for the step after `tokens` tokens, of which the last `new_tokens` have just come."""
    if tokens == new_tokens or new_tokens > SPARSE_BLOCK:  # a dense block: refresh steps count from its end
        origin, new_tokens = tokens, 1
    if policy.is_refresh_step(tokens + 1 - origin, layer, new_tokens):
        counts[layer] = ALL_ROWS
        return
    choose(scores, rows, counts, tokens, valid, layer, policy)


def choose(
    scores: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: int,
    valid: torch.Tensor | None,
    layer: int,
    policy: SelectionSpec,
) -> None:
    """Write the working set of the step that will hold `tokens + 1` tokens, the coming one (always local) included."""
    following = tokens + 1
    state = scores[layer]
    if valid is None:
        real = torch.ones((state.shape[0], following), dtype=torch.bool, device=state.device)
    else:
        real = F.pad(valid[:, :tokens], (0, 1), value=True)
    chosen = working_set(ranking_of(state, real, policy), real, policy)
    if policy.rank == "sum":
        state[:, :, 0, :tokens].masked_fill_(~chosen[..., :tokens], float("-inf"))
    width = min(rows.shape[-1], following)
    ascending = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    kept = chosen.sum(-1)
    padding = torch.arange(width, device=state.device) >= kept.unsqueeze(-1)
    rows[layer, :, :, :width] = ascending.masked_fill(padding, 0).to(rows.dtype)
    counts[layer] = kept.to(counts.dtype)


def working_set(ranking: torch.Tensor, real: torch.Tensor, policy: SelectionSpec) -> torch.Tensor:
    """The positions to attend to, `[B, G, T]` bool: sinks, the most recent, and the top-ranked others.

    ranking: `[B, G, T]`; real: `[B, T]` bool, the last real position of a sequence being its current token.
    """
    length = real.sum(-1)  # per sequence: padding is no context
    local, dynamic = policy.local_rows(length), policy.dynamic_rows(length)
    sinks = dynamic.clamp_max(policy.sinks)
    rank = real.long().cumsum(-1) - 1
    is_local = real & (rank >= (length - local)[:, None])
    is_sink = real & (rank < sinks[:, None]) & ~is_local
    candidates = real & ~is_local & ~is_sink
    # A score of -inf marks a row that was dropped for good.
    candidates = candidates[:, None] & (ranking != float("-inf"))
    ranking = ranking.masked_fill(~candidates, float("-inf"))
    # A stable ascending sort leaves equal scores in order of position, so its tail prefers the larger position.
    order = ranking.argsort(dim=-1, stable=True)
    positions = ranking.shape[-1]
    place = torch.arange(positions, device=ranking.device) >= (positions - (dynamic - sinks))[:, None]
    chosen = torch.zeros_like(ranking, dtype=torch.bool)
    chosen.scatter_(-1, order, place[:, None].expand_as(chosen))
    kept: torch.Tensor = (chosen & candidates) | (is_local | is_sink)[:, None]
    return kept
