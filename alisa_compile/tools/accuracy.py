"""Tables and plot of `alisa eval`."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from tabulate import tabulate

_RESAMPLES = 10_000
_FEWEST_WINDOWS = 8  # for an interval
_LABEL_WIDTH = 22


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy at one sparsity: what was measured of it so far.

    label: the options that differ from the other rows. losses: mean loss of each window in nats, or None. recall: by
    form, then by length and depth, `{"exact": [...], "digits": [...]}` of the trials.
    """

    policy: str
    sparsity: float
    label: str
    losses: list[float] | None
    recall: dict[str, list[list[dict[str, Any]]]]


def ratio_interval(losses: Sequence[float], dense: Sequence[float]) -> tuple[float, float, float]:
    """Perplexity relative to dense over the same windows, and its paired bootstrap 95 % interval.

    Paired: a resample draws windows, and takes both models' losses on them. Some windows are hard for every policy,
    and that must not widen the interval. With fewer than 8 windows there is none (NaN): resampling a handful tells
    nothing about windows that were not drawn.
    """
    differences = np.asarray(losses) - np.asarray(dense)
    if len(differences) < _FEWEST_WINDOWS:
        return math.exp(differences.mean()), math.nan, math.nan
    draws = np.random.default_rng(0).integers(0, len(differences), size=(_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
    return math.exp(differences.mean()), math.exp(low), math.exp(high)


def summary(rows: Sequence[Row], dense: Row, *, markdown: bool = False) -> str:
    """One line a row: perplexity, its ratio to dense with the interval, recall in both forms."""
    headers = ["policy", "sparsity"]
    has_losses, has_recall = any(row.losses for row in rows), any(row.recall for row in rows)
    headers += ["perplexity", "to dense\n(95 %)"] if has_losses else []
    headers += ["recall:\nin prompt", "asked\nlater"] if has_recall else []
    lines = []
    for row in rows:
        line = _name_cells(row, markdown)
        line += _loss_cells(row, dense) if has_losses else []
        line += [_recall_cell(row, form) for form in ("prompt", "later")] if has_recall else []
        lines.append(line)
    return _table(lines, headers, markdown)


def recall_by_place(
    rows: Sequence[Row], lengths: Sequence[int], depths: Sequence[float], *, markdown: bool = False
) -> str:
    """Share of digits recalled, by the text's length and by how deep in it the number was told."""
    headers = ["policy", "sparsity", "asked", "tokens", *(f"{depth * 100:g} %" for depth in depths)]
    lines = []
    for row in rows:
        for form, by_length in row.recall.items():
            for length, by_depth in zip(lengths, by_length, strict=True):
                digits = [f"{fmean(place['digits']):.2f}" for place in by_depth]
                lines.append([*_name_cells(row, markdown), form, str(length), *digits])
    return _table(lines, headers, markdown)


def mean_recall(row: Row, form: str, what: str) -> float | None:
    """Over all lengths and depths: `exact` = whole numbers, `digits` = single digits."""
    places = [place[what] for by_depth in row.recall.get(form, []) for place in by_depth]
    return fmean(value for place in places for value in place) if places else None


def plot(rows: Sequence[Row], dense: Row, title: str, path: Path) -> None:
    """Perplexity ratio with intervals, and recall, against sparsity. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, series in _series(rows).items():
        measured = [row for row in series if row.losses]
        if dense.losses and measured:
            bars = [ratio_interval(row.losses or [], dense.losses) for row in measured]
            spread = [[ratio - low for ratio, low, _ in bars], [high - ratio for ratio, _, high in bars]]
            sparsities = [row.sparsity * 100 for row in measured]
            left.errorbar(sparsities, [bar[0] for bar in bars], spread, marker="o", capsize=3, label=name)
        asked = [row for row in series if row.recall]
        if asked:
            sparsities = [row.sparsity * 100 for row in asked]
            (line,) = right.plot(
                sparsities, [mean_recall(r, "prompt", "digits") for r in asked], marker="o", label=name
            )
            later = [mean_recall(row, "later", "digits") for row in asked]
            right.plot(sparsities, later, marker="x", linestyle="--", color=line.get_color())
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="sparsity, %", ylabel="perplexity relative to dense", yscale="log")
    right.set(xlabel="sparsity, %", ylabel="digits recalled", ylim=(-0.03, 1.03))
    right.set_title("solid: question in the prompt; dashed: asked later", fontsize=9)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(f"{row.policy} {row.label}".strip(), []).append(row)
    return series


def _name_cells(row: Row, markdown: bool) -> list[str]:
    words = row.label.replace(",", ", ")
    label = f" {words}" if markdown else "\n" + textwrap.fill(words, _LABEL_WIDTH, break_long_words=False)
    return [f"{row.policy}{label}".strip(), f"{row.sparsity * 100:g} %"]


def _loss_cells(row: Row, dense: Row) -> list[str]:
    if not row.losses:
        return ["", ""]
    perplexity = f"{math.exp(fmean(row.losses)):.2f}"
    if not dense.losses or row is dense:
        return [perplexity, "1" if row is dense else ""]
    ratio, low, high = ratio_interval(row.losses, dense.losses)
    return [perplexity, f"{ratio:.3f}" if math.isnan(low) else f"{ratio:.3f} {low:.3f}-{high:.3f}"]


def _recall_cell(row: Row, form: str) -> str:
    exact, digits = mean_recall(row, form, "exact"), mean_recall(row, form, "digits")
    return "" if exact is None or digits is None else f"{digits:.2f} / {exact:.2f}"


def _table(lines: list[list[str]], headers: list[str], markdown: bool) -> str:
    form = "github" if markdown else "simple"
    headers = [header.replace("\n", " ") for header in headers] if markdown else headers
    return str(tabulate(lines, headers=headers, tablefmt=form, disable_numparse=True))
