"""Figure 4: the mean attention that each token receives, dense and under each policy, and how alike the orders are."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.drawing import Figure
from benchmarks.figures.weights import POLICIES, Novel, spearman

_SPARSITY = 0.8
_BINS = 8


def make(*, small: bool = False) -> Figure:
    """Summed over heads and layers, averaged over the decode steps that could see the token."""
    tokens, prompt = (64, 16) if small else (1024, 256)
    novel = Novel(tokens)
    settings: dict[str, dict[str, Any]] = {"dense": {}}
    settings |= {name: {**options, "sparsity": _SPARSITY} for name, options in POLICIES.items()}
    received = {
        name: novel.weights(prompt, **options)[:, :, prompt:].double().sum((0, 1, 2)).numpy() / (tokens - prompt)
        for name, options in settings.items()
    }
    bins = {name: values.reshape(_BINS, -1).mean(1) for name, values in received.items()}
    alike = {name: spearman(values, received["dense"]) for name, values in received.items()}
    starts = [place * tokens // _BINS for place in range(_BINS)]
    rows: list[list[Any]] = [[name, alike[name], *map(float, values)] for name, values in bins.items()]

    def draw(axes: Any) -> None:
        for name, values in bins.items():
            width = 2.0 if name == "dense" else 1.0
            axes.plot(starts, values, label=f"{name}, rank correlation {alike[name]:.2f}", linewidth=width)
        axes.set(xlabel="position of the token", ylabel="attention received, mean of a step", yscale="log")
        axes.legend(fontsize=7)

    title = f"attention received by position at {_SPARSITY:.0%} sparsity; novel-7m, prompt {prompt} of {tokens} tokens"
    return Figure(title, ["policy", "Spearman", *(f"from {start}" for start in starts)], rows, draw)
