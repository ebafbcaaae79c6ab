"""What a selection policy means to a kernel: a few numbers, passed to ops as one readable string.

Ops take the string because an op's schema must not change when policies gain parameters, and because the string is
what a person reads in the graph. It is parsed once and cached.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import torch

SPARSE_BLOCK = 16  # a block of more new tokens than this on a history is dense

#: What the dynamic rows are ranked by. `decay`: attention received, decayed over `window` steps. `ring`: attention
#: received in the last `local_rows(n)` steps (ALISA, Algorithm 1), from a ring of that many rows. `sum`: all attention
#: ever received, and a row that is dropped never returns (H2O). `stride`: even distance from position 0. `hash`: a
#: pseudo-random order, another one each step.
RANKS = ("decay", "ring", "sum", "stride", "hash")


@dataclasses.dataclass(frozen=True)
class SelectionSpec:
    """How many rows a step attends to, and how tokens are ranked.

    local, dynamic: kept share of the context as exact fractions: the most recent tokens, and the top-ranked others.
    rank: one of `RANKS`.
    window: decay constant of rank `decay` in steps; 0 for the other ranks.
    sinks: first tokens always kept, counted inside the dynamic share.
    refresh: every this many steps a layer attends to all rows; 0 = never.
    max_rows: cap on the rows of a step; 0 = none.
    """

    local: Fraction
    dynamic: Fraction
    rank: str = "decay"
    window: int = 0
    sinks: int = 0
    refresh: int = 0
    max_rows: int = 0

    def encode(self) -> str:
        """The string form that ops take."""
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))

    def local_rows(self, length: Any) -> Any:
        """Locally static rows at a context of `length` tokens, the current one included: max(1, nearest(n * local)).

        ALISA Algorithm 1, line 1, with halves rounded up. `length` may be an int, a SymInt or an integer tensor.
        """
        rows = _nearest(length, self.local)
        if self.max_rows:
            share = self.local / (self.local + self.dynamic)
            rows = _minimum(rows, max(1, _nearest(self.max_rows, share)))
        return _minimum(_maximum(rows, 1), length)

    def dynamic_rows(self, length: Any) -> Any:
        """Globally dynamic rows (sinks included) at a context of `length` tokens; never more than the non-locals."""
        if not self.dynamic:
            return length - length
        if self.rank == "stride":
            # Position j is on the stride where floor(j * share) steps up; this many are before the current token.
            rows = (length - 2) * self.dynamic.numerator // self.dynamic.denominator + 1
        else:
            rows = _maximum(_nearest(length, self.dynamic), 1)
        if self.max_rows:
            share = self.local / (self.local + self.dynamic)
            rows = _minimum(rows, self.max_rows - max(1, _nearest(self.max_rows, share)))
        return _minimum(rows, length - self.local_rows(length))

    def rows_capacity(self, capacity: int) -> int:
        """Most rows that any step selects while the context has at most `capacity` tokens."""
        return int(self.local_rows(capacity) + self.dynamic_rows(capacity))

    def score_rows(self, capacity: int) -> int:
        """Rows of score storage: one decayed sum, or the ring of attention rows that Algorithm 1 sums.

        A ring has at least two: a compiler takes a size of 1 for a constant, and capacities vary.
        """
        return max(2, int(self.local_rows(capacity))) if self.rank == "ring" else 1

    def seed_rows(self, query_length: Any, capacity: Any = None) -> Any:
        """How many of a block's last attention rows seed the scores (the decayed sum is cut at four windows).

        capacity: given for a block on a history, whose window depends on a context that no shape tells: every row
        that Algorithm 1 could sum while the context fits. Never 1 for a block of several, because a compiler takes a
        size of 1 for a constant, and one graph has to serve every prompt length.
        """
        if self.rank == "decay":
            return _minimum(4 * self.window, query_length)
        if self.rank != "ring":
            return int(self.rank == "sum")  # one row: the sum over the whole block
        context = query_length if capacity is None else capacity
        return _minimum(_maximum(self.local_rows(context + 1), 2), query_length)

    @property
    def decay(self) -> float:
        """Factor by which a score fades each step."""
        return 1 - 1 / self.window

    def decay_exponent(self, length: int) -> int:
        """Scores are stored as score * decay**-e with this e, so a step need not touch every score.

        Every 16 windows e returns to 0 and `kv_select` rescales, which keeps decay**-e below about 1e7.
        """
        return length % (16 * self.window)

    def is_refresh_step(self, step: int, layer: int, new_tokens: int = 1) -> bool:
        """Whether a step is dense in this layer; layers take turns.

        step: tokens since the last dense block, the step's own included. new_tokens: how many came in the step before;
        it is due as well if any of those should have been dense.
        """
        return self.refresh > 0 and (step + layer) // self.refresh > (step + layer - new_tokens) // self.refresh


@functools.lru_cache(maxsize=64)
def capped(spec: SelectionSpec, max_rows: int) -> SelectionSpec:
    """The same policy with at most `max_rows` rows; 0 = as it is. A number of the plan, so no part of the string."""
    return dataclasses.replace(spec, max_rows=max_rows) if max_rows else spec


@functools.lru_cache(maxsize=64)
def decode_spec(text: str) -> SelectionSpec:
    """Parse what `SelectionSpec.encode` wrote."""
    fields = dict(part.split("=", 1) for part in text.split(","))
    return SelectionSpec(
        local=Fraction(fields["local"]),
        dynamic=Fraction(fields["dynamic"]),
        rank=fields["rank"],
        window=int(fields["window"]),
        sinks=int(fields["sinks"]),
        refresh=int(fields["refresh"]),
        max_rows=int(fields["max_rows"]),
    )


def last_queries(
    query: torch.Tensor, valid: torch.Tensor | None, start: int, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which rows of `query [B, Hq, T, D]` are the last `count` real tokens: indices `[B, count]`, oldest first.

    valid: `[B, >= start + T]` or None; start: position of the first row. The second result `[B, count]` says which of
    them are real, where a sequence has fewer; None = all.
    """
    batch_size, length = query.shape[0], query.shape[2]
    if valid is None:
        return torch.arange(length - count, length, device=query.device).expand(batch_size, -1), None
    own = valid[:, start : start + length]
    order = own.to(torch.int8).argsort(dim=-1, stable=True)  # invalid rows first, valid rows in order of position
    chosen = order[:, length - count :]
    return chosen, own.gather(1, chosen)


def _nearest(length: Any, share: Fraction) -> Any:
    """floor(length * share + 1/2) in integers, so that it is exact for ints, SymInts and tensors alike."""
    numerator = 2 * share.numerator * length + share.denominator
    return numerator // (2 * share.denominator)


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return torch.sym_min(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else min(a, b)


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return a.clamp_min(b)
    return torch.sym_max(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else max(a, b)
