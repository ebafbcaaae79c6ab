"""Figure 10: rank correlation of the attention that tokens receive with dense attention's, by sparsity and policy."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.drawing import Figure
from benchmarks.figures.weights import POLICIES, Novel, spearman

_SPARSITIES = (0.2, 0.4, 0.6, 0.8, 0.9)


def make(*, small: bool = False) -> Figure:
    """Spearman's coefficient of each layer's head-summed weights, averaged over layers."""
    tokens, prompt = (64, 16) if small else (512, 128)
    sparsities = (0.8,) if small else _SPARSITIES
    novel = Novel(tokens)

    def received(**options: Any) -> Any:
        return novel.weights(prompt, **options)[:, :, prompt:].double().sum((1, 2)).numpy()

    dense = received()
    rows: list[list[Any]] = []
    for name, options in POLICIES.items():
        found = []
        for sparsity in sparsities:
            layers = received(**options, sparsity=sparsity)
            found.append(sum(map(spearman, layers, dense)) / len(dense))
        rows.append([name, *found])

    def draw(axes: Any) -> None:
        for name, *found in rows:
            axes.plot([100 * sparsity for sparsity in sparsities], found, marker="o", label=name)
        axes.set(xlabel="sparsity, %", ylabel="Spearman with dense, mean of layers", ylim=(-1, 1))
        axes.legend(fontsize=8)

    title = f"rank correlation of received attention with dense; novel-7m, prompt {prompt} of {tokens} tokens"
    return Figure(title, ["policy", *(f"{sparsity:.0%}" for sparsity in sparsities)], rows, draw)
