"""ALISA Algorithm 1 (ISCA 2024), paper mode, as plain loops: the truth that the kernels are compared with.

One `Sequence` is one sequence in one layer. It knows real tokens only: padding never reaches it, so token i
is the i-th real token. It shares no code and no data structure with `alisa_compile`. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def half_budget(tokens: int, sparsity: float) -> int:
    """Line 1: k = max(1, floor(n r / 2 + 1 / 2)), r = 1 - sparsity as an exact decimal fraction."""
    ratio = 1 - Fraction(str(sparsity))
    return max(1, math.floor(tokens * ratio / 2 + Fraction(1, 2)))


def attend(query: Array, keys: list[Array], values: list[Array], scale: float) -> tuple[Array, Array]:
    """One query row over the given tokens: output `[Hq, D]` and attention weights `[Hq, tokens]`.

    query: `[Hq, D]`; each key and value: `[Hkv, D]`. Query head h reads KV head h // (Hq / Hkv).
    """
    query_heads, kv_heads = query.shape[0], keys[0].shape[0]
    output = np.zeros((query_heads, values[0].shape[1]))
    weights = np.zeros((query_heads, len(keys)))
    for head in range(query_heads):
        shared = head // (query_heads // kv_heads)
        logits = [scale * float(query[head] @ key[shared]) for key in keys]
        top = max(logits)
        exponentials = [math.exp(logit - top) for logit in logits]
        total = sum(exponentials)
        for index, exponential in enumerate(exponentials):
            weights[head, index] = exponential / total
            output[head] += weights[head, index] * values[index][shared]
    return output, weights


class Sequence:
    """State of Algorithm 1 for one sequence in one layer."""

    def __init__(self, sparsity: float, scale: float) -> None:
        self.sparsity = sparsity
        self.scale = scale
        self.keys: list[Array] = []
        self.values: list[Array] = []
        self.rows: list[dict[int, float]] = []  # per past query: head-summed attention by token

    def __len__(self) -> int:
        return len(self.keys)

    def block(self, queries: Array, keys: Array, values: Array) -> Array:
        """A prompt or a further turn, `[T, heads, D]` each; its rows join the window.

        Dense causal, but for a turn of at most 16 tokens: those attend to the set of its first token and to each other.
        """
        outputs = []
        past: Collection[int] = range(len(self))
        if len(self) > 0 and len(queries) <= 16:
            past = [token for token in self.globals() + self.locals() if token < len(self)]
        start = len(self)
        for query, key, value in zip(queries, keys, values, strict=True):
            self.keys.append(np.asarray(key, np.float64))
            self.values.append(np.asarray(value, np.float64))
            outputs.append(self._attend_over(query, [*past, *range(start, len(self))]))
        return np.stack(outputs) if outputs else np.zeros(np.shape(queries))

    def scores(self) -> list[float]:
        """Line 2 for the coming token: per past token, the sum of the last k attention rows and all heads."""
        window = half_budget(len(self) + 1, self.sparsity)
        totals = [0.0] * len(self)
        for row in self.rows[-window:]:
            for token, mass in row.items():
                totals[token] += mass
        return totals

    def locals(self) -> list[int]:
        """Line 3: the last k tokens; the coming one counts and is the last of them."""
        tokens = len(self) + 1
        first = max(0, tokens - half_budget(tokens, self.sparsity))
        return list(range(first, tokens))

    def globals(self) -> list[int]:
        """Line 4: the k tokens of highest score before the locals; of equal scores the larger position."""
        candidates = list(range(self.locals()[0]))
        scores = self.scores()
        candidates.sort(key=lambda token: (scores[token], token), reverse=True)
        return sorted(candidates[: half_budget(len(self) + 1, self.sparsity)])

    def decode(self, query: Array, key: Array, value: Array, chosen: Collection[int] | None = None) -> Array:
        """Lines 5 to 8 for one token `[heads, D]`, over `chosen` or else over its own globals and locals."""
        attended = sorted(self.globals() + self.locals() if chosen is None else chosen)
        self.keys.append(np.asarray(key, np.float64))
        self.values.append(np.asarray(value, np.float64))
        return self._attend_over(query, attended)

    def _attend_over(self, query: Array, attended: Collection[int]) -> Array:
        output, weights = attend(
            np.asarray(query, np.float64),
            [self.keys[token] for token in attended],
            [self.values[token] for token in attended],
            self.scale,
        )
        self.rows.append({token: float(weights[:, index].sum()) for index, token in enumerate(attended)})
        return output
