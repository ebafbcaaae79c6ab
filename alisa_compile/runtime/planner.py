"""The planner: where the rows of a generation will be at each step, what moves, and how long the steps take.

Step 0 is the prefill; step j >= 1 appends token j, so that s + j positions exist. The phases:

I    every position is on the device.
II   from p1, the first step after which the coming token has no slot left: R positions stay, the others are on the
     host (the oldest on disk where the host is full). Below the device are all positions but the R - g - 1 most recent,
     so that the g dynamic rows of the working set and the coming token can take slots of rows that need not be written
     again: at p1 they go down in one bulk copy, after that one position a step (write-behind). After a step's attention
     the rows of the coming working set that are not resident come up; where layers refresh, every row that is not
     resident streams through the device during attention.
III  from p2: K and V of the D oldest positions are deleted, and rebuilt from saved hidden states when needed. Those
     states go to the host when their token is produced, because nothing could make them later. Where the host has room
     for them alone, KV rows have what is free of it until p2, and then all old positions are deleted.

p1 is arithmetic. Of alpha the smallest that fits is best whenever the recompute table never falls, because every term
of the objective then grows with alpha: the greedy choice is exact. beta has no such order, nor has alpha with a table
that falls somewhere, so both are then tried one by one (evenly spaced, where there are very many), and p2 at every
step, which costs one pass of running sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import cost
from .profile import Floats, Table

_MOST_BETAS, _MOST_ALPHAS = 256, 32

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Below:
    """Room below the device: bytes of a position's KV row and of its hidden states, and the budgets in bytes."""

    kv: int
    hidden: int
    host: int
    disk: int

    def on_disk(self, old: Any, deleted: Any, hidden: Any) -> Any:
        """Positions that the host has no room for, of `old` ones; also of arrays."""
        excess = self.kv * (old - deleted) + self.hidden * hidden - self.host
        return np.maximum(0, -(-excess // self.kv))

    def fits(self, old: Any, deleted: Any, hidden: Any) -> Any:
        """Whether the disk takes the excess, and the excess is not hidden states, which stay on the host."""
        return self.on_disk(old, deleted, hidden) <= np.minimum(old - deleted, self.disk // self.kv)

    def least_deleted(self, old: int) -> int | None:
        """Fewest deleted positions with which `old` ones fit; None = however many, they do not."""
        if self.fits(old, 0, 0):
            return 0
        if self.hidden >= self.kv:
            return None
        disk = self.disk // self.kv * self.kv
        count = -(-(self.kv * old - self.host - disk) // (self.kv - self.hidden))
        return count if count <= old and self.fits(old, count, count) else None

    def feasible(self, old: int, may_recompute: bool, must_recompute: bool) -> bool:
        """Whether the last step, when there are most old positions, can be had."""
        if must_recompute:
            return bool(self.fits(old, old, old))
        return bool(self.fits(old, 0, 0)) or (may_recompute and self.least_deleted(old) is not None)


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes a second: KV rows down to the host and up again, to and from disk; hidden states down and up."""

    down: float
    up: float
    disk_write: float
    disk_read: float
    hidden_down: float
    hidden_up: float


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the search works on. Arrays have one entry a step.

    prompt, steps: s, and the number of forward passes. most_resident, least_resident: positions that the device's
    budget holds, and that the working sets need. below: the room for the others, all layers and sequences together.
    working_set: rows a step attends to. next_set, dynamic: rows that the coming step attends to, and the dynamic ones
    among them. refresh, refresh_next: share of layers that attend to everything, in a step and in the coming one.
    churn: share of the dynamic rows that are new.
    compute: seconds of a step by rows attended. recompute: seconds by positions rebuilt, from (0, 0).
    prefill_seconds: compute of step 0. may_recompute: whether beta may be above 0; must_recompute: it is 1 of all old
    positions, from p1 on. least_deleted: positions that are deleted at least, because the host has no room for them
    when the store is full. shares_host: until their layer inputs come, KV rows have the room of these.
    """

    prompt: int
    steps: int
    most_resident: int
    least_resident: int
    below: Below
    working_set: Ints
    next_set: Ints
    dynamic: Ints
    refresh: Floats
    refresh_next: Floats
    churn: Floats
    links: Links
    compute: Table
    recompute: Table
    prefill_seconds: float = 0.0
    may_recompute: bool = True
    least_deleted: int = 0
    must_recompute: bool = False
    shares_host: bool = False
    objective: str = "overlapped"

    @property
    def positions(self) -> Ints:
        """s + j."""
        return self.prompt + np.arange(self.steps, dtype=np.int64)

    @property
    def p1(self) -> int | None:
        """First step after which not all positions and the coming one have room on the device."""
        beyond = max(0, self.most_resident - self.prompt)
        return beyond if beyond < self.steps else None

    def old(self, resident: int) -> Ints:
        """Positions below the device after each step from p1 on, if it holds `resident` ones."""
        n = self.positions
        old: Ints = np.minimum(n, n - resident + self.dynamic + 1)
        return old


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What happens in each step under one choice of R, D and the steps that delete."""

    resident: Ints
    old: Ints
    deleted: Ints
    on_disk: Ints
    hidden: Ints
    moved: dict[str, Floats]
    rebuilt: Floats
    compute: Floats
    recompute: Floats
    transfer: Floats
    seconds: Floats
    fits: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best R, D and p2 (None = never), and what they cost in seconds."""

    resident: int
    deleted: int
    p2: int | None
    seconds: float


def search(problem: Problem) -> Choice | None:
    """The choice of least objective; of equals the most resident, the fewest deleted, the latest p2. None: no fit."""
    p1 = problem.p1
    if p1 is None:
        total = float(timeline(problem, problem.most_resident, 0, None).seconds.sum())
        return Choice(problem.most_resident, 0, None, total)
    best: Choice | None = None
    for resident in _alphas(problem):
        for count in _betas(problem, resident):
            found = _best_p2(problem, resident, count, p1)
            if found is not None and (best is None or found.seconds < best.seconds):
                best = found
    return best


def _alphas(problem: Problem) -> Iterator[int]:
    most, least = problem.most_resident, problem.least_resident
    if problem.recompute.is_rising or not problem.may_recompute:
        yield most
    else:
        yield from _spread(least, most, _MOST_ALPHAS)[::-1]


def _betas(problem: Problem, resident: int) -> list[int]:
    """Numbers of deleted positions that leave room for the others."""
    below, old = problem.below, int(problem.old(resident)[-1])
    if problem.must_recompute:
        return [old] if below.fits(old, old, old) else []
    if not problem.may_recompute:
        return [0] if below.fits(old, 0, 0) else []
    least = below.least_deleted(old)
    if least is None:
        return []
    return _spread(max(least, problem.least_deleted), max(old, problem.least_deleted), _MOST_BETAS)


def _spread(first: int, last: int, most: int) -> list[int]:
    if last - first < most:
        return list(range(first, last + 1))
    return sorted({round(first + (last - first) * place / (most - 1)) for place in range(most)})


def _best_p2(problem: Problem, resident: int, count: int, p1: int) -> Choice | None:
    """p2 at every step: the steps before it as if nothing were deleted, those from it on as if all had been before."""
    if count == 0:
        line = timeline(problem, resident, 0, None)
        return Choice(resident, 0, None, float(line.seconds.sum())) if line.fits.all() else None
    before, after = timeline(problem, resident, count, None), timeline(problem, resident, count, 0)
    change = timeline(problem, resident, count, 0, on_disk_before=before.on_disk)
    starts = np.arange(p1, p1 + 1 if problem.must_recompute else problem.steps)
    spent = np.concatenate(([0.0], np.cumsum(before.seconds)))
    left = np.concatenate((np.cumsum(after.seconds[::-1])[::-1], [0.0]))
    total = spent[starts] + change.seconds[starts] + left[starts + 1]
    fits_before = np.concatenate(([True], np.logical_and.accumulate(before.fits)))
    fits_after = np.logical_and.accumulate(after.fits[::-1])[::-1]
    total[~(fits_before[starts] & fits_after[starts])] = math.inf
    least = total.min()
    if not math.isfinite(least):
        return None
    return Choice(resident, count, int(starts[np.flatnonzero(total == least)[-1]]), float(least))


def timeline(
    problem: Problem, resident: int, count: int, p2: int | None, *, on_disk_before: Ints | None = None
) -> Timeline:
    """Every step, with the `count` oldest positions deleted from step p2 on (0: from p1 on).

    on_disk_before: by step, the rows on disk while nothing is deleted; given to price each step as if it were p2.
    """
    n, steps = problem.positions, np.arange(problem.steps)
    p1 = problem.steps if problem.p1 is None else problem.p1
    below, deletes = steps >= p1, steps >= (problem.steps if p2 is None else p2)
    away = np.where(below, n - resident, 0)
    old = np.where(below, problem.old(resident), 0)
    deleted = np.where(deletes, np.minimum(count, old), 0)
    hidden = np.minimum(count, n)
    room: Below = problem.below
    held: int | Ints = count  # the host's room for hidden states is theirs from the start
    if problem.shares_host and count:
        room, held = dataclasses.replace(room, host=min(room.host, room.hidden * count), disk=0), hidden
    on_disk, fits = room.on_disk(old, deleted, held), room.fits(old, deleted, held)

    kv, hidden_bytes = problem.below.kv, problem.below.hidden
    links, alpha = problem.links, away / n
    values = {
        "s": problem.prompt, "j": steps, "alpha": alpha, "beta": deleted / n, "g": np.where(below, problem.dynamic, 0),
        "w": problem.next_set, "churn": problem.churn, "refresh": problem.refresh,
        "refresh_next": problem.refresh_next, "spare": old - away, "seeds": below & (steps == 0),
        "old_before": _previous(old), "deleted": deleted, "kv": kv, "hidden": hidden_bytes,
        "B_down": links.down, "B_up": links.up, "B_hidden": links.hidden_up,
    }  # fmt: skip

    def evaluate(expression: Any) -> Floats:
        return np.broadcast_to(np.asarray(cost.compiled(expression)(**values), dtype=np.float64), n.shape)

    loaded, rebuilt = evaluate(cost.LOADED), evaluate(cost.REBUILT)
    new_hidden = hidden_bytes * (hidden - _previous(hidden))
    disk_end = deleted + on_disk
    end_before = _previous(disk_end if on_disk_before is None else on_disk_before)
    disk_written = kv * np.maximum(0, disk_end - np.maximum(end_before, deleted))
    # What is needed lies on disk as often as the old positions do: for a refresh those of the step before.
    share_before = _previous(on_disk if on_disk_before is None else on_disk_before) / np.maximum(_previous(old), 1)
    entering, streaming = evaluate(cost.THETA_CHURN), evaluate(cost.THETA_REFRESH)
    sparse_next = 1 - problem.refresh_next
    streamed_from_disk = kv * problem.refresh * streaming * share_before
    disk_read = kv * sparse_next * entering * on_disk / np.maximum(old, 1) + streamed_from_disk
    transfer = (
        evaluate(cost.TRANSFER)
        + new_hidden / links.hidden_down
        + disk_written / links.disk_write
        + disk_read / links.disk_read
    )
    sparse, share = 1 - problem.refresh, evaluate(cost.DELETED_SHARE)
    compute = sparse * problem.compute.at(problem.working_set) + problem.refresh * problem.compute.at(n)
    compute[0] = problem.prefill_seconds
    recompute = sparse_next * problem.recompute.at(entering * share)
    recompute = recompute + problem.refresh * problem.recompute.at(streaming * share)
    stream = evaluate(cost.STREAM) + streamed_from_disk / links.disk_read
    times = {"T_c": compute, "T_r": recompute, "T_m": transfer, "T_s": stream}
    objective = cost.OBJECTIVES[problem.objective]
    seconds = cost.compiled(objective)(**{name: times[name] for name in map(str, objective.free_symbols)})
    moved = {
        "device_to_host": kv * evaluate(cost.THETA_C) + new_hidden,
        "host_to_device": kv * loaded + hidden_bytes * rebuilt,
        "disk_write": disk_written.astype(np.float64),
        "disk_read": disk_read,
    }
    return Timeline(
        n - away, old, deleted, on_disk, hidden, moved, rebuilt, compute, recompute, transfer, seconds, fits
    )


def _previous(values: Ints) -> Ints:
    return np.concatenate((np.zeros(1, dtype=values.dtype), values[:-1]))
