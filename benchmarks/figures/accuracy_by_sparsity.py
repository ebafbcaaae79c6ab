"""Figure 8: accuracy by sparsity and policy, from what `alisa eval` has measured."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from alisa_compile.tools.accuracy import ratio_interval
from benchmarks.figures.drawing import Figure

RESULTS = Path(__file__).parent.parent / "results" / "accuracy.json"


def make(*, small: bool = False) -> Figure:
    """Perplexity relative to dense with its 95 % interval; each policy with its defaults, and paper mode and INT8."""
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["settings"]["measure"] == "perplexity"]
    dense = next(cell for cell in cells if _series(cell["settings"]) == "dense")["result"]["loss"]
    found: dict[tuple[str, float], tuple[float, float, float]] = {}
    for cell in cells:
        name = _series(cell["settings"])
        if name is not None and name != "dense":
            found[name, cell["settings"]["sparsity"]] = ratio_interval(cell["result"]["loss"], dense)
    names = list(dict.fromkeys(name for name, _ in found))
    sparsities = sorted({sparsity for _, sparsity in found})
    rows: list[list[Any]] = [
        [name, *(found[name, sparsity][0] if (name, sparsity) in found else None for sparsity in sparsities)]
        for name in names
    ]

    def draw(axes: Any) -> None:
        for name in names:
            places = [sparsity for sparsity in sparsities if (name, sparsity) in found]
            bars = [found[name, sparsity] for sparsity in places]
            spread = [[ratio - low for ratio, low, _ in bars], [high - ratio for ratio, _, high in bars]]
            axes.errorbar([100 * place for place in places], [bar[0] for bar in bars], spread, marker="o", capsize=3,
                          label=name)  # fmt: skip
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xlabel="sparsity, %", ylabel="perplexity relative to dense", yscale="log")
        axes.legend(fontsize=8)

    title = "perplexity relative to dense by sparsity; novel-7m on held-out chapters (alisa eval)"
    return Figure(title, ["policy", *(f"{sparsity:.0%}" for sparsity in sparsities)], rows, draw)


def _series(settings: dict[str, Any]) -> str | None:
    """Which line a cell belongs to; None for a variant of alisa's own that the paper does not have."""
    if settings["head_mode"] != "shared":
        return None
    int8 = ", INT8 rows" if settings["kv_dtype"] == "int8" else ""
    if settings["policy"] == "dense":
        return f"dense{int8}"
    selection = dict(part.split("=") for part in settings["selection"].split(","))
    if selection["rank"] == "ring":
        return "swa, paper"
    if settings["policy"] == "swa":
        even = Fraction(selection["local"]) == Fraction(selection["dynamic"])
        if not even or (selection["window"], selection["refresh"], selection["sinks"]) != ("8", "32", "4"):
            return None
    return f"{settings['policy']}{int8}"
