"""CUDA kernels of `alisa::kv_select`; `reference.py` says what they must decide, and they decide exactly the same.

The positions of a list are shared out among SPLITS programs. The first kernel adds the step's mass to the scores and
counts the highest digit (8 bits) of the candidates' keys; three more each count the next digit of the candidates whose
key begins as that of the last kept row does; the last one writes the kept positions in ascending order, each program
behind what the counts say that those before it write. Counts have fixed places, so nothing depends on which program
comes first. Kernels are the only barrier between what programs write and read, and no number is read on the host.

Estimate, not measured: 5 launches. A list of n positions and w attended rows is 4 bytes x n read in each and written
in the first, 4 bytes x w of positions read by each program of the first, and SPLITS KiB of counts read by each program
of the others; at n = 32768, w = 6554, 32 programs: 0.75 MiB of scores and 5 MiB of positions and counts, all of which
the L2 cache holds. One program a list would go over the 128 KiB of scores five times, block after block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..inlining import layer_code, traceable
from ..selection import decode_spec
from ..triton_launch import multiprocessors, require

_BLOCK = 256  # more, and the first kernel spills registers on compute capability 9.0
_DIGITS = 256
_MOST_SPLITS = 32


@triton.jit
def growth(DECAY: tl.constexpr, exponent, BITS: tl.constexpr):
    """DECAY**-exponent in float64; exponent < 2**BITS. For windows from 2 to 399 it rounds to the same float32 as
    Python's power, but for one exponent at a window of 17."""
    result = tl.full([], 1.0, tl.float64)
    for bit in tl.static_range(BITS):
        result = tl.where((exponent >> bit) & 1 != 0, result * DECAY ** (-(1 << bit)), result)
    return result


@triton.jit
def layer_of(layer_code):
    """See `inlining.layer_code`."""
    return (layer_code - 3) // 2


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
        mixed = (rank * 2654435761 + past.to(tl.int64) * 2246822519) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 3266489917) & 0xFFFFFFFF
        key = ((mixed ^ (mixed >> 13)) >> 8).to(tl.uint32)
    return key


@triton.jit
def classify(
    score, valid, position, tokens, real_before, length, local, sinks, past,
    RANK: tl.constexpr, DYNAMIC_N: tl.constexpr, DYNAMIC_D: tl.constexpr,
):  # fmt: skip
    """Of a block of positions: keys, which are candidates, which are kept anyway, and how many are real.

    score: None unless it ranks; valid: of this sequence. The position `tokens` is the coming token's, and real.
    real_before: real positions before the block; length: all of them.
    """
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
    if RANK == 0:
        candidate &= score != float("-inf")  # dropped for good
    key = ranking_keys(score, rank, past, RANK, DYNAMIC_N, DYNAMIC_D)
    return key, candidate, kept, tl.sum(real.to(tl.int32), 0)


@triton.jit
def is_dense_step(tokens, origin, layer, REFRESH: tl.constexpr):
    """Whether the coming step attends to all rows."""
    dense = tokens < 0
    if REFRESH > 0:
        start = tl.load(origin).to(tl.int32)
        step = tokens + 1 - tl.where(tokens == 1, tokens, start) + layer  # the first token is a dense block
        dense = step // REFRESH > (step - 1) // REFRESH
    return dense


