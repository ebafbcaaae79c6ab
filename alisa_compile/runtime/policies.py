"""Which tokens a decode step attends to: each policy is a small dataclass that yields the numbers kernels need."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from ..config import AlisaConfig
from ..kernels.selection import SelectionSpec


@dataclasses.dataclass(frozen=True)
class SparseWindow:
    """Sparse window attention (ALISA, ISCA 2024, Algorithm 1): recent tokens plus the top-ranked others.

    Departures from the paper, all off in `paper()`:
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

    @classmethod
    def paper(cls, keep_ratio: Fraction) -> SparseWindow:
        """Algorithm 1 as printed."""
        return cls(keep_ratio, window=0, sinks=0, refresh=0, local_fraction=Fraction(1, 2))

    def spec(self) -> SelectionSpec:
        """The kernel form."""
        local = self.keep_ratio * self.local_fraction
        return SelectionSpec(local, self.keep_ratio - local, self.window, self.sinks, self.refresh, self.max_rows)


def selection_spec(config: AlisaConfig) -> SelectionSpec | None:
    """The selection that a configuration asks for; None = dense, no selection at all."""
    if not config.is_sparse:
        return None
    if config.paper:
        return SparseWindow.paper(config.keep_ratio).spec()
    # max_rows="auto" caps the working set once a device budget is full; without a budget nothing caps it.
    cap = config.max_rows if isinstance(config.max_rows, int) else 0
    share = Fraction(str(config.local_fraction))
    return SparseWindow(config.keep_ratio, config.window, config.sinks, config.refresh, share, cap).spec()


def head_groups(config: AlisaConfig, kv_heads: int) -> int:
    """How many index sets a layer has per sequence."""
    return kv_heads if config.head_mode == "per_kv_head" and not config.paper else 1
