"""What a row hands back: a line for each contender, and whether the aims were met."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.timing import Times


class GateFailed(Exception):
    """Wrong results: the row prints no number, only this."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """One contender. The first of a row is alisa's, which the others are divided by.

    times: None where it could not run, and `note` says why. bytes: the least that a call has to move. floor_ms: what
    these take at the bandwidth measured in the same process. kv_bytes: held by the cache, as torch's allocator counted
    them: tables, scores and staging included. peak_bytes: the same plus the most that a step had on top.
    tokens_per_s: where a call makes tokens.
    """

    who: str
    times: Times | None
    note: str = ""
    bytes: int | None = None
    floor_ms: float | None = None
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An aim in words with the number found, and whether it was met."""

    text: str
    met: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one row."""

    measures: list[Measure]
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def floor_ms(nbytes: int, bandwidth: float) -> float:
    """bandwidth: bytes a second."""
    return nbytes / bandwidth * 1e3
