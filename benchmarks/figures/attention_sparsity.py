"""Figure 3: how many attention weights hardly count, by layer and step."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.figures.drawing import Figure
from benchmarks.figures.weights import Novel

_SHARE = 0.01  # of the row's largest weight, as in the paper
_BINS = 8


def make(*, small: bool = False) -> Figure:
    """Dense attention; a step is a row of the matrix, averaged over heads and an eighth of the text."""
    tokens = 64 if small else 1024
    weights = Novel(tokens).weights(prompt=tokens)
    low = weights < _SHARE * weights.amax(-1, keepdim=True)
    past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    share = (low & past).sum(-1).double() / past.sum(-1)  # [L, H, T]
    bins = share.mean(1).view(share.shape[0], _BINS, -1).mean(-1)
    ends = [(place + 1) * tokens // _BINS for place in range(_BINS)]
    rows: list[list[Any]] = [[layer, *map(float, row)] for layer, row in enumerate(bins)]
    rows.append(["all", *map(float, bins.mean(0))])

    def draw(axes: Any) -> None:
        for layer, row in enumerate(bins):
            axes.plot(ends, (100 * row).tolist(), marker=".", linewidth=0.8, label=f"layer {layer}")
        axes.plot(ends, (100 * bins.mean(0)).tolist(), color="black", linewidth=2, label="mean")
        axes.set(xlabel="step, tokens of context", ylabel="weights below 1 % of the row's largest, %", ylim=(0, 100))
        axes.legend(fontsize=7, ncols=3)

    title = f"share of attention weights below 1 % of their row's largest; novel-7m, {tokens} tokens"
    return Figure(title, ["layer", *(f"to {end}" for end in ends)], rows, draw)