@triton.jit
def span_of(tokens, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First position of a program, and the one behind its last; the coming token's is among them."""
    size = tl.cdiv(tl.cdiv(tokens + 1, SPLITS), BLOCK) * BLOCK
    start = tl.program_id(0) * size
    return start, tl.minimum(start + size, tokens + 1)


@triton.jit
def quotas(
    origin, past, MAX_ROWS: tl.constexpr, SINKS: tl.constexpr, LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr,
    DYNAMIC_N: tl.constexpr, DYNAMIC_D: tl.constexpr, SHARE_N: tl.constexpr, SHARE_D: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Real positions with the coming one, the rows kept as recent and as sinks, and how many are kept by rank."""
    cap = tl.load(origin + 1)
    cap = tl.where(cap > 0, cap, MAX_ROWS)
    length = past.to(tl.int64) + 1
    local, dynamic = local_and_dynamic(length, cap, LOCAL_N, LOCAL_D, DYNAMIC_N, DYNAMIC_D, SHARE_N, SHARE_D, RANK == 1)
    sinks = tl.minimum(dynamic, SINKS)
    return length, local, sinks, (dynamic - sinks).to(tl.int32)


@triton.jit
def narrow(tally, prefixes, TURN, remaining, SPLITS: tl.constexpr, DIGITS: tl.constexpr):
    """One more digit of the last kept row's key, from how often each of its values was counted.

    remaining: keys to be kept. Returns the digits so far, how many of the keys that begin with them are kept, and of
    each program's candidates how many had a larger last digit, and how many that one, `[SPLITS]` both.
    """
    prefix = tl.zeros([], tl.int32)
    if TURN > 1:
        prefix = tl.load(prefixes + 2 * (TURN - 1))
        remaining = tl.load(prefixes + 2 * (TURN - 1) + 1)
    digit = tl.arange(0, DIGITS)
    split = tl.arange(0, SPLITS)
    counted = tl.load(tally + ((TURN - 1) * SPLITS + split[:, None]) * DIGITS + digit[None, :])
    histogram = tl.sum(counted, 0)
    from_here = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # keys with this digit or a larger one
    chosen = tl.maximum(tl.sum((from_here >= remaining).to(tl.int32), 0) - 1, 0)
    remaining -= tl.sum(tl.where(digit > chosen, histogram, 0), 0)
    larger = tl.sum(tl.where((digit > chosen)[None, :], counted, 0), 1)
    same = tl.sum(tl.where((digit == chosen)[None, :], counted, 0), 1)
    return (prefix << 8) | chosen, remaining, larger, same


@triton.jit(do_not_specialize=["layer_code", "capacity", "width"])
def add_and_count(
    scores, mass, rows, counts, length, origin, valid, tally, shares, layer_code, capacity, width,
    GROUPS: tl.constexpr, ADDS: tl.constexpr, DECAY: tl.constexpr, FADE: tl.constexpr, PERIOD: tl.constexpr,
    EXPONENT_BITS: tl.constexpr, RANK: tl.constexpr, SINKS: tl.constexpr, REFRESH: tl.constexpr,
    MAX_ROWS: tl.constexpr, LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr, DYNAMIC_N: tl.constexpr,
    DYNAMIC_D: tl.constexpr, SHARE_N: tl.constexpr, SHARE_D: tl.constexpr,
    SPLITS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the mass, and count the first digits: grid (SPLITS, B * G).

    tally: `[B * G, 4, SPLITS, DIGITS]`; shares: `[B * G, SPLITS, 4]`: rows kept anyway, candidates that are known to be
    kept, real positions before the span, and all real ones. Both int32. ADDS: ranks `decay` and `sum`; DECAY: of a
    step, 0 for `sum`; FADE: of all scores where the exponent returns to 0, every PERIOD tokens.
    """
    own = tl.program_id(1).to(tl.int64)
    layer = layer_of(layer_code)
    index = tl.num_programs(1).to(tl.int64) * layer + own
    split = tl.program_id(0)
    tokens = tl.load(length + layer).to(tl.int32)
    start, end = span_of(tokens, SPLITS, BLOCK)
    scores += index * capacity
    rows += index * width
    mass += own * capacity
    lane = tl.arange(0, BLOCK)
    adds = tokens > 0
    real_before = start
    past = tokens
    if valid is not None:
        valid += (own // GROUPS) * capacity
        adds = tl.load(valid + tokens - 1) != 0  # the attention row of a padding token counts for nothing
        before = tl.zeros([BLOCK], tl.int32)
        found = tl.zeros([BLOCK], tl.int32)
        for first in range(0, tokens, BLOCK):
            real = (tl.load(valid + first + lane, mask=first + lane < tokens, other=0) != 0).to(tl.int32)
            found += real
            before += tl.where(first + lane < start, real, 0)
        past = tl.sum(found, 0)
        real_before = tl.sum(before, 0)
    place = shares + (own * SPLITS + split) * 4
    tl.store(place + 2, real_before)
    tl.store(place + 3, past)
    count = tl.load(counts + index)
    entry = tl.zeros([], tl.int32)  # of the list, the first that is not before the block
    factor = tl.full([], 1.0, tl.float64)
    if ADDS:
        if start > 0:
            for first in range(0, count, BLOCK):
                listed = tl.load(rows + first + lane, mask=first + lane < count, other=tokens)
                entry += tl.sum((listed < start).to(tl.int32), 0)
        if DECAY > 0:
            factor = growth(DECAY, tokens % PERIOD, EXPONENT_BITS)

    dense = is_dense_step(tokens, origin, layer, REFRESH)
    full_length, local, sinks, _by_rank = quotas(
        origin, past, MAX_ROWS, SINKS, LOCAL_N, LOCAL_D, DYNAMIC_N, DYNAMIC_D, SHARE_N, SHARE_D, RANK
    )
    histogram = tl.zeros([DIGITS], tl.int32)
    always = tl.zeros([], tl.int32)
    for first in range(start, end, BLOCK):
        position = first + lane
        stored = position < tokens
        score = tl.zeros([BLOCK], tl.float32)
        if RANK == 0:
            score = tl.load(scores + position, mask=stored, other=0.0)
        if ADDS:
            listed = tl.load(rows + entry + lane, mask=entry + lane < count, other=tokens + BLOCK)
            inside = (listed < first + BLOCK) & (listed < tokens)
            attended = tl.histogram(tl.where(inside, listed - first, 0), BLOCK, mask=inside)
            at = tl.where(count >= 0, entry + tl.cumsum(attended, 0) - 1, position)
            receives = adds & tl.where(count >= 0, attended > 0, stored)
            received = tl.load(mass + at, mask=receives, other=0.0)
            entry += tl.sum(attended, 0)
            if DECAY > 0:
                if tokens % PERIOD == 0:
                    score = score * FADE
                # As the reference rounds: the product once, then the sum. In float64 it is exact, and no FMA is made.
                received = (received.to(tl.float64) * factor.to(tl.float32).to(tl.float64)).to(tl.float32)
            score += received
            tl.store(scores + position, score, mask=stored)
        if dense == 0:
            key, candidate, kept, real = classify(
                score, valid, position, tokens, real_before, full_length, local, sinks, past,
                RANK, DYNAMIC_N, DYNAMIC_D,
            )  # fmt: skip
            real_before += real
            always += tl.sum(kept.to(tl.int32), 0)
            histogram += tl.histogram((key >> 24).to(tl.int32), DIGITS, mask=candidate)
    tl.store(place, always)
    tl.store(place + 1, 0)
    tl.store(tally + (own * 4 * SPLITS + split) * DIGITS + tl.arange(0, DIGITS), histogram)


@triton.jit(do_not_specialize=["layer_code", "capacity"])
def count_digit(
    scores, length, origin, valid, tally, shares, prefixes, layer_code, capacity,
    TURN: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, SINKS: tl.constexpr, REFRESH: tl.constexpr,
    MAX_ROWS: tl.constexpr, LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr, DYNAMIC_N: tl.constexpr,
    DYNAMIC_D: tl.constexpr, SHARE_N: tl.constexpr, SHARE_D: tl.constexpr,
    SPLITS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count digit number TURN (1 to 3) of the candidates that begin as the last kept row: grid (SPLITS, B * G).

    prefixes: `[B * G, 4, 2]` int32: by turn, the key's digits before it, and how many keys with them are kept.
    """
    own = tl.program_id(1).to(tl.int64)
    layer = layer_of(layer_code)
    index = tl.num_programs(1).to(tl.int64) * layer + own
    split = tl.program_id(0)
    tokens = tl.load(length + layer).to(tl.int32)
    if is_dense_step(tokens, origin, layer, REFRESH) == 0:
        start, end = span_of(tokens, SPLITS, BLOCK)
        scores += index * capacity
        tally += own * 4 * SPLITS * DIGITS
        prefixes += own * 8
        place = shares + (own * SPLITS + split) * 4
        if valid is not None:
            valid += (own // GROUPS) * capacity
        real_before = tl.load(place + 2)
        past = tl.load(place + 3)
        full_length, local, sinks, remaining = quotas(
            origin, past, MAX_ROWS, SINKS, LOCAL_N, LOCAL_D, DYNAMIC_N, DYNAMIC_D, SHARE_N, SHARE_D, RANK
        )
        prefix, remaining, larger, _same = narrow(tally, prefixes, TURN, remaining, SPLITS, DIGITS)
        if split == 0:
            tl.store(prefixes + 2 * TURN, prefix)
            tl.store(prefixes + 2 * TURN + 1, remaining)
        mine = tl.sum(tl.where(tl.arange(0, SPLITS) == split, larger, 0), 0)
        tl.store(place + 1, tl.load(place + 1) + mine)
        histogram = tl.zeros([DIGITS], tl.int32)
        for first in range(start, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            score = tl.zeros([BLOCK], tl.float32)
            if RANK == 0:
                score = tl.load(scores + position, mask=position < tokens, other=0.0)
            key, candidate, _kept, real = classify(
                score, valid, position, tokens, real_before, full_length, local, sinks, past,
                RANK, DYNAMIC_N, DYNAMIC_D,
            )  # fmt: skip
            real_before += real
            candidate &= (key >> (32 - 8 * TURN)) == prefix.to(tl.uint32, bitcast=True)
            histogram += tl.histogram(((key >> (24 - 8 * TURN)) & 255).to(tl.int32), DIGITS, mask=candidate)
        tl.store(tally + (TURN * SPLITS + split) * DIGITS + tl.arange(0, DIGITS), histogram)


@triton.jit(do_not_specialize=["layer_code", "capacity", "width"])
def write_chosen(
    scores, rows, counts, length, origin, valid, tally, shares, prefixes, layer_code, capacity, width,
    GROUPS: tl.constexpr, DROPS: tl.constexpr, RANK: tl.constexpr, SINKS: tl.constexpr, REFRESH: tl.constexpr,
    MAX_ROWS: tl.constexpr, LOCAL_N: tl.constexpr, LOCAL_D: tl.constexpr, DYNAMIC_N: tl.constexpr,
    DYNAMIC_D: tl.constexpr, SHARE_N: tl.constexpr, SHARE_D: tl.constexpr,
    SPLITS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The working set of the coming step: grid (SPLITS, B * G). RANK: 0 by score, 1 stride, 2 hash; DROPS: rank `sum`.

    Of equal keys the larger positions are kept.
    """
    own = tl.program_id(1).to(tl.int64)
    layer = layer_of(layer_code)
    index = tl.num_programs(1).to(tl.int64) * layer + own
    split = tl.program_id(0)
    tokens = tl.load(length + layer).to(tl.int32)
    if is_dense_step(tokens, origin, layer, REFRESH):
        if split == 0:
            tl.store(counts + index, -1)
    else:
        start, end = span_of(tokens, SPLITS, BLOCK)
        scores += index * capacity
        rows += index * width
        place = shares + own * SPLITS * 4
        if valid is not None:
            valid += (own // GROUPS) * capacity
        real_before = tl.load(place + split * 4 + 2)
        past = tl.load(place + split * 4 + 3)
        full_length, local, sinks, remaining = quotas(
            origin, past, MAX_ROWS, SINKS, LOCAL_N, LOCAL_D, DYNAMIC_N, DYNAMIC_D, SHARE_N, SHARE_D, RANK
        )
        threshold, remaining, larger, ties = narrow(
            tally + own * 4 * SPLITS * DIGITS, prefixes + own * 8, 4, remaining, SPLITS, DIGITS
        )
        threshold = threshold.to(tl.uint32, bitcast=True)
        others = tl.arange(0, SPLITS)
        untied = larger + tl.load(place + others * 4) + tl.load(place + others * 4 + 1)
        all_ties = tl.sum(ties, 0)
        skipped = tl.maximum(all_ties - remaining, 0)
        count = tl.sum(untied, 0) + all_ties - skipped
        tied_before = tl.sum(tl.where(others < split, ties, 0), 0)
        written = tl.sum(tl.where(others < split, untied, 0), 0) + tl.maximum(tied_before - skipped, 0)
        for first in range(start, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            score = tl.zeros([BLOCK], tl.float32)
            if RANK == 0:
                score = tl.load(scores + position, mask=position < tokens, other=0.0)
            key, candidate, kept, real = classify(
                score, valid, position, tokens, real_before, full_length, local, sinks, past,
                RANK, DYNAMIC_N, DYNAMIC_D,
            )  # fmt: skip
            real_before += real
            tied = candidate & (key == threshold)
            tied_rank = tied_before + tl.cumsum(tied.to(tl.int32), 0) - 1
            tied_before += tl.sum(tied.to(tl.int32), 0)
            kept |= (candidate & (key > threshold)) | (tied & (tied_rank >= skipped))
            line = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            written += tl.sum(kept.to(tl.int32), 0)
            tl.store(rows + line, position, mask=kept & (line < width))
            if DROPS:
                tl.store(scores + position, float("-inf"), mask=(kept == 0) & (position < tokens))
        if split == 0:
            tl.store(counts + index, count)
        last = tl.minimum(width, tokens + 1)
        for first in range(count + split * BLOCK, last, SPLITS * BLOCK):
            line = first + tl.arange(0, BLOCK)
            tl.store(rows + line, 0, mask=line < last)


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
    """See `reference.kv_select`; working sets are in ascending order."""
    policy = decode_spec(spec)
    _, batch_size, groups, _, capacity = scores.shape
    require(policy.rank != "ring", "the window of Algorithm 1 is a ring of attention rows, which has no kernel yet")
    require(scores.dtype == torch.float32, f"scores are {scores.dtype}")
    lists, width = batch_size * groups, rows.shape[-1]
    splits = _splits(lists, multiprocessors(scores.device))
    tally = torch.empty((lists, 4, splits, _DIGITS), dtype=torch.int32, device=scores.device)
    shares = torch.empty((lists, splits, 4), dtype=torch.int32, device=scores.device)
    prefixes = torch.empty((lists, 4, 2), dtype=torch.int32, device=scores.device)
    share = policy.local / (policy.local + policy.dynamic)
    constants = {
        "GROUPS": groups, "RANK": {"stride": 1, "hash": 2}.get(policy.rank, 0),
        "SINKS": policy.sinks, "REFRESH": policy.refresh, "MAX_ROWS": policy.max_rows,
        "LOCAL_N": policy.local.numerator, "LOCAL_D": policy.local.denominator,
        "DYNAMIC_N": policy.dynamic.numerator, "DYNAMIC_D": policy.dynamic.denominator,
        "SHARE_N": share.numerator, "SHARE_D": share.denominator,
        "SPLITS": splits, "DIGITS": _DIGITS, "BLOCK": _BLOCK,
    }  # fmt: skip
    decays = policy.rank == "decay"
    period = 16 * policy.window if decays else 1
    grid, code = (splits, lists), layer_code(layer)
    traceable(add_and_count)[grid](
        scores, mass.contiguous(), rows, counts, length, origin, valid, tally, shares, code, capacity, width,
        ADDS=policy.rank in ("decay", "sum"), DECAY=policy.decay if decays else 0.0,
        FADE=policy.decay**period if decays else 1.0, PERIOD=period, EXPONENT_BITS=period.bit_length(), **constants,
    )  # fmt: skip
    for turn in (1, 2, 3):
        traceable(count_digit)[grid](
            scores, length, origin, valid, tally, shares, prefixes, code, capacity, TURN=turn, **constants
        )
    traceable(write_chosen)[grid](
        scores, rows, counts, length, origin, valid, tally, shares, prefixes, code, capacity, width,
        DROPS=policy.rank == "sum", **constants,
    )  # fmt: skip


def _splits(lists: int, processors: int) -> int:
    """Programs of a list: about one a multiprocessor for all of them, a power of two."""
    wanted = int(max(1, min(_MOST_SPLITS, processors // lists)))
    return 1 << (wanted.bit_length() - 1)
