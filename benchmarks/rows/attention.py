"""Decode attention of one layer beside torch's, by sparsity and length."""

from __future__ import annotations

import itertools

import torch

from alisa_compile.kernels import native
from benchmarks import decode_attention
from benchmarks.decode_attention import Attention, Bandwidth, Case, attend, cache_bytes
from benchmarks.outcome import GateFailed, Measure, Outcome, floor_ms
from benchmarks.timing import alternate


@torch.no_grad()
def decode(
    dtype: str, sparsity: float, tokens: int, batch: int, seconds: float = 1.0, cache: int | None = None
) -> Outcome:
    """Calls rotate through layers that together do not fit the processor's cache, so that rows come from memory."""
    if not native.register_native():
        raise GateFailed("the native kernels cannot be built here: no C++ compiler")
    cache = cache or cache_bytes()
    case = Case(getattr(torch, dtype), sparsity, tokens, batch)
    attention = Attention(case, cache)
    try:
        decode_attention.check(attention)
    except SystemExit as failure:
        raise GateFailed(str(failure)) from None
    bandwidth = Bandwidth(cache).measure()
    ours, theirs = itertools.cycle(range(attention.layers)), itertools.cycle(range(attention.torch_layers))
    times = alternate(
        {
            "alisa": lambda: attention.run(attend, next(ours), attention.query),
            "torch SDPA, packed": lambda: attention.torch_attention(next(theirs)),
        },
        seconds=seconds,
    )
    dense = Case(torch.bfloat16, 0.0, tokens, batch).bytes
    sizes = {"alisa": case.bytes, "torch SDPA, packed": dense}
    return Outcome(
        [
            Measure(who, found, bytes=sizes[who], floor_ms=floor_ms(sizes[who], bandwidth))
            for who, found in times.items()
        ]
    )
