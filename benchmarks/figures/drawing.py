"""A figure as numbers, and how it becomes a JSON file, a table and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.tables import number


@dataclasses.dataclass(frozen=True)
class Figure:
    """title: what is shown, and on what. headers, rows: the table. draw: onto the axes of one panel."""

    title: str
    headers: list[str]
    rows: list[list[Any]]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 4.0)

    def table(self, layout: str = "simple") -> str:
        """Numbers with three digits, thousands whole."""
        rows = self.rows
        if any(isinstance(value, float) and value >= 1000 for row in rows for value in row):
            rows = [[number(value) if isinstance(value, float) else value for value in row] for row in rows]
        return str(tabulate(rows, self.headers, tablefmt=layout, floatfmt=".3g"))


def save(figure: Figure, stem: Path) -> None:
    """`stem` with .json, .md and .png; the plot carries no date or version, so equal numbers give equal files."""
    content = {"title": figure.title, "headers": figure.headers, "rows": figure.rows}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(f"{figure.title}\n\n{figure.table('github')}\n", encoding="utf-8")
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figure.size, layout="constrained")
    axes = canvas.subplots()
    figure.draw(axes)
    axes.set_title(figure.title, fontsize=9)
    canvas.savefig(stem.with_suffix(".png"), dpi=120, metadata={"Software": None})
