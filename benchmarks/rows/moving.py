"""Quantising rows, and packing them out of and into a pool, by the size of a row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch

import alisa_compile  # noqa: F401  (registers the ops)
from alisa_compile.kernels.quantize_row import dequantize_row, quantize_row
from alisa_compile.runtime.tiers import advise_huge_pages
from benchmarks.decode_attention import cache_bytes
from benchmarks.outcome import GateFailed, Measure, Outcome, floor_ms
from benchmarks.timing import Times, alternate, seconds_of


def copy_bandwidth(cache: int) -> float:
    """Bytes a second read and written, each counted: torch's own copy of a buffer that no cache holds."""
    source = torch.empty(4 * cache // 4, dtype=torch.int32)
    target = torch.empty_like(source)
    for buffer in (source, target):
        advise_huge_pages(buffer)
        buffer.fill_(1)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(7))


@torch.no_grad()
def quantise(tokens: int, heads: int, head_dim: int, seconds: float = 0.5) -> Outcome:
    """K of a block, `[1, H, T, D]` bf16: compiled, as graphs have it, beside the same in eager torch."""
    rows = torch.randn((1, heads, tokens, head_dim), generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = torch.compile(quantize_row, dynamic=False)
    values, scale = compiled(rows)
    off = (dequantize_row(values, scale, torch.float32) - rows.float()).abs()
    # Half a step, and the rounding of the product of an int8 and its scale.
    if not bool((off <= scale.unsqueeze(-1) * (0.5 + 2.0**-12)).all()):
        raise GateFailed(f"a value is {float((off / scale.unsqueeze(-1)).max()):.3f} steps off")
    nbytes = rows.nbytes + values.nbytes + scale.nbytes
    bandwidth = copy_bandwidth(cache_bytes() if seconds > 0.1 else 1 << 20)
    times = alternate(
        {"alisa::quantize_row, compiled": lambda: compiled(rows), "the same, eager": lambda: quantize_row(rows)},
        seconds=seconds,
    )
    return _outcome(times, nbytes, bandwidth)


@torch.no_grad()
def gather(row_bytes: int, rows: int, seconds: float = 0.5, cache: int | None = None) -> Outcome:
    """`rows` rows out of a pool larger than the cache, at slots in no order."""
    cache = cache or cache_bytes()
    pools = _Pools(row_bytes, rows, cache)
    op = torch.ops.alisa.gather_rows.default
    if not torch.equal(op(pools.pool, pools.slots[0]), pools.pool[pools.slots[0].long()]):
        raise GateFailed("other bytes than torch's indexing")
    times = alternate(
        {
            "alisa::gather_rows": lambda: op(pools.pool, next(pools.turn)),
            "torch.index_select": lambda: pools.pool.index_select(0, next(pools.turn)),
        },
        seconds=seconds,
    )
    return _outcome(times, 2 * rows * row_bytes, copy_bandwidth(cache))


@torch.no_grad()
def scatter(row_bytes: int, rows: int, seconds: float = 0.5, cache: int | None = None) -> Outcome:
    """The other way."""
    cache = cache or cache_bytes()
    pools = _Pools(row_bytes, rows, cache)
    op = torch.ops.alisa.scatter_rows.default
    block = torch.randint(-99, 99, (rows, row_bytes), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    op(pools.pool, pools.slots[0], block)
    if not torch.equal(pools.pool[pools.slots[0].long()], block):
        raise GateFailed("other bytes than were given")
    times = alternate(
        {
            "alisa::scatter_rows": lambda: op(pools.pool, next(pools.turn), block),
            "torch.index_copy_": lambda: pools.pool.index_copy_(0, next(pools.long_turn), block),
        },
        seconds=seconds,
    )
    return _outcome(times, 2 * rows * row_bytes, copy_bandwidth(cache))


class _Pools:
    """A pool of rows and several sets of distinct slots, used in turn so that the cache helps nobody."""

    def __init__(self, row_bytes: int, rows: int, cache: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = max(4 * cache // row_bytes, 2 * rows)
        self.pool = torch.empty((count, row_bytes), dtype=torch.int8)
        advise_huge_pages(self.pool)
        self.pool.copy_(torch.randint(-99, 99, (1, row_bytes), dtype=torch.int8, generator=generator))
        self.pool[:, :8] = torch.arange(count).view(-1, 1).view(torch.int8)  # no row is like another
        order = torch.randperm(count, generator=generator).to(torch.int32)
        self.slots = [part for part in order.split(rows) if len(part) == rows]
        self.turn = itertools.cycle(self.slots)
        self.long_turn = itertools.cycle([part.long() for part in self.slots])  # which index_copy_ demands


def _outcome(times: Mapping[str, Times], nbytes: int, bandwidth: float) -> Outcome:
    return Outcome(
        [Measure(who, found, bytes=nbytes, floor_ms=floor_ms(nbytes, bandwidth)) for who, found in times.items()]
    )
