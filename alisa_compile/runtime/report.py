"""What happened: counters that the runtime fills and the report that a user prints."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from .budgets import format_bytes
from .tiers import Tier

if TYPE_CHECKING:  # plan imports store, which imports this
    from .forecast import Forecast

#: What a store counts since its start; `stalled_ns`: waiting for transfers, `disk_stalled_ns`: of this, for the disk. A
#: row is K and V of one token in one layer, sequence and group.
COUNTERS = (
    "device_to_host",
    "host_to_device",
    "disk_write",
    "disk_read",
    "stalled_ns",
    "disk_stalled_ns",
    "rows_missed",
    "rows_recomputed",
    "recompute_ns",
)
#: Nats. Text of the dense model is about 10 % more perplexing to one that differs by so much on average.
UNSAFE_KL = 0.1
_PHASES = {"I": "all rows on the device", "II": "rows below the device", "III": "the oldest rows deleted"}
_WIDTH = 79


@dataclasses.dataclass(frozen=True)
class SkipRow:
    """An attention that was left dense, and why."""

    node: str
    layer: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class ValidatedStep:
    """A decode step beside the same one with dense attention.

    tokens: next tokens compared, one of each sequence that runs. same: those that both find likeliest. divergence: the
    sum over them of KL(dense || sparse), nats.
    """

    tokens: int
    same: int
    divergence: float


@dataclasses.dataclass(frozen=True)
class Validation:
    """Decode steps beside dense attention. agreement: share of next tokens that both find likeliest.

    kl: mean of KL(dense || sparse), nats.
    """

    steps: int
    tokens: int
    agreement: float
    kl: float

    @classmethod
    def of(cls, steps: Sequence[ValidatedStep]) -> Validation | None:
        """All steps together; None where nothing was compared."""
        tokens = sum(step.tokens for step in steps)
        if tokens == 0:
            return None
        same, divergence = sum(step.same for step in steps), sum(step.divergence for step in steps)
        return cls(len(steps), tokens, same / tokens, divergence / tokens)

    @property
    def is_unsafe(self) -> bool:
        """Whether the next tokens differ too much. What only later questions ask for is not seen here."""
        return self.kl > UNSAFE_KL

    def __str__(self) -> str:
        limit = f"{'above' if self.is_unsafe else 'within'} {UNSAFE_KL}"
        return f"{self.agreement:.0%} of {self.tokens} likeliest tokens equal, KL {self.kl:.2g} nats ({limit})"


@dataclasses.dataclass(frozen=True)
class CompileRow:
    """One graph that the backend compiled."""

    stage: str
    rewritten: int
    skipped: tuple[SkipRow, ...]
    seconds: float


class RunStatistics:
    """Counters of one store; `graphs` may be shared by the successive stores of one compiled model.

    forecast: of the call that runs, if there is one. budget_bytes: by tier, those that the store was placed within;
    None = it was placed without. counters_before, counters_after_prefill: of the store, as in COUNTERS, before the
    first step, and before the first of one token; the latter None where steps of several tokens came after it.
    """

    def __init__(self, graphs: dict[int, CompileRow] | None = None) -> None:
        self.graphs: dict[int, CompileRow] = {} if graphs is None else graphs
        self.peak_bytes: dict[str, int] = {}
        self.forecast: Forecast | None = None
        self.budget_bytes: dict[str, int] | None = None
        self.counters_before = (0,) * len(COUNTERS)
        self.restart()

    def restart(self) -> None:
        """Forget the steps and the forecast; graphs, peaks and budgets stay."""
        self.decode_ms: list[float] = []
        # Length, tokens since the last dense block, sparse layers.
        self.decode_steps: list[tuple[int, int, int]] = []
        self.prefill_ms: list[float] = []
        self.phases: list[str] = []
        self.validated: list[ValidatedStep] = []
        self.forecast = None
        self.counters_after_prefill: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Forward passes."""
        return len(self.phases)

    def note_bytes(self, tier: str, nbytes: int) -> None:
        """Remember the peak of a tier."""
        self.peak_bytes[tier] = max(self.peak_bytes.get(tier, 0), nbytes)

    def note_step(
        self, new_tokens: int, length: int, since: int, sparse_layers: int, elapsed_ms: float, phase: str
    ) -> None:
        """One forward pass has run. On a GPU the time is that of the launch, not of the kernels.

        phase: `I`, or `II` from the first step on that has rows below the device.
        """
        self.phases.append(phase)
        if new_tokens == 1:
            self.decode_ms.append(elapsed_ms)
            self.decode_steps.append((length, since, sparse_layers))
        else:
            self.prefill_ms.append(elapsed_ms)
            self.counters_after_prefill = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `alisa_compile.report(model)`: print it, or take `.to_dict()`.

    Sparsity and step times are those of steps of one token; the blocks of assisted decoding are not in them.
    `step_ms` is the compiled call alone; Dynamo's guards and transformers' own work between steps are not in it.
    phases: of each step. moved: by name in COUNTERS, in these steps. predicted_ms: of each step of the plan, the
    prefill first; none without a plan. corrected_ms: the same with the churn that was measured. churn: expected and
    measured, of the dynamic rows. budget_bytes: None = not known. Other bytes are by tier as well.
    """

    steps: int
    tokens: int
    batch_size: int
    capacity: int
    sparsity: float
    sparsity_by_step: tuple[float, ...]
    phase_by_step: tuple[str, ...]
    peak_bytes: dict[str, int]
    budget_bytes: dict[str, int] | None
    bytes_per_row: dict[str, int]
    moved: dict[str, int]
    graphs: tuple[CompileRow, ...]
    decode_ms: tuple[float, ...]
    prefill_ms: tuple[float, ...]
    predicted_ms: tuple[float, ...] = ()
    corrected_ms: tuple[float, ...] = ()
    churn: tuple[float | None, float | None] = (None, None)
    validation: Validation | None = None  # with option `validate`
    bytes_saved: int = 0  # on the host, by K and V that are deleted now, less what they are rebuilt from
    left_out: tuple[SkipRow, ...] = ()  # why the latest call had no AlisaCache, for each attention layer

    @classmethod
    def without_cache(cls, left_out: tuple[SkipRow, ...]) -> Report:
        """Of a call that used transformers' own cache."""
        nothing = dict.fromkeys(COUNTERS, 0)
        return cls(0, 0, 0, 0, 0.0, (), (), {}, None, {}, nothing, (), (), (), left_out=left_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the key names that scripts rely on. What is not known is None."""
        tiers = [tier.value for tier in Tier]
        return {
            "phases": self.phases,
            "steps": self.steps,
            "tokens": self.tokens,
            "batch_size": self.batch_size,
            "capacity": self.capacity,
            "sparsity": self.sparsity,
            "effective_sparsity": self.effective_sparsity,
            "effective_sparsity_by_step": list(self.sparsity_by_step),
            "peak_bytes": {tier: self.peak_bytes.get(tier, 0) for tier in tiers},
            "budget_bytes": {tier: None if self.budget_bytes is None else self.budget_bytes[tier] for tier in tiers},
            "bytes_per_row": dict(self.bytes_per_row),
            "bytes_moved": self.bytes_moved,
            "misses": self.moved["rows_missed"],
            "rows_recomputed": self.moved["rows_recomputed"],
            "recompute_ms": self.moved["recompute_ns"] / 1e6,
            "bytes_saved": self.bytes_saved,
            "graphs_compiled": len(self.graphs),
            "recompiles": self.recompiles,
            "rewritten": {row.stage: row.rewritten for row in self.graphs},
            "step_ms": self.step_ms,
            "prefill_ms": list(self.prefill_ms),
            "predicted_step_ms": _median_step(self.predicted_ms),
            "corrected_step_ms": _median_step(self.corrected_ms),
            "churn": dict(zip(("expected", "measured"), self.churn, strict=True)),
            "stall_ms": self.moved["stalled_ns"] / 1e6,
            "disk_stall_ms": self.moved["disk_stalled_ns"] / 1e6,
            "validation": None if self.validation is None else dataclasses.asdict(self.validation),
            "skipped": [dataclasses.asdict(row) for row in self.skipped],
        }

    @property
    def phases(self) -> list[dict[str, Any]]:
        """{phase, first_step, last_step}, in order; step 0 is the first forward pass."""
        found, first = [], 0
        for name, steps in itertools.groupby(self.phase_by_step):
            last = first + len(list(steps)) - 1
            found.append({"phase": name, "first_step": first, "last_step": last})
            first = last + 1
        return found

    @property
    def bytes_moved(self) -> dict[str, int]:
        """Between tiers, in all steps; copies inside the device are not in it."""
        return {name: self.moved[name] for name in COUNTERS[:4]}

    @property
    def effective_sparsity(self) -> float:
        """Share of past rows left out, averaged over the decode steps and layers, dense refresh rows included."""
        return statistics.fmean(self.sparsity_by_step) if self.sparsity_by_step else 0.0

    @property
    def step_ms(self) -> dict[str, float | None]:
        """Median and 99th percentile of the decode steps."""
        if not self.decode_ms:
            return {"p50": None, "p99": None}
        ordered = sorted(self.decode_ms)
        return {
            "p50": statistics.median(ordered),
            "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        }

    @property
    def recompiles(self) -> int:
        """Graphs beyond the first of each stage."""
        return len(self.graphs) - len({row.stage for row in self.graphs})

    @property
    def skipped(self) -> tuple[SkipRow, ...]:
        """Attention left dense, each case once."""
        return tuple(dict.fromkeys((*self.left_out, *(row for graph in self.graphs for row in graph.skipped))))

    def _rows(self) -> list[tuple[str, str]]:
        step = self.step_ms
        times = "no decode step yet"
        if step["p50"] is not None:
            times = f"{step['p50']:.2f} / {step['p99']:.2f} ms"
        rows = [
            *((f"phase {phase['phase']}", _phase(phase)) for phase in self.phases),
            ("forward passes", f"{self.steps} ({len(self.decode_ms)} decode steps), batch {self.batch_size}"),
            ("tokens stored", f"{self.tokens} of {self.capacity} per sequence"),
            ("sparsity", f"{self.sparsity:.0%} asked, {self.effective_sparsity:.1%} on average, refresh included"),
        ]
        for tier, peak in self.peak_bytes.items():
            limit = "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes[tier])}"
            if peak or tier == Tier.DEVICE.value:
                each = f", {self.bytes_per_row[tier]} B a row" if tier in self.bytes_per_row else ""
                rows.append((f"peak bytes, {tier}", f"{format_bytes(peak)}{limit}{each}"))
        moved = ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in self.bytes_moved.items() if n)
        rows.append(("bytes moved", moved or "0"))
        if self.moved["rows_missed"]:
            rows.append(("rows missed", f"{self.moved['rows_missed']}: no slot was free, so attention fetched them"))
        if self.moved["rows_recomputed"] or self.bytes_saved:
            rebuilt, spent = self.moved["rows_recomputed"], self.moved["recompute_ns"] / 1e6
            saved = format_bytes(self.bytes_saved)
            rows.append(("rows recomputed", f"{rebuilt} in {spent:.2f} ms; {saved} of the host saved by deleting rows"))
        rows.append(("step time, p50 / p99", times))
        predicted, corrected = _median_step(self.predicted_ms), _median_step(self.corrected_ms)
        expected, measured = self.churn
        if predicted is not None:
            after = "" if corrected is None else f", {corrected:.2f} ms with the churn as measured"
            rows.append(("step time, predicted", f"{predicted:.2f} ms{after}"))
        if expected is not None and measured is not None:
            rows.append(("dynamic rows new in a step", f"{expected:.2%} expected, {measured:.2%} measured"))
        if self.moved["stalled_ns"]:
            stalled, disk = (self.moved[name] / 1e6 for name in ("stalled_ns", "disk_stalled_ns"))
            rows.append(("waited for transfers", f"{stalled:.2f} ms in all, {disk:.2f} ms of it for the disk"))
        if self.validation is not None:
            rows.append((f"{self.validation.steps} steps beside dense", str(self.validation)))
        return [
            *rows,
            ("graphs compiled", _graphs(self.graphs)),
            ("recompiles", str(self.recompiles)),
            ("attention left dense", _skips(self.skipped)),
        ]

    def __str__(self) -> str:
        rows = self._rows()
        left = _WIDTH - max(len(name) for name, _ in rows) - 2
        wrapped = [(name, textwrap.fill(text, left)) for name, text in rows]
        return str(tabulate(wrapped, tablefmt="simple", disable_numparse=True))

    def _repr_html_(self) -> str:
        return str(tabulate(self._rows(), tablefmt="html", disable_numparse=True))


def merged(counters: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Counters of several stores, as in COUNTERS, added up by name."""
    return dict(zip(COUNTERS, map(sum, zip(*counters, strict=True)), strict=True))


def _median_step(planned_ms: Sequence[float]) -> float | None:
    """Median of a plan's decode steps; None without a plan."""
    return statistics.median(planned_ms[1:]) if planned_ms[1:] else None


def _phase(phase: dict[str, Any]) -> str:
    return f"steps {phase['first_step']} to {phase['last_step']}: {_PHASES[phase['phase']]}"


def _graphs(graphs: tuple[CompileRow, ...]) -> str:
    parts = [f"{row.stage} ({row.rewritten} rewritten, {row.seconds:.1f} s)" for row in graphs]
    return f"{len(graphs)}: {', '.join(parts)}" if parts else "none (eager)"


def _skips(skips: tuple[SkipRow, ...]) -> str:
    return "; ".join(f"layer {row.layer}: {row.reason}" for row in skips) or "none"
