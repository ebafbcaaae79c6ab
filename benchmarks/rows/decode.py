"""Decode steps over a filled cache: alisa beside transformers' caches, all on the same weights, K and V."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alisa_compile import InfeasibleError
from alisa_compile.kernels import native
from benchmarks.contenders import Alisa, Transformers, Unavailable, quiet_transformers
from benchmarks.decode_attention import Bandwidth, cache_bytes
from benchmarks.memory import allocated
from benchmarks.models import history_of, llama
from benchmarks.outcome import GateFailed, Measure, Outcome, Verdict, floor_ms
from benchmarks.timing import ROUNDS, Times, alternate, steps

ROOM = 64  # tokens beyond the history
_CYCLE = 32  # steps: a cycle of refreshes is what the mean of alisa's has to cover
_FEWEST = 3  # of a peer's, however slow
_EMPTY = 16  # tokens of a context that costs nothing, yet makes a step a decode step
_COMPILES = 3  # steps before the clock starts; torch compiles for one length, then for any
#: Root mean square of the difference of logits, relative to that of the logits. Rounding in another order is worth
#: some; how much, the stock model says by doing its own attention in two ways. Attending to all rows instead of those
#: chosen is worth 0.9 and more, so the most that may be excused is far below.
_TIMES_NOISE, _LEAST, _MOST = 3.0, 1e-3, 0.3
LEFT_OUT = "left out of this row, where it takes a minute or more"
_CHECKED = 2  # sequences, the first and the last: they know nothing of each other, and the stock model is slow


#: transformers' ("hf") caches, each eager and, where it can be, compiled by Inductor. `generate` takes the first.
PEERS: tuple[tuple[str, str, bool], ...] = (
    ("hf dynamic (default)", "dynamic", False),
    ("hf dynamic, Inductor", "dynamic", True),
    ("hf static", "static", False),
    ("hf static, Inductor", "static", True),
    ("hf quantized fp8", "fp8", False),
    ("hf quantized quanto", "quanto", False),
    ("hf offloaded", "offloaded", False),
)


def check(ours: Alisa) -> None:
    """One step's logits beside those of the stock model attending to the same rows; `ours` has just been filled."""
    kept = ours.kept()
    if not bool((kept == kept[0]).all()):
        raise GateFailed("the layers keep different rows of the same history")
    batch = ours.history.batch
    count = min(batch, _CHECKED)
    chosen = [round(number * (batch - 1) / max(1, count - 1)) for number in range(count)]
    found = ours.step().float()[chosen]
    expected, other = (_stock_logits(ours, chosen, kept[0], attention) for attention in ("sdpa", "eager"))
    size = expected.norm()
    off, noise = float((found - expected).norm() / size), float((other - expected).norm() / size)
    limit = min(max(_LEAST, _TIMES_NOISE * noise), _MOST)
    if not off <= limit:
        raise GateFailed(f"logits are {off:.2g} off those of stock transformers on the same rows (limit {limit:.2g})")


