"""CUDA kernels of `alisa::kv_select`; `reference.py` says what they must decide, and they decide exactly the same.

Scores are added to entry by entry; then one program a list finds the score of the last row that is kept, digit by digit
from histograms, and writes the chosen positions in ascending order. No number is read on the host.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..selection import decode_spec
from ..triton_launch import require

_BLOCK = 1024
_DIGITS = 256


@triton.jit(do_not_specialize=["layer", "capacity"])
def fade_scores(scores, factors, length, layer, capacity, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    """Rank `decay`, where the exponent of stored scores returns to 0: grid (blocks of positions, B * G)."""
    if tl.load(length + layer) % PERIOD == 0:
        position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        index = layer.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        state = scores + index * capacity + position
        inside = position < capacity
        tl.store(state, tl.load(state, mask=inside) * tl.load(factors + PERIOD), mask=inside)


@triton.jit(do_not_specialize=["layer", "capacity", "width"])
def add_mass(
    scores, mass, rows, counts, length, valid, factors, layer, capacity, width,
    GROUPS: tl.constexpr, PERIOD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what each attended row has received: grid (blocks of entries, B * G). factors: None for rank `sum`."""
    list_in_layer = tl.program_id(1).to(tl.int64)
    index = layer.to(tl.int64) * tl.num_programs(1) + list_in_layer
    tokens = tl.load(length + layer)
    count = tl.load(counts + index)
    is_listed = count >= 0
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = entry < tl.where(is_listed, count.to(tl.int64), tokens)
    if valid is not None:  # the attention row of a padding token counts for nothing
        added &= tl.load(valid + (list_in_layer // GROUPS) * capacity + tokens - 1) != 0
    position = tl.load(rows + index * width + entry, mask=added & is_listed, other=0)
    position = tl.where(is_listed, position, entry)
    received = tl.load(mass + list_in_layer * capacity + entry, mask=added, other=0.0)
    if factors is not None:
        received = received * tl.load(factors + tokens % PERIOD)
    state = scores + index * capacity + position
    tl.store(state, tl.load(state, mask=added, other=0.0) + received, mask=added)


@triton.jit
def nearest(length, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """floor(length * NUMERATOR / DENOMINATOR + 1/2)."""
    return (2 * NUMERATOR * length + DENOMINATOR) // (2 * DENOMINATOR)


@triton.jit
def local_and_dynamic(
    length, cap,
    LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr, DYNAMIC_N: tl.constexpr, DYNAMIC_D: tl.constexpr,
    SHARE_N: tl.constexpr, SHARE_D: tl.constexpr, IS_STRIDE: tl.constexpr,
):  # fmt: skip
    """`SelectionSpec.local_rows` and `dynamic_rows` with at most `cap` rows; 0 = no cap."""
    capped_local = tl.maximum(nearest(cap, SHARE_N, SHARE_D), 1)
    local = nearest(length, LOCAL_N, LOCAL_D)
    local = tl.where(cap > 0, tl.minimum(local, capped_local), local)
    local = tl.minimum(tl.maximum(local, 1), length)
    if DYNAMIC_N == 0:
        dynamic = length - length
    else:
        if IS_STRIDE:
            dynamic = tl.maximum(length - 2, 0) * DYNAMIC_N // DYNAMIC_D + 1
        else:
            dynamic = tl.maximum(nearest(length, DYNAMIC_N, DYNAMIC_D), 1)
        dynamic = tl.where(cap > 0, tl.minimum(dynamic, cap - capped_local), dynamic)
        dynamic = tl.minimum(dynamic, length - local)
    return local, dynamic


@triton.jit
def ranking_keys(score, rank, past, RANK: tl.constexpr, DYNAMIC_N: tl.constexpr, DYNAMIC_D: tl.constexpr):
    """32 bits for each position that order as its score does."""
    if RANK == 0:
        bits = (score + 0.0).to(tl.int32, bitcast=True)  # a sum with 0: no minus zero
        key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    elif RANK == 1:
        key = (rank * DYNAMIC_N % DYNAMIC_D < DYNAMIC_N).to(tl.uint32)
    else:
        mixed = (rank * 2654435761 + past * 2246822519) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 3266489917) & 0xFFFFFFFF
        key = ((mixed ^ (mixed >> 13)) >> 8).to(tl.uint32)
    return key


@triton.jit
def classify(
    scores, valid, first, tokens, real_before, length, local, sinks, past,
    RANK: tl.constexpr, DYNAMIC_N: tl.constexpr, DYNAMIC_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the positions from `first` on: keys, which are candidates, which are kept anyway, and how many are real.

    scores, valid: of this list and sequence. The position `tokens` is the coming token's, and real. real_before: real
    positions before `first`; length: all of them.
    """
    position = first + tl.arange(0, BLOCK)
    stored = position < tokens
    if valid is None:
        real = position <= tokens
        rank = position.to(tl.int64)
    else:
        real = (tl.load(valid + position, mask=stored, other=0) != 0) | (position == tokens)
        rank = (real_before + tl.cumsum(real.to(tl.int32), 0) - 1).to(tl.int64)
    is_local = real & (rank >= length - local)
    kept = is_local | (real & (rank < sinks))
    candidate = real & (kept == 0)
    score = tl.zeros([BLOCK], tl.float32)
    if RANK == 0:
        score = tl.load(scores + position, mask=stored, other=0.0)
        candidate &= score != float("-inf")  # dropped for good
    key = ranking_keys(score, rank, past, RANK, DYNAMIC_N, DYNAMIC_D)
    return key, candidate, kept, tl.sum(real.to(tl.int32), 0)


@triton.jit(do_not_specialize=["layer", "capacity", "width"])
def choose_rows(
    scores, rows, counts, length, origin, valid, layer, capacity, width,
    GROUPS: tl.constexpr, RANK: tl.constexpr, DROPS: tl.constexpr, SINKS: tl.constexpr, REFRESH: tl.constexpr,
    MAX_ROWS: tl.constexpr, LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr, DYNAMIC_N: tl.constexpr,
    DYNAMIC_D: tl.constexpr, SHARE_N: tl.constexpr, SHARE_D: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The working set of the coming step: grid (B * G). RANK: 0 by score, 1 stride, 2 hash; DROPS: rank `sum`."""
    index = layer.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    scores += index * capacity
    rows += index * width
    if valid is not None:
        valid += (tl.program_id(0) // GROUPS).to(tl.int64) * capacity
    tokens = tl.load(length + layer).to(tl.int32)
    start = tl.load(origin).to(tl.int32)
    cap = tl.load(origin + 1)
    cap = tl.where(cap > 0, cap, MAX_ROWS)
    following = tokens + 1
    step = following - tl.where(tokens == 1, tokens, start) + layer  # the first token is a dense block
    is_refresh = tokens < 0
    if REFRESH > 0:
        is_refresh = step // REFRESH > (step - 1) // REFRESH
    if is_refresh:
        tl.store(counts + index, -1)
    else:
        past = tokens.to(tl.int64)
        if valid is not None:
            found = tl.zeros([BLOCK], tl.int32)
            for first in range(0, tokens, BLOCK):
                position = first + tl.arange(0, BLOCK)
                found += (tl.load(valid + position, mask=position < tokens, other=0) != 0).to(tl.int32)
            past = tl.sum(found, 0).to(tl.int64)
        length_real = past + 1
        local, dynamic = local_and_dynamic(
            length_real, cap, LOCAL_N, LOCAL_D, DYNAMIC_N, DYNAMIC_D, SHARE_N, SHARE_D, RANK == 1
        )
        sinks = tl.minimum(dynamic, SINKS)
        remaining = (dynamic - sinks).to(tl.int32)

        # The key of the last row that is kept, from the highest digit down.
        digit = tl.arange(0, DIGITS)
        threshold = tl.zeros([], tl.uint32)
        ties = tl.zeros([], tl.int32)
        for turn in tl.static_range(4):
            histogram = tl.zeros([DIGITS], tl.int32)
            real_before = tl.zeros([], tl.int32)
            for first in range(0, following, BLOCK):
                key, candidate, _, real = classify(
                    scores, valid, first, tokens, real_before, length_real, local, sinks, past,
                    RANK, DYNAMIC_N, DYNAMIC_D, BLOCK,
                )  # fmt: skip
                real_before += real
                if turn > 0:
                    candidate &= (key >> (32 - 8 * turn)) == threshold
                histogram += tl.histogram(((key >> (24 - 8 * turn)) & 255).to(tl.int32), DIGITS, mask=candidate)
            total = tl.sum(histogram, 0)
            from_here = total - tl.cumsum(histogram, 0) + histogram  # keys with this digit or a larger one
            chosen = tl.maximum(tl.sum((from_here >= remaining).to(tl.int32), 0) - 1, 0)
            ties = tl.sum(tl.where(digit == chosen, histogram, 0), 0)
            remaining -= tl.sum(tl.where(digit > chosen, histogram, 0), 0)
            threshold = (threshold << 8) | chosen.to(tl.uint32)

        # Of equal scores the larger positions are kept.
        skipped = tl.maximum(ties - remaining, 0)
        written = tl.zeros([], tl.int32)
        tied_before = tl.zeros([], tl.int32)
        real_before = tl.zeros([], tl.int32)
        for first in range(0, following, BLOCK):
            key, candidate, kept, real = classify(
                scores, valid, first, tokens, real_before, length_real, local, sinks, past,
                RANK, DYNAMIC_N, DYNAMIC_D, BLOCK,
            )  # fmt: skip
            real_before += real
            tied = candidate & (key == threshold)
            tied_rank = tied_before + tl.cumsum(tied.to(tl.int32), 0) - 1
            tied_before += tl.sum(tied.to(tl.int32), 0)
            kept |= (candidate & (key > threshold)) | (tied & (tied_rank >= skipped))
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            written += tl.sum(kept.to(tl.int32), 0)
            position = first + tl.arange(0, BLOCK)
            tl.store(rows + place, position, mask=kept & (place < width))
            if DROPS:
                tl.store(scores + position, float("-inf"), mask=(kept == 0) & (position < tokens))
        tl.store(counts + index, written)
        for first in range(written, tl.minimum(width, following), BLOCK):
            entry = first + tl.arange(0, BLOCK)
            tl.store(rows + entry, 0, mask=entry < tl.minimum(width, following))


@functools.lru_cache(maxsize=32)
def _decay_factors(spec: str, device: torch.device) -> torch.Tensor:
    """decay**-e for e < 16 windows, then the factor by which scores fade where e returns to 0; `[16 * window + 1]`."""
    policy = decode_spec(spec)
    period = 16 * policy.window
    with torch.inference_mode(False):
        return torch.tensor([*(policy.decay**-e for e in range(period)), policy.decay**period]).to(device)


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
    """See `reference.kv_select`."""
    policy = decode_spec(spec)
    _, batch_size, groups, _, capacity = scores.shape
    require(policy.rank != "ring", "the window of Algorithm 1 is a ring of attention rows, which has no kernel yet")
    require(scores.dtype == torch.float32, f"scores are {scores.dtype}")
    lists, width = batch_size * groups, rows.shape[-1]
    padding = None if valid is None else valid.view(torch.int8)
    if policy.rank in ("decay", "sum"):
        blocks = triton.cdiv(capacity, _BLOCK)
        factors, period = None, 1
        if policy.rank == "decay":
            factors, period = _decay_factors(spec, scores.device), 16 * policy.window
            fade_scores[blocks, lists](
                scores, factors, length, layer, capacity, PERIOD=period, BLOCK=_BLOCK, num_warps=4
            )
        add_mass[blocks, lists](
            scores, mass.contiguous(), rows, counts, length, padding, factors, layer, capacity, width,
            GROUPS=groups, PERIOD=period, BLOCK=_BLOCK, num_warps=4,
            enable_fp_fusion=False,  # as the reference rounds
        )  # fmt: skip
    share = policy.local / (policy.local + policy.dynamic)
    choose_rows[(lists,)](
        scores, rows, counts, length, origin, padding, layer, capacity, width,
        GROUPS=groups, RANK={"stride": 1, "hash": 2}.get(policy.rank, 0), DROPS=policy.rank == "sum",
        SINKS=policy.sinks, REFRESH=policy.refresh, MAX_ROWS=policy.max_rows,
        LOCAL_N=policy.local.numerator, LOCAL_D=policy.local.denominator,
        DYNAMIC_N=policy.dynamic.numerator, DYNAMIC_D=policy.dynamic.denominator,
        SHARE_N=share.numerator, SHARE_D=share.denominator,
        DIGITS=_DIGITS, BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
