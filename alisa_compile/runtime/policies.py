"""Which tokens a decode step attends to: each policy is a small dataclass that yields the numbers kernels need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Protocol

from ..config import AlisaConfig
from ..kernels.selection import SelectionSpec


class Policy(Protocol):
    """What a policy is: parameters with names, and the form that kernels take."""

    def spec(self) -> SelectionSpec:
        """The kernel form."""


@dataclasses.dataclass(frozen=True)
class SparseWindow:
    """`swa`, sparse window attention (ALISA, ISCA 2024, Algorithm 1): recent tokens plus the top-ranked others.

    Departures from the paper, all off in `PaperSparseWindow`:
    window: scores are a sum decayed over `window` steps, one vector, instead of a ring of the last k attention rows
        (k grows with the context; the ring is hundreds of MiB a layer at 32k tokens).
    sinks: the first tokens are pinned; in the paper they usually win on score, but nothing guarantees it.
    refresh: every `refresh` steps a layer attends to everything; in the paper a token that left the set has score 0 as
        soon as the window has passed and can never come back.
    local_fraction: the share of recent rows; one half in the paper.
    max_rows: a cap; none in the paper.
    """

    keep_ratio: Fraction
    window: int
    sinks: int
    refresh: int
    local_fraction: Fraction
    max_rows: int = 0

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        local = self.keep_ratio * self.local_fraction
        dynamic = self.keep_ratio - local
        return SelectionSpec(local, dynamic, "decay", self.window, self.sinks, self.refresh, self.max_rows)


@dataclasses.dataclass(frozen=True)
class PaperSparseWindow:
    """`swa` with `paper=True`: Algorithm 1 as printed.

    What the paper leaves open: the prompt is dense and its last rows seed the window; globals are chosen among the
    non-locals; a token that was not attended adds nothing to later scores.
    """

    keep_ratio: Fraction

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        return SelectionSpec(self.keep_ratio / 2, self.keep_ratio / 2, "ring")


@dataclasses.dataclass(frozen=True)
class LocalWindow:
    """`local`, a baseline of the paper (Longformer's window): the most recent rows alone, r x n of them.

    Departure: the paper does not say whether its window grows with the context; here it does, for equal budgets.
    """

    keep_ratio: Fraction
    max_rows: int = 0

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        return SelectionSpec(self.keep_ratio, Fraction(0), "stride", max_rows=self.max_rows)


@dataclasses.dataclass(frozen=True)
class Strided:
    """`strided`, a baseline of the paper (Sparse Transformer's fixed stride): every 1 / r-th row from position 0.

    The current token is attended too, as it always is. Where 1 / r is no whole number the distances alternate between
    the two nearest ones. Padding does not count as positions.
    """

    keep_ratio: Fraction
    max_rows: int = 0

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        return SelectionSpec(Fraction(0), self.keep_ratio, "stride", max_rows=self.max_rows)


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """`h2o` (Zhang et al., NeurIPS 2023): recent rows, and those with most attention ever; what is dropped stays so.

    Departures: the budget is r x n, growing with the context, so that policies are compared at equal budgets (H2O's is
    fixed); one set per layer, as for the other policies, unless `head_mode` is `per_kv_head` (H2O's is per head).
    """

    keep_ratio: Fraction
    local_fraction: Fraction = Fraction(1, 2)
    max_rows: int = 0

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        local = self.keep_ratio * self.local_fraction
        return SelectionSpec(local, self.keep_ratio - local, "sum", max_rows=self.max_rows)


@dataclasses.dataclass(frozen=True)
class Churn:
    """`churn`, for tests of the tiers alone: half recent rows, half pseudo-random ones, others at every step.

    Sparse window attention lets almost no dropped row return, so it hardly moves rows between tiers; this one moves
    more than a tenth of its rows each step wherever at least a tenth can be left out.
    """

    keep_ratio: Fraction
    max_rows: int = 0

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        return SelectionSpec(self.keep_ratio / 2, self.keep_ratio / 2, "hash", max_rows=self.max_rows)


def _swa(config: AlisaConfig, max_rows: int) -> Policy:
    if config.paper:
        return PaperSparseWindow(config.keep_ratio)
    share = Fraction(str(config.local_fraction))
    return SparseWindow(config.keep_ratio, config.window, config.sinks, config.refresh, share, max_rows)


_POLICIES: dict[str, Callable[[AlisaConfig, int], Policy]] = {
    "swa": _swa,
    "local": lambda config, cap: LocalWindow(config.keep_ratio, cap),
    "strided": lambda config, cap: Strided(config.keep_ratio, cap),
    "h2o": lambda config, cap: HeavyHitters(config.keep_ratio, Fraction(str(config.local_fraction)), cap),
    "churn": lambda config, cap: Churn(config.keep_ratio, cap),
}


def selection_spec(config: AlisaConfig) -> SelectionSpec | None:
    """The selection that a configuration asks for; None = dense, no selection at all."""
    if not config.is_sparse:
        return None
    # max_rows="auto" caps the working set once a device budget is full; without a budget nothing caps it.
    cap = config.max_rows if isinstance(config.max_rows, int) else 0
    return _POLICIES[config.policy](config, cap).spec()


def head_groups(config: AlisaConfig, kv_heads: int) -> int:
    """How many index sets a layer has per sequence."""
    return kv_heads if config.head_mode == "per_kv_head" and not config.paper else 1
