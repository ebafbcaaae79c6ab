"""Decode attention on CPU: the working set's bytes per second, beside what this machine reads and torch's attention.

A round times, one after the other, the kernel (also with every position in one of four slots, so that rows come from
the first cache: its arithmetic), a loop that only reads the rows of the working set (the gather floor: what any kernel
over rows at these places has to wait for), torch's attention over all of K and V (in its packed form: query heads that
share a KV head are query rows, the fast form on CPU) and two plain reads of a buffer far larger than the cache. Calls
rotate through layers, so that rows come from memory. The working set is a random set of positions in ascending order:
no recent run of neighbours, which a real one has, helps. No time is printed unless the output and the mass are those of
the plain-torch reference in float64.

Why the share of the linear read is below 0.7 (two virtual CPUs of an AMD EPYC with AVX-512, 16k tokens, 80 %; in
results/decode_attention.json 0.59 with bf16 and 0.47 with int8 rows, where linear reads ran at 46 GB/s):

- The order of reads decides on the gather floor. In blocks of 30 calls in this process, one row of 4 KiB after the
  other got 0.77 of the linear read, two in turn 0.89, eight in turn 0.91 (int8 rows: 0.80, 0.87, 0.82). An earlier
  loop of this file got 0.67: gcc stored every line on the stack as well. In a round, where each layer is read once
  after other work, the floor is 0.69 (int8 rows: 0.61 to 0.69).
- Rows that begin 64 bytes behind a page, where malloc puts them, read 5 to 20 % slower in a loop of their own; in the
  kernel pools that begin at a page made no difference that could be seen.
- The kernel takes 0.49 and 0.33 ms, 0.18 and 0.23 ms of it are arithmetic ("in cache ms"): about a sixth the softmax,
  a fifth what reads no rows (sums of blocks, the mass, the call itself: 8 us). Its time is near the floor and this
  arithmetic one after the other. Asking for the next rows in the softmax, too, gained 1 to 8 % with bf16 rows and lost
  up to a fifth with int8 rows; it is not in.
- The machine is not constant: the same linear read gets 42 to 48 GB/s in some minutes and 75 to 90 in others, the
  arithmetic 158 to 250 us (bf16) and 150 to 240 us (int8). Two loops of multiply-adds do not slow each other down, so
  these are two cores; what else the host does cannot be seen from here. At 80 GB/s int8 rows would be due in 124 us,
  less than their arithmetic takes.

    python -m benchmarks.decode_attention [--rounds 7] [--threads 2] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from alisa_compile import compat, kernels
from alisa_compile.kernels import native
from alisa_compile.runtime.tiers import Pool, RowForm, RowShape, Tier, advise_huge_pages
from benchmarks.machine import machine_line

RESULTS = Path(__file__).parent / "results" / "decode_attention.json"
HEADS, GROUP, HEAD_DIM = 8, 4, 128
SHARE = 0.7  # of the measured read bandwidth
RATIO = {torch.bfloat16: 6.0, torch.int8: 8.0}  # times torch's attention, at 16k tokens and 80 %
_READ = r"""
#include <torch/csrc/stable/c/shim.h>
#include <cstdint>
#include <cstring>
typedef int64_t Line __attribute__((vector_size(64)));
extern "C" void read_all(const int64_t* words, int64_t* sums, int64_t parts, int64_t part) {
  struct Work { const int64_t* words; int64_t* sums; int64_t part; } work{words, sums, part};
  torch_parallel_for(0, parts, 1, [](int64_t begin, int64_t end, void* context) {
    const Work& own = *static_cast<const Work*>(context);
    for (int64_t p = begin; p < end; ++p) {
      int64_t sum = 0;
      for (int64_t i = 0; i < own.part; ++i) sum += own.words[p * own.part + i];
      own.sums[p] = sum;
    }
  }, &work);
}
// Whole rows of `words` int64 each and, unless null, their `scale_words` of scales: by slot, two rows at a time, two
// lines of each in turn, four rows ahead: one row after the other reads a tenth slower. A line is loaded by itself: a
// copy of two goes through the stack.
extern "C" void read_rows(const int64_t* pool, const int64_t* scales, const int32_t* slots, int64_t* sums,
                          int64_t parts, int64_t count, int64_t words, int64_t scale_words) {
  struct Work { const int64_t *pool, *scales; const int32_t* slots; int64_t *sums, parts, count, words, scale_words; };
  Work work{pool, scales, slots, sums, parts, count, words, scale_words};
  torch_parallel_for(0, parts, 1, [](int64_t begin, int64_t end, void* context) {
    const Work& own = *static_cast<const Work*>(context);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = own.count * p / own.parts, last = own.count * (p + 1) / own.parts;
      int64_t sum = 0;
      Line sums[2] = {};
      const auto slot = [&](int64_t i) { return own.slots[i < own.count ? i : own.count - 1]; };
      for (int64_t i = first; i < last; i += 2) {
        const int64_t *rows[2], *ahead[2];
        for (int k = 0; k < 2; ++k) {
          const int64_t here = slot(i + k), later = slot(i + k + 4);
          rows[k] = own.pool + here * own.words;
          ahead[k] = own.pool + later * own.words;
          if (own.scale_words) __builtin_prefetch(own.scales + slot(i + k + 32) * own.scale_words);
          for (int64_t w = 0; w < own.scale_words; ++w) sum += own.scales[here * own.scale_words + w];
        }
        for (int64_t at = 0; at < own.words; at += 16) {
          for (int k = 0; k < 2; ++k) {
            __builtin_prefetch(ahead[k] + at);
            __builtin_prefetch(ahead[k] + at + 8);
            Line line;
            std::memcpy(&line, rows[k] + at, sizeof(line));
            sums[0] += line;
            std::memcpy(&line, rows[k] + at + 8, sizeof(line));
            sums[1] += line;
          }
        }
      }
      for (int64_t k = 0; k < 8; ++k) sum += sums[0][k] + sums[1][k];
      own.sums[p] = sum;
    }
  }, &work);
}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: torch.dtype
    sparsity: float
    tokens: int
    batch: int = 1

    @property
    def attended(self) -> int:
        """Rows of the working set of one sequence."""
        return self.tokens - int(self.tokens * self.sparsity)

    @property
    def bytes(self) -> int:
        """Bytes of the working set: K and V, and the scales of int8 rows."""
        row = 2 * HEADS * (HEAD_DIM * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0))
        return self.batch * self.attended * row

    @property
    def name(self) -> str:
        """As the table prints it."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind} {self.sparsity:.0%} sparse, {self.tokens // 1024}k tokens, batch {self.batch}"


CASES = (
    Case(torch.bfloat16, 0.8, 16384),
    Case(torch.int8, 0.8, 16384),
    Case(torch.bfloat16, 0.0, 16384),
    Case(torch.int8, 0.0, 16384),
    Case(torch.bfloat16, 0.8, 4096),
    Case(torch.int8, 0.8, 4096),
    Case(torch.bfloat16, 0.8, 65536),
    Case(torch.int8, 0.8, 65536),
    Case(torch.bfloat16, 0.8, 16384, batch=8),
    Case(torch.int8, 0.8, 16384, batch=8),
)
QUICK = (Case(torch.bfloat16, 0.8, 1024), Case(torch.int8, 0.8, 1024), Case(torch.bfloat16, 0.0, 1024, batch=2))


def cache_bytes() -> int:
    """Size of the last-level cache; 64 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=64 << 20)


