"""Figure 9: throughput of the paper's workload by batch size, from what `alisa bench` has measured.

With room for half of K and V on the device: alisa with rows as they are and in INT8, a static split as FlexGen has it,
and blocks with preemption as vLLM has them, both on alisa's own store, and of transformers' caches those that fit. The
others of transformers run without the budget, for scale. What cannot run is a row that says why.
"""

from __future__ import annotations

from typing import Any

from benchmarks.figures.drawing import Figure
from benchmarks.results_file import BadResults, read
from benchmarks.run import RESULTS


def make(*, small: bool = False) -> Figure:
    """Tokens a second, prefill included."""
    rows_kept = read(RESULTS).values() if RESULTS.exists() else ()
    cases = [row for row in rows_kept if row["group"] == "paper" and row["status"] == "ok"]
    if not cases:
        raise BadResults(f"{RESULTS} has no row of the paper's workload: run `alisa bench --only paper` first")
    cases.sort(key=lambda row: row["parameters"]["batch"])
    shape = cases[0]["parameters"]
    batches = [row["parameters"]["batch"] for row in cases]
    found = [row["measures"] for row in cases]
    whos = [measure["who"] for measure in found[0]]
    by_who = {who: [next(m for m in measures if m["who"] == who) for measures in found] for who in whos}
    rows: list[list[Any]] = []
    for who, measures in by_who.items():
        notes = dict.fromkeys(measure["note"] for measure in measures if measure["note"])
        held = measures[-1]["kv_bytes"]
        size = None if held is None else held / 2**20
        rows.append([who, *(measure["tokens_per_s"] for measure in measures), size, "; ".join(notes)])

    def draw(axes: Any) -> None:
        shown = {who: measures for who, measures in by_who.items() if any(m["tokens_per_s"] for m in measures)}
        width = 0.85 / len(shown)
        for place, (who, measures) in enumerate(shown.items()):
            over = any("over the device budget" in measure["note"] for measure in measures)
            style: dict[str, Any] = {"alpha": 0.45, "hatch": "//"} if over else {}
            label = f"{who}, without the budget" if over else who
            offsets = [number + (place + 0.5) * width - 0.425 for number in range(len(batches))]
            axes.bar(offsets, [m["tokens_per_s"] or 0 for m in measures], width, label=label, **style)
        axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axes.set(ylabel="tokens a second")
        axes.legend(fontsize=7)

    title = (
        f"OPT, {shape['layers']} layers, hidden {shape['hidden']}: prompt {shape['prompt']}, {shape['new']} new, "
        "room for half of K and V on the device"
    )
    headers = ["tokens a second", *(f"batch {batch}" for batch in batches), f"KV MiB, batch {batches[-1]}", "note"]
    return Figure(title, headers, rows, draw, (9.0, 4.5))