def _stock_logits(ours: Alisa, chosen: list[int], kept: torch.Tensor, attention: str) -> torch.Tensor:
    model = ours.model
    before = model.config._attn_implementation
    stock = Transformers(model, ours.history, ROOM, "dynamic", chosen=chosen)
    stock.fill(as_int8=ours.store.is_int8)
    model.set_attn_implementation(attention)
    try:
        return stock.step(kept[chosen]).float()
    finally:
        model.set_attn_implementation(before)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A contender with a full cache. kv_bytes: that a step has to read; held: that its cache takes."""

    who: str
    step: Callable[[], Any]
    kv_bytes: int
    held: int
    note: str = ""


class _Bench:
    """One model with its weights, and what a row has found so far."""

    def __init__(
        self, shape: str, tokens: int, batch: int, seconds: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        quiet_transformers()
        native.register_native()
        self.model = llama(shape, dtype, tokens + 2 * ROOM)
        self.history = history_of(self.model, batch, tokens)
        self.seconds = seconds
        self.weights = sum(parameter.nbytes for parameter in self.model.parameters())
        self.bandwidth = Bandwidth(cache_bytes() if seconds > 0.1 else 1 << 20)
        self.read = self.bandwidth.measure()
        self.measures: list[Measure] = []

    def alisa(self, who: str, **options: Any) -> Times | None:
        """Fill, check, measure over a cycle of refreshes."""
        try:
            entry = self.filled(who, Alisa(self.model, self.history, ROOM, **options))
        except InfeasibleError as error:
            self.measures.append(Measure(who, None, str(error).split(";")[0]))
            return None
        return self.alone(entry, fewest=_CYCLE)

    def filled(self, who: str, contender: Alisa) -> _Entry:
        """With its history, and checked."""
        _, memory = allocated(contender.fill)
        check(contender)
        note = ""
        if contender.store.is_tiered:
            note = f"{contender.store.bytes_by_tier()['device'] / 2**20:.0f} MiB of it on the device"
        return _Entry(who, contender.step, contender.kv_bytes, memory.held, note)

    def peer(self, who: str, kind: str, compiled: bool, budget: int | None = None) -> Times | None:
        """budget: bytes that the device is supposed to have for K and V."""
        contender = Transformers(self.model, self.history, ROOM, kind, compiled)
        try:
            _, memory = allocated(contender.fill)
            note = "" if budget is None or memory.held <= budget else "K and V are over the device budget"
            entry = _Entry(who, contender.step, self.dense_bytes(), memory.held, note)
            return self.alone(entry, fewest=_FEWEST, compiles=compiled)
        except Unavailable as reason:
            self.measures.append(Measure(who, None, str(reason)))
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            self.measures.append(Measure(who, None, f"out of memory: {str(error).splitlines()[0][:80]}"))
        return None

    def dense_bytes(self) -> int:
        """K and V of the whole context and the coming token, in the model's dtype."""
        history = self.history
        row = 2 * history.kv_heads * history.head_dim * history.dtype.itemsize
        layers = int(self.model.config.num_hidden_layers)
        return row * layers * history.batch * (history.tokens + 1)

    def alone(self, entry: _Entry, fewest: int, compiles: bool = True) -> Times:
        """Steps in a row. Those whose memory is counted come first and warm up."""
        peak = self.peak(entry, compiles)
        times = steps(entry.step, fewest=fewest, most=_CYCLE, seconds=self.seconds)
        self.note(entry, times, peak)
        return times

    def together(self, entries: list[_Entry]) -> dict[str, Times]:
        """Entries that fit memory together take turns, so that a slow minute of the machine is everybody's."""
        peaks = [self.peak(entry) for entry in entries]
        times = alternate({entry.who: entry.step for entry in entries}, seconds=self.seconds, most=_CYCLE // ROUNDS + 2)
        for entry, peak in zip(entries, peaks, strict=True):
            self.note(entry, times[entry.who], peak)
        return times

    def peak(self, entry: _Entry, compiles: bool = True) -> int:
        """Bytes that a step allocates on top of what the cache holds, once everything is compiled."""
        for _ in range(_COMPILES if compiles else 0):
            entry.step()
        _, memory = allocated(entry.step, entry.step)
        return memory.peak

    def note(self, entry: _Entry, times: Times, peak: int) -> None:
        """A line of the table."""
        nbytes = self.weights + entry.kv_bytes
        self.measures.append(
            Measure(
                entry.who,
                times,
                entry.note,
                bytes=nbytes,
                floor_ms=floor_ms(nbytes, self.read),
                kv_bytes=entry.held,
                peak_bytes=entry.held + peak,
                tokens_per_s=self.history.batch / times.mean * 1e3,
            )
        )
        gc.collect()


@torch.no_grad()
def side_by_side(
    shape: str,
    tokens: int,
    batch: int,
    left_out: Sequence[str] = (),
    device_share: float = 0.25,
    seconds: float = 1.5,
) -> Outcome:
    """Everybody, one after the other: their caches do not fit memory together.

    left_out: peers that would take a minute or more.
    """
    bench = _Bench(shape, tokens, batch, seconds)
    budget = int(device_share * bench.dense_bytes())
    bench.alisa("alisa, 80 %", sparsity=0.8)
    bench.alisa("alisa, 80 %, int8", sparsity=0.8, kv_dtype="int8")
    below = {"device_kv_budget": budget, "host_kv_budget": 2 * bench.dense_bytes()}
    bench.alisa(f"alisa, {device_share:.0%} on device", sparsity=0.8, **below)
    for who, kind, compiled in PEERS:
        if who in left_out:
            bench.measures.append(Measure(who, None, LEFT_OUT))
        else:
            bench.peer(who, kind, compiled, budget)
    return Outcome(bench.measures)


@torch.no_grad()
def phase_one(shape: str, tokens: int, batch: int, seconds: float = 3.0) -> Outcome:
    """Dense, with room for everything: what alisa costs, or saves, where it has nothing to do."""
    bench = _Bench(shape, tokens, batch, seconds)
    ours = bench.alisa("alisa, dense", sparsity=0.0, device_kv_budget=2 * bench.dense_bytes())
    found = [bench.peer(f"hf {kind}, Inductor", kind, True) for kind in ("static", "dynamic")]
    best = min(times.p50 for times in found if times is not None)
    assert ours is not None  # there is room for everything twice
    text = f"{ours.p50 / best:.3f} x the best of Inductor alone, at most 1.03 wanted"
    return Outcome(bench.measures, [Verdict(text, ours.p50 <= 1.03 * best)])


@torch.no_grad()
def of_ceiling(shape: str, tokens: int, batch: int, left_out: Sequence[str] = (), seconds: float = 4.0) -> Outcome:
    """The ceiling: a step at an empty context, and the working set's bytes at the read bandwidth, in the same run.

    left_out: as in `side_by_side`.
    """
    bench = _Bench(shape, tokens, batch, seconds)
    ours = Alisa(bench.model, bench.history, ROOM, sparsity=0.8, kv_dtype="int8")
    entry = bench.filled("alisa, 80 %, int8", ours)
    short = dataclasses.replace(bench.history, tokens=_EMPTY)
    empty, stock = ours.over(short), Transformers(bench.model, short, ROOM, "dynamic")
    empty.fill()
    stock.fill()
    found = bench.together(
        [
            entry,
            _Entry(f"alisa, {_EMPTY} tokens", empty.step, 0, 0),
            _Entry(f"hf dynamic, {_EMPTY} tokens", stock.step, 0, 0),
        ]
    )
    read = max(bench.read, bench.bandwidth.measure())
    least = min([who for who in found if who != entry.who], key=lambda who: found[who].p50)
    ceiling = found[least].p50 + floor_ms(entry.kv_bytes, read)
    peers = {who: bench.peer(who, kind, compiled) for who, kind, compiled in PEERS[:4] if who not in left_out}
    bench.measures += [Measure(who, None, LEFT_OUT) for who, _, _ in PEERS[:4] if who not in peers]
    timed = {who: times for who, times in peers.items() if times is not None}
    default, best = timed[PEERS[0][0]], min(timed, key=lambda who: timed[who].p50)
    mean = found[entry.who].mean
    verdicts = [
        Verdict(
            f"{ceiling / mean:.0%} of the ceiling of {ceiling:.1f} ms ({least}: {found[least].p50:.1f} ms, and "
            f"{entry.kv_bytes / 1e6:.0f} MB at {read / 1e9:.1f} GB/s), at least 80 % wanted",
            ceiling / mean >= 0.8,
        ),
        Verdict(
            f"{timed[best].mean / mean:.2f} x as fast as {best}, the best of transformers", timed[best].mean > mean
        ),
        Verdict(f"{default.mean / mean:.2f} x as fast as {PEERS[0][0]}", default.mean > mean),
    ]
    return Outcome(bench.measures, verdicts)


@torch.no_grad()
def fixed_rows(shape: str, lengths: list[int], max_rows: int, seconds: float = 1.5) -> Outcome:
    """The same working set at every context: attention stays what it is, ranking all scores does not."""
    bench = _Bench(shape, max(lengths), 1, seconds)
    first = Alisa(bench.model, bench.history, ROOM, sparsity=0.8, max_rows=max_rows, refresh=0)
    contenders = {tokens: first.over(dataclasses.replace(bench.history, tokens=tokens)) for tokens in lengths}
    names = {tokens: f"{tokens} tokens" for tokens in lengths}
    found = bench.together([bench.filled(names[tokens], contender) for tokens, contender in contenders.items()])
    apart = alternate({names[tokens]: _selection(contender) for tokens, contender in contenders.items()}, seconds=0.3)
    layers = first.model.config.num_hidden_layers
    for name, times in apart.items():
        scaled = [layers * value for value in (times.p50, times.p20, times.p80, times.mean)]
        bench.measures.append(Measure(f"{name}, selection", Times(*scaled, times.calls)))
    whole = [found[name].p50 for name in names.values()]  # no step refreshes, so all are alike
    rest = [found[name].p50 - layers * apart[name].p50 for name in names.values()]
    verdicts = [
        Verdict(f"{what}: the dearest is {max(ms) / min(ms):.2f} x the cheapest, at most 1.25 wanted",
                max(ms) <= 1.25 * min(ms))
        for what, ms in (("a step", whole), ("a step without selection", rest))
    ]  # fmt: skip
    return Outcome(bench.measures, verdicts)


def _selection(contender: Alisa) -> Callable[[], None]:
    """One layer's, on a copy of the contender's store."""
    store = contender.store.copy()
    mass = torch.zeros((1, store.groups, store.capacity))

    def select() -> None:
        torch.ops.alisa.kv_select.default(
            store.scores, store.rows, store.counts, mass, store.length, store.origin, None, 0, store.spec
        )

    return select
