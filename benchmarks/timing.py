"""How long calls take: all shapes are warmed up first, then contenders take turns, and the median stands."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROUNDS = 5  # turns of each contender: what slows the machine for a while slows them all
_FEWEST_CALLS = 2  # of a turn, however slow
_LONG_S = 2.0  # of one call


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median, 20th and 80th percentile, and mean of `calls` calls."""

    p50: float
    p20: float
    p80: float
    mean: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        """Of at least one call."""
        ordered = sorted(seconds)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        return cls(
            statistics.median(ordered) * 1e3, low * 1e3, high * 1e3, statistics.fmean(ordered) * 1e3, len(ordered)
        )


def seconds_of(call: Callable[[], Any]) -> float:
    """One call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 0.5, rounds: int = ROUNDS, most: int = 10_000
) -> dict[str, Times]:
    """Each contender is called twice to warm up; then each has a turn of about `seconds / rounds` in every round.

    most: calls of a turn, for contenders that fill up.
    """
    for call in calls.values():
        call()
        call()
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            ends, made = time.perf_counter() + seconds / rounds, 0
            while made < _FEWEST_CALLS or (made < most and time.perf_counter() < ends):
                measured[name].append(seconds_of(call))
                made += 1
    return {name: Times.of(values) for name, values in measured.items()}


def steps(step: Callable[[], Any], *, fewest: int, most: int, seconds: float) -> Times:
    """Calls of a warm contender that has no room for a second one in memory: as many as `seconds` allow, within limits.

    One that takes longer than `_LONG_S` is not repeated.
    """
    ends, measured = time.perf_counter() + seconds, []
    while len(measured) < fewest or (len(measured) < most and time.perf_counter() < ends):
        measured.append(seconds_of(step))
        if measured[-1] > _LONG_S:
            break
    return Times.of(measured)
