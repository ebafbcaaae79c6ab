"""Figure 9: throughput of the paper's workload by batch size, from what `alisa bench` has measured.

With half of K and V on the device: alisa, and a static split, as FlexGen does it (dense, the rest
read from the host in each step), on the same store. For scale, everything on the device: alisa dense, and
transformers. A scheduler like vLLM's, which preempts and recomputes sequences, is not among them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.figures.drawing import Figure
from benchmarks.results_file import BadResults, read
from benchmarks.run import RESULTS


def make(*, small: bool = False) -> Figure:
    """Tokens a second, prefill included."""
    if not RESULTS.exists():
        raise BadResults(f"there is no {RESULTS}: run `alisa bench --only paper` first")
    found = [row for row in read(RESULTS).values() if row["group"] == "paper" and row["status"] == "ok"]
    if not found:
        raise BadResults(f"{RESULTS} has no row of the paper's workload: run `alisa bench --only paper` first")
    found.sort(key=lambda row: row["parameters"]["batch"])
    batches = [row["parameters"]["batch"] for row in found]
    whos = [measure["who"] for measure in found[0]["measures"]]
    speeds = {who: [_speed(row, who) for row in found] for who in whos}
    rows: list[list[Any]] = [[who, *speeds[who]] for who in whos]

    def draw(axes: Any) -> None:
        width = 0.8 / len(whos)
        for place, who in enumerate(whos):
            style = {"hatch": "//", "edgecolor": "white"} if "on device" in who else {}
            offsets = [number + (place + 0.5) * width - 0.4 for number in range(len(batches))]
            axes.bar(offsets, [speed or 0 for speed in speeds[who]], width, label=who, **style)
        axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axes.set(ylabel="tokens a second", yscale="log")
        axes.legend(fontsize=7, ncols=2)

    parameters = found[0]["parameters"]
    title = (
        f"OPT, {parameters['layers']} layers, hidden {parameters['hidden']}: prompt {parameters['prompt']}, "
        f"{parameters['new']} new tokens (hatched: half of K and V on the device)"
    )
    return Figure(title, ["tokens a second", *(f"batch {batch}" for batch in batches)], rows, draw, (9.0, 4.5))


def _speed(row: dict[str, Any], who: str) -> float | None:
    return next((measure["tokens_per_s"] for measure in row["measures"] if measure["who"] == who), None)
