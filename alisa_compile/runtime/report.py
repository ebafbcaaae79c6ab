"""What happened: counters that the runtime fills and the report that a user prints."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from tabulate import tabulate


@dataclasses.dataclass(frozen=True)
class SkipRow:
    """An attention that was left dense, and why."""

    node: str
    layer: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class CompileRow:
    """One graph that the backend compiled."""

    stage: str
    rewritten: int
    skipped: tuple[SkipRow, ...]
    seconds: float


class RunStatistics:
    """Counters of one store; `graphs` may be shared by the successive stores of one compiled model."""

    def __init__(self, graphs: dict[int, CompileRow] | None = None) -> None:
        self.graphs: dict[int, CompileRow] = {} if graphs is None else graphs
        self.decode_ms: list[float] = []
        self.decode_steps: list[tuple[int, int, int]] = []  # length, tokens since the last dense block, sparse layers
        self.prefill_ms: list[float] = []
        self.steps = 0
        self.peak_bytes: dict[str, int] = {}

    def restart(self) -> None:
        """Forget the steps; graphs and peaks stay."""
        self.decode_ms, self.decode_steps = [], []
        self.prefill_ms, self.steps = [], 0

    def note_bytes(self, tier: str, nbytes: int) -> None:
        """Remember the peak of a tier."""
        self.peak_bytes[tier] = max(self.peak_bytes.get(tier, 0), nbytes)

    def note_step(self, new_tokens: int, length: int, since: int, sparse_layers: int, elapsed_ms: float) -> None:
        """One forward pass has run. On a GPU the time is that of the launch, not of the kernels."""
        self.steps += 1
        if new_tokens == 1:
            self.decode_ms.append(elapsed_ms)
            self.decode_steps.append((length, since, sparse_layers))
        else:
            self.prefill_ms.append(elapsed_ms)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `alisa_compile.report(model)`: print it, or take `.to_dict()`.

    Sparsity and step times are those of steps of one token; the blocks of assisted decoding are not in them.
    `step_ms` is the compiled call alone; Dynamo's guards and transformers' own work between steps are not in it.
    """

    steps: int
    tokens: int
    batch_size: int
    capacity: int
    sparsity: float
    sparsity_by_step: tuple[float, ...]
    peak_bytes: dict[str, int]
    bytes_per_row: dict[str, int]
    graphs: tuple[CompileRow, ...]
    decode_ms: tuple[float, ...]
    prefill_ms: tuple[float, ...]
    left_out: tuple[SkipRow, ...] = ()  # why the latest call had no AlisaCache, for each attention layer

    @classmethod
    def without_cache(cls, left_out: tuple[SkipRow, ...]) -> Report:
        """Of a call that used transformers' own cache."""
        return cls(0, 0, 0, 0, 0.0, (), {}, {}, (), (), (), left_out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the key names that scripts rely on. Parts not built yet are None or zero."""
        return {
            "phases": [{"phase": "I", "first_step": 0, "last_step": self.steps - 1}] if self.steps else [],
            "steps": self.steps,
            "tokens": self.tokens,
            "batch_size": self.batch_size,
            "capacity": self.capacity,
            "sparsity": self.sparsity,
            "effective_sparsity": self.effective_sparsity,
            "effective_sparsity_by_step": list(self.sparsity_by_step),
            "peak_bytes": dict(self.peak_bytes),
            "budget_bytes": {"device": None, "host": None, "disk": 0},
            "bytes_per_row": dict(self.bytes_per_row),
            "bytes_moved": {"device_to_host": 0, "host_to_device": 0, "disk_write": 0, "disk_read": 0},
            "rows_recomputed": 0,
            "graphs_compiled": len(self.graphs),
            "recompiles": self.recompiles,
            "rewritten": {row.stage: row.rewritten for row in self.graphs},
            "step_ms": self.step_ms,
            "prefill_ms": list(self.prefill_ms),
            "predicted_step_ms": None,
            "skipped": [dataclasses.asdict(row) for row in self.skipped],
        }

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

    def __str__(self) -> str:
        step = self.step_ms
        rows = [
            ("phase", "I (all KV on the device)"),
            ("forward passes", f"{self.steps} ({len(self.decode_ms)} decode steps), batch {self.batch_size}"),
            ("tokens stored", f"{self.tokens} of {self.capacity} per sequence"),
            ("sparsity", f"{self.sparsity:.0%} asked, {self.effective_sparsity:.1%} on average, refresh included"),
            *((f"peak bytes, {tier}", _bytes(count)) for tier, count in self.peak_bytes.items()),
            *((f"bytes per row, {tier}", f"{count} B") for tier, count in self.bytes_per_row.items()),
            ("bytes moved", "0 (everything fits)"),
            (
                "step time, p50 / p99",
                "no decode step yet" if step["p50"] is None else f"{step['p50']:.2f} / {step['p99']:.2f} ms",
            ),
            ("graphs compiled", _graphs(self.graphs)),
            ("recompiles", str(self.recompiles)),
            ("attention left dense", _skips(self.skipped)),
        ]
        return str(tabulate(rows, tablefmt="simple", disable_numparse=True))


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _graphs(graphs: tuple[CompileRow, ...]) -> str:
    parts = [f"{row.stage} ({row.rewritten} rewritten, {row.seconds:.1f} s)" for row in graphs]
    return f"{len(graphs)}: {', '.join(parts)}" if parts else "none (eager)"


def _skips(skips: tuple[SkipRow, ...]) -> str:
    return "; ".join(f"layer {row.layer}: {row.reason}" for row in skips) or "none"
