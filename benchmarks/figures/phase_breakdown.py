"""Figure 12: where the time of the paper's workload goes by phase, recomputation on and off, and an ablation.

12a: a decode step in each phase, beside the static split at the same budgets. 12b: the same generation with the oldest
rows deleted and rebuilt, and with a host that holds them all. 12c: from the static split, dense, to alisa: sparse
window attention alone (which reads each of its rows from the host anew), then alisa's scheduling, then INT8 rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from typing import Any

import torch

import alisa_compile
from alisa_compile.runtime import trace
from benchmarks.figures.drawing import Figure
from benchmarks.outcome import GateFailed
from benchmarks.rows.paper import Workload, release
from benchmarks.schedulers.static_split import StaticSplit
from benchmarks.timing import seconds_of

_SHAPE: dict[str, Any] = {"batch": 16, "prompt": 128, "new": 256, "layers": 4, "hidden": 256, "heads": 4}
_SMALL: dict[str, Any] = {"batch": 2, "prompt": 200, "new": 60, "layers": 4, "hidden": 64, "heads": 4}
_SPARSITIES, _SMALL_SPARSITIES = (0.4, 0.8), (0.8,)
_DEVICE, _HOST = 0.5, 0.55  # of K and V of all tokens; with this little on the host the oldest rows are deleted
_WAITS = ("wait", "disk_wait")
_DENSE, _STATIC, _SCHEDULED, _INT8, _FULL = (
    "static split, dense",
    "static split, SWA",
    "+ scheduling",
    "+ INT8",
    "alisa",
)


@dataclasses.dataclass(frozen=True)
class _Phase:
    """Decode steps of one phase: how many, and milliseconds of a step, all of it and its parts."""

    name: str
    steps: int
    whole: float
    waiting: float
    rebuilding: float

    @property
    def computing(self) -> float:
        """The rest: products, attention with the rows that it reads from the host itself, selection."""
        return self.whole - self.waiting - self.rebuilding


@dataclasses.dataclass(frozen=True)
class _Run:
    """Of one generation: its tokens, seconds in all, phases, bytes of the host, and rows recomputed."""

    tokens: torch.Tensor
    seconds: float
    phases: list[_Phase]
    host_bytes: int
    rebuilt: int


@torch.no_grad()
def make(*, small: bool = False) -> dict[str, Figure]:
    """By panel: a, b, c. small: without Inductor, too."""
    shape, sparsities = (_SMALL, _SMALL_SPARSITIES) if small else (_SHAPE, _SPARSITIES)
    work = Workload.of(**shape, inner_compiler="eager" if small else "inductor")
    below = {"device_kv_budget": int(_DEVICE * work.kv_bytes), "host_kv_budget": 2 * work.kv_bytes}
    short = {**below, "host_kv_budget": int(_HOST * work.kv_bytes)}
    work.check_alisa(**below)
    dense = _run(work, work.static_split(**below))
    work.check("the static split", dense.tokens)
    runs: dict[str, list[_Run]] = {
        _STATIC: [_run(work, work.static_split(sparsity=sparsity, **below)) for sparsity in sparsities],
        _SCHEDULED: [_run(work, work.compiled(sparsity=sparsity, recompute="off", **below)) for sparsity in sparsities],
        _INT8: [
            _run(work, work.compiled(sparsity=sparsity, recompute="off", kv_dtype="int8", **below))
            for sparsity in sparsities
        ],
        _FULL: [_run(work, work.compiled(sparsity=sparsity, recompute="auto", **short)) for sparsity in sparsities],
    }
    for who in (_STATIC, _FULL):
        for sparsity, found, expected in zip(sparsities, runs[who], runs[_SCHEDULED], strict=True):
            if not torch.equal(found.tokens, expected.tokens):
                raise GateFailed(f"{who}, {sparsity:.0%}: other tokens than with a host for everything")
    where = f"OPT, {shape['layers']} layers, hidden {shape['hidden']}, batch {shape['batch']}"
    where += f", {shape['prompt']} + {shape['new']} tokens; device {_DEVICE:.0%} of K and V"
    names = [f"{sparsity:.0%}" for sparsity in sparsities]
    by_phase = {f"alisa, {name}": run for name, run in zip(names, runs[_FULL], strict=True)} | {_DENSE: dense}
    stages = {_DENSE: [dense] * len(names)} | {who: runs[who] for who in (_STATIC, _SCHEDULED, _INT8)}
    return {
        "a": _phases(by_phase, where),
        "b": _recomputation(names, runs[_FULL], runs[_SCHEDULED], where),
        "c": _ablation(names, stages, where),
    }


def _run(work: Workload, runner: Any) -> _Run:
    """The third run: the first compiles, and the second clears up what compiling has left."""
    for _ in range(2):
        work.run(runner)
    found: list[torch.Tensor] = []
    trace.start()
    try:
        seconds = seconds_of(lambda: found.append(work.run(runner)))
    finally:
        recording = trace.stop()
    report = alisa_compile.report(runner.model if isinstance(runner, StaticSplit) else runner).to_dict()
    release(runner)
    steps = [span for span in recording.spans if span.name == "alisa decode"]
    phases = []
    for phase, group in itertools.groupby(steps, lambda span: span.details["phase"]):
        members = list(group)
        parts = {"waiting": 0.0, "rebuilding": 0.0}
        for interval in recording.transfers:
            part = "waiting" if interval.kind in _WAITS else "rebuilding" if interval.kind == "recompute" else None
            if part and members[0].begin <= interval.begin and interval.end <= members[-1].end:
                parts[part] += (interval.end - interval.begin) / 1e6 / len(members)
        whole = statistics.fmean((span.end - span.begin) / 1e6 for span in members)
        phases.append(_Phase(f"phase {phase}", len(members), whole, parts["waiting"], parts["rebuilding"]))
    return _Run(found[0], seconds, phases, report["peak_bytes"]["host"], report["rows_recomputed"])


def _phases(runs: dict[str, _Run], where: str) -> Figure:
    rows: list[list[Any]] = [
        [who, phase.name, phase.steps, phase.whole, phase.computing, phase.waiting, phase.rebuilding]
        for who, run in runs.items()
        for phase in run.phases
    ]

    def draw(axes: Any) -> None:
        bottom = [0.0] * len(rows)
        for column, label in ((4, "compute"), (5, "waiting for rows"), (6, "recompute")):
            values = [row[column] for row in rows]
            axes.bar(range(len(rows)), values, 0.7, bottom, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_xticks(range(len(rows)), [f"{row[0]}\n{row[1]}" for row in rows], fontsize=6)
        axes.set(ylabel="ms a step")
        axes.legend(fontsize=7)

    title = f"decode step by phase: {where}, host {_HOST:.0%} (static split: all)"
    headers = ["who", "phase", "steps", "ms a step", "compute", "waiting", "recompute"]
    return Figure(title, headers, rows, draw, (9.0, 4.5))


def _recomputation(names: list[str], on: list[_Run], off: list[_Run], where: str) -> Figure:
    rows: list[list[Any]] = [
        [name, a.seconds, b.seconds, b.seconds / a.seconds, a.host_bytes / 2**20, b.host_bytes / 2**20, a.rebuilt]
        for name, a, b in zip(names, on, off, strict=True)
    ]

    def draw(axes: Any) -> None:
        for offset, column, label in ((-0.2, 1, "recomputation"), (0.2, 2, "without, more on the host")):
            axes.bar([place + offset for place in range(len(rows))], [row[column] for row in rows], 0.38, label=label)
        axes.set_xticks(range(len(rows)), [f"sparsity {name}" for name in names])
        axes.set(ylabel="seconds in all")
        axes.legend(fontsize=7)

    title = f"recomputation of the oldest rows: {where}"
    headers = ["sparsity", "on, s", "off, s", "off / on", "on: host MiB", "off: host MiB", "rows recomputed"]
    return Figure(title, headers, rows, draw, (9.0, 4.5))


def _ablation(names: list[str], stages: dict[str, list[_Run]], where: str) -> Figure:
    rows: list[list[Any]] = [[who, *(run.seconds for run in runs)] for who, runs in stages.items()]

    def draw(axes: Any) -> None:
        width = 0.8 / len(rows)
        for place, (who, *seconds) in enumerate(rows):
            offsets = [number + (place + 0.5) * width - 0.4 for number in range(len(names))]
            axes.bar(offsets, seconds, width, label=who)
        axes.set_xticks(range(len(names)), [f"sparsity {name}" for name in names])
        axes.set(ylabel="seconds in all")
        axes.legend(fontsize=7)

    title = f"one after the other: {where}, the rest on the host"
    return Figure(title, ["seconds in all", *names], rows, draw, (9.0, 4.5))