class Attention:
    """The kernel's arguments for a case, in as many layers as it takes to leave the cache; and torch's."""

    def __init__(self, case: Case, cache: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        tokens, batch = case.tokens, case.batch
        dense_bytes = Case(torch.bfloat16, 0, tokens, batch).bytes
        self.layers = max(1, min(math.ceil(4 * cache / case.bytes), (2 << 30) // dense_bytes))
        self.torch_layers = max(1, min(self.layers, math.ceil(4 * cache / dense_bytes)))
        slots = self.layers * batch * tokens
        some = torch.randn((1024, 2, HEADS, HEAD_DIM), generator=generator)
        if case.dtype == torch.int8:
            some = (some * 40).round().clamp(-127, 127)
        form = RowForm.KV_INT8 if case.dtype == torch.int8 else RowForm.KV
        shape = RowShape(HEADS, HEAD_DIM, torch.bfloat16, form)
        pool = Pool.allocate(Tier.DEVICE, shape, slots, torch.device("cpu"))
        self.pool, self.scales = pool.rows, pool.scales
        if self.scales is not None:
            self.scales.uniform_(0, 1 / 64, generator=generator)
        self.pool.view(-1, *some.shape).copy_(some)
        self.table = torch.arange(slots, dtype=torch.int32).view(self.layers, batch, 1, tokens)
        self.cached_table = self.table % 4  # every position in one of four slots, which the first cache holds
        self.length = torch.full((self.layers,), tokens)
        self.query = torch.randn((batch, HEADS * GROUP, 1, HEAD_DIM), generator=generator).bfloat16()
        self.rows = self.counts = None
        if case.sparsity:
            chosen = torch.rand((self.layers, batch, 1, tokens), generator=generator).topk(case.attended).indices
            self.rows = chosen.sort().values.to(torch.int32)
            self.counts = torch.full((self.layers, batch, 1), case.attended, dtype=torch.int32)
        slots = self.table.view(self.layers, batch, tokens)
        if self.rows is not None:
            slots = slots.gather(2, self.rows.view(self.layers, batch, case.attended).long())
        self.slots = slots.reshape(self.layers, -1).contiguous()
        block = torch.randn((1, HEADS, 1024, HEAD_DIM), generator=generator).bfloat16().repeat(1, 1, tokens // 1024, 1)
        dense = (self.torch_layers, batch, HEADS, tokens, HEAD_DIM)
        self.key, self.value = torch.empty(dense, dtype=torch.bfloat16), torch.empty(dense, dtype=torch.bfloat16)
        for buffer in (self.key, self.value):  # the same advantage for torch
            advise_huge_pages(buffer)
            buffer.copy_(block)

    def run(
        self, op: Callable[..., Any], layer: int, query: torch.Tensor, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer through the kernel or the reference; table: another one than its own."""
        table = self.table if table is None else table
        result: tuple[torch.Tensor, torch.Tensor] = op(
            query, self.pool, self.scales, table, self.length, None, self.rows, self.counts, layer, self.scale
        )
        return result

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return 1 / math.sqrt(HEAD_DIM)

    def read(self, layer: int, bandwidth: Bandwidth) -> None:
        """Only read what one layer attends to, in the same order."""
        bandwidth.rows(self.pool, self.scales, self.slots[layer])

    def torch_attention(self, layer: int) -> torch.Tensor:
        """Torch's attention over every row, query heads packed by KV head."""
        packed = self.query.view(self.case.batch, HEADS, GROUP, HEAD_DIM)
        return F.scaled_dot_product_attention(packed, self.key[layer], self.value[layer], scale=self.scale)


def attend(*args: Any) -> Any:
    """The op that is measured."""
    return torch.ops.alisa.swa_attention.default(*args)


def check(attention: Attention) -> None:
    """Refuse to measure a kernel whose results are not the reference's."""
    layer = attention.layers - 1
    out, mass = attention.run(attend, layer, attention.query)
    reference = kernels.swa_attention.reference.swa_attention
    expected, expected_mass = attention.run(reference, layer, attention.query.double())
    count = attention.case.attended if mass.shape[-1] else 0
    try:
        torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=2.0**-10)
        torch.testing.assert_close(mass[..., :count].double(), expected_mass[..., :count], rtol=2e-4, atol=2e-6)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"{attention.case.name}: not the reference's result, so no speed is printed: {reason}"
        ) from None


class Bandwidth:
    """Reads of a buffer that does not fit the cache, by torch and by a plain loop in C++, on torch's threads."""

    def __init__(self, cache: int) -> None:
        self.parts, words = 256, max(4 * cache, 1 << 24) // 8
        self.buffer = torch.empty(words // self.parts * self.parts, dtype=torch.int64)
        advise_huge_pages(self.buffer)
        self.buffer.fill_(1)
        self.floats = self.buffer.view(torch.float32)
        self.sums = torch.zeros(self.parts, dtype=torch.int64)
        self.library: ctypes.CDLL = compat.load_cpp_library(_READ)

    def loop(self) -> None:
        """The loop in C++."""
        words, sums = ctypes.c_void_p(self.buffer.data_ptr()), ctypes.c_void_p(self.sums.data_ptr())
        part = self.buffer.numel() // self.parts
        self.library.read_all(words, sums, ctypes.c_int64(self.parts), ctypes.c_int64(part))

    def rows(self, pool: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor) -> None:
        """The loop over whole rows of a pool `[slots, 2, heads, D]`, and their scales, in the order of `slots`."""
        words, scale_words = (0 if each is None else each[0].nbytes // 8 for each in (pool, scales))
        pointers = (None if each is None else each.data_ptr() for each in (pool, scales, slots, self.sums))
        counts = (self.parts, slots.numel(), words, scale_words)
        self.library.read_rows(*map(ctypes.c_void_p, pointers), *map(ctypes.c_int64, counts))

    def measure(self) -> float:
        """Bytes per second of the faster of both."""
        seconds = min(_seconds(self.loop), _seconds(lambda: self.floats.sum()))
        return self.buffer.nbytes / seconds


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(case: Case, rounds: int, bandwidth: Bandwidth, cache: int) -> dict[str, Any]:
    """One row: medians over rounds of each round's median call, and the fastest calls."""
    attention = Attention(case, cache)
    check(attention)
    ours: list[list[float]] = []
    dense: list[list[float]] = []
    gather: list[list[float]] = []
    cached: list[list[float]] = []
    read: list[float] = []
    for _ in range(rounds + 1):  # the first warms up
        calls = max(attention.layers, 8)
        ours.append(
            [_seconds(lambda i=i: attention.run(attend, i % attention.layers, attention.query)) for i in range(calls)]
        )
        cached.append(
            [
                _seconds(
                    lambda i=i: attention.run(attend, i % attention.layers, attention.query, attention.cached_table)
                )
                for i in range(8)
            ]
        )
        gather.append([_seconds(lambda i=i: attention.read(i % attention.layers, bandwidth)) for i in range(calls)])
        calls = max(attention.torch_layers, 3)
        dense.append(
            [_seconds(lambda i=i: attention.torch_attention(i % attention.torch_layers)) for i in range(calls)]
        )
        read.append(bandwidth.measure())
    middle = [statistics.median(calls) for calls in ours[1:]]
    middle_dense = [statistics.median(calls) for calls in dense[1:]]
    seconds, seconds_dense = statistics.median(middle), statistics.median(middle_dense)
    floor = statistics.median(statistics.median(calls) for calls in gather[1:])
    in_cache = statistics.median(statistics.median(calls) for calls in cached[1:])
    best, best_dense, best_floor = (min(map(min, each[1:])) for each in (ours, dense, gather))
    peak = statistics.median(read[1:])
    return {
        "case": case.name,
        "MB": case.bytes / 1e6,
        "ms": seconds * 1e3,
        "GB/s": case.bytes / seconds / 1e9,
        "read GB/s": peak / 1e9,
        "share": case.bytes / seconds / peak,
        "gather GB/s": case.bytes / floor / 1e9,
        "of gather": floor / seconds,
        "in cache ms": in_cache * 1e3,
        "SDPA ms": seconds_dense * 1e3,
        "ratio": seconds_dense / seconds,
        "best ms": best * 1e3,
        "best read GB/s": max(read[1:]) / 1e9,
        "best share": case.bytes / best / max(read[1:]),
        "best gather GB/s": case.bytes / best_floor / 1e9,
        "best of gather": best_floor / best,
        "best SDPA ms": best_dense * 1e3,
        "best ratio": best_dense / best,
    }


def _verdicts(case: Case, row: dict[str, Any]) -> list[str]:
    """The aims for the cases of 16k tokens and one sequence."""
    if case.tokens != 16384 or case.batch != 1:
        return []
    ratio = RATIO[case.dtype] if case.sparsity else 1.0
    wanted = [("share", SHARE)] if case.sparsity else []
    return [
        f"{case.name}: {name} {row[name]:.2f}, at least {limit:g} wanted: {'met' if row[name] >= limit else 'NOT met'}"
        for name, limit in (*wanted, ("ratio", ratio))
    ]


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="short lists and one round, only to see that it runs")
    parser.add_argument("--json", type=Path, help=f"where the numbers go; default {RESULTS.name}, none with --quick")
    options = parser.parse_args(arguments)
    if not native.register_native():
        raise SystemExit("the native kernels cannot be built here, so there is nothing to measure")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        cache = 1 << 20 if options.quick else cache_bytes()
        cases, rounds = (QUICK, 1) if options.quick else (CASES, options.rounds)
        bandwidth, machine = Bandwidth(cache), machine_line()
        rows = [measure(case, rounds, bandwidth, cache) for case in cases]
    finally:
        torch.set_num_threads(before)
    print(machine)
    print(
        f"{HEADS} KV heads, group {GROUP}, head_dim {HEAD_DIM}; median of {rounds} rounds; best = fastest call of all"
    )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.quick:
        print("--quick: these times say nothing about the kernel")
    else:
        print("\n".join(line for case, row in zip(cases, rows, strict=True) for line in _verdicts(case, row)))
    target = options.json or (None if options.quick else RESULTS)
    if target:
        target.write_text(json.dumps({"machine": machine, "rounds": rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
