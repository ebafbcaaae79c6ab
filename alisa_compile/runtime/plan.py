"""The plan of a generation: from a model's shapes, options, budgets and the machine profile to phases and numbers."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from tabulate import tabulate

from ..config import AlisaConfig
from ..errors import ConfigError, InfeasibleError
from ..kernels.selection import SelectionSpec
from ..kernels.tiers import first_recent
from .budgets import Budgets, format_bytes
from .cut import Machine, distinct_cuts, layer_tensors
from .footprint import fixed_bytes, hidden_bytes, layer_bytes, owner_bytes, position_bytes
from .planner import Below, Ints, Links, Problem, Timeline, search, timeline
from .policies import selection_spec
from .profile import Floats, MachineProfile, Table
from .store import StoreShape, row_shape
from .tiers import TierSizes

OBJECTIVES = ("overlapped", "paper")
TIERS = ("device", "host", "disk")
PHASES = ("I", "II", "III")

#: Fewest and most positions of one layer that stream through the device at a time (refresh, dense steps, chunks of a
#: prompt). Few make many small transfers, and many take room from the rows.
STAGING = (128, 2048)
#: Share of the dynamic rows that are new in a step, where the profile has none: measured on novel-7m (prompt 600, 150
#: tokens, sparsity 0.8). `hash` draws anew in each step, which needs no measurement.
DEFAULT_CHURN = {"decay": 0.0015, "ring": 0.0075, "sum": 0.0, "stride": 0.0}

_STAGED_SHARE = 16  # one in so many positions, between the two
_SMALLEST_CAP = 2  # as the lowest `max_rows`


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know of a model and a batch; no weights.

    stores: the managed layers, by K/V shape. parameters: those that every token is multiplied with. hidden_size: width
    of a layer's input. matrix_parameters: size of the matrix that a parameter is in, the geometric mean over all.
    unmanaged: layers whose cache is not alisa's.
    """

    stores: tuple[StoreShape, ...]
    hidden_size: int
    parameters: int
    matrix_parameters: int = 1 << 20
    unmanaged: int = 0

    @property
    def layers(self) -> int:
        """Managed layers."""
        return sum(store.num_layers for store in self.stores)

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.stores[0].batch_size


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where rows are, what moves and how long each step takes; step 0 is the prefill. Print it, or take `.to_dict()`.

    p1, p2: first steps of phases II and III; None = never. alpha, beta: share of all positions that are not on the
    device, and that were deleted, at the last step. resident_positions: those that the device has slots for, of every
    layer and sequence. deleted_positions: at most. max_rows: cap on the working set that the device budget forces;
    None = none. churn: expected share of the dynamic rows that are new in a step. bytes_by_tier: in use at each step.
    peak_bytes: as allocated. bytes_moved: in each step; a prompt that is read in several pieces moves more in step 0.
    step_ms: predicted.
    """

    batch_size: int
    prompt_length: int
    max_new_tokens: int
    objective: str
    p1: int | None
    p2: int | None
    alpha: float
    beta: float
    resident_positions: int
    deleted_positions: int
    max_rows: int | None
    churn: float
    first_disk_step: int | None
    position_bytes: int
    fixed_bytes: int
    staging_bytes: int
    budget_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    bytes_by_tier: dict[str, tuple[int, ...]]
    bytes_moved: dict[str, tuple[int, ...]]
    rows_recomputed: tuple[float, ...]
    compute_ms: tuple[float, ...]
    recompute_ms: tuple[float, ...]
    transfer_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    reasons: dict[str, str]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """{phase, first_step, last_step, reason}, in order."""
        starts = [("I", 0), ("II", self.p1), ("III", self.p2)]
        kept = [(name, first) for name, first in starts if first is not None]
        # A phase that begins where the next one does has no step.
        kept = [item for item, after in zip(kept, [*kept[1:], ("", -1)], strict=True) if item[1] != after[1]]
        ends = [first - 1 for _, first in kept[1:]] + [len(self.step_ms) - 1]
        return [
            {"phase": name, "first_step": first, "last_step": last, "reason": self.reasons[name]}
            for (name, first), last in zip(kept, ends, strict=True)
        ]

    @property
    def total_ms(self) -> float:
        """Of all steps."""
        return sum(self.step_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the key names that scripts rely on; lists have one entry a step."""
        content = dataclasses.asdict(self)
        for name, value in content.items():
            if isinstance(value, tuple):
                content[name] = list(value)
            elif name in ("bytes_by_tier", "bytes_moved"):
                content[name] = {key: list(steps) for key, steps in value.items()}
        return {**content, "phases": self.phases, "total_ms": self.total_ms}

    def __str__(self) -> str:
        return self.table(79)

    def table(self, width: int) -> str:
        """Phases as rows, then what decided them, in lines of at most `width` characters (from 76 on)."""
        rows = []
        for phase in self.phases:
            first, last = phase["first_step"], phase["last_step"]
            decode = self.step_ms[max(first, 1) : last + 1]
            sizes = [max(self.bytes_by_tier[tier][first : last + 1]) for tier in TIERS]
            time = format_ms(statistics.median(decode)) if decode else "-"
            rows.append([phase["phase"], first, last, *map(format_bytes, sizes), time, phase["reason"]])
        headers = ["phase", "from\nstep", "to\nstep", *TIERS, "a step", "why"]
        text = tabulate(rows, headers, tablefmt="simple", disable_numparse=True)
        # What the other columns leave; tabulate wraps between words.
        left = max(12, width - text.split("\n")[2].rindex(" ") - 1)
        columns = [None] * (len(headers) - 1)
        text = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, maxcolwidths=[*columns, left])
        notes = [f"{name}: {reason}" for name, reason in self.reasons.items() if name not in PHASES]
        return "\n".join([text, "", *(textwrap.fill(note, width, subsequent_indent="  ") for note in notes)])


def format_ms(milliseconds: float) -> str:
    """Such as 12.3 ms or 135 s."""
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.4g} s"


def make_plan(
    model: ModelShape,
    config: AlisaConfig,
    budgets: Budgets,
    profile: MachineProfile,
    *,
    prompt_length: int,
    max_new_tokens: int,
    objective: str = "overlapped",
) -> Plan:
    """The plan of least predicted time within the budgets; `InfeasibleError` if there is none."""
    if objective not in OBJECTIVES:
        raise ConfigError("the objective is unknown", got=repr(objective), expected=f"one of {', '.join(OBJECTIVES)}")
    demand = Demand(model, config, prompt_length, max_new_tokens)
    tokens = f"{prompt_length} + {max_new_tokens} tokens"
    placement = demand.placement(budgets.device, budgets.host, budgets.disk)
    if placement is None:
        raise _infeasible(demand, budgets, tokens)
    problem = _problem(demand, placement, budgets, profile, objective)
    choice = search(problem)
    if choice is None:
        raise _infeasible(demand, budgets, tokens)
    line = timeline(problem, choice.resident, choice.deleted, choice.p2)
    return _plan(demand, placement, budgets, problem, line, choice.p2, choice.deleted)


def tier_sizes(model: ModelShape, config: AlisaConfig, budgets: Budgets, capacity: int) -> TierSizes | None:
    """Positions that each tier holds for stores of `capacity` positions; None = everything fits the device.

    The same for all stores of the model, so that together they keep each budget. With `recompute="auto"` no more is
    deleted than must be. `InfeasibleError` as for `make_plan`.
    """
    run = dataclasses.replace(config, max_length=None)
    demand = Demand(model, run, capacity - 1, 1)
    placement = demand.placement(budgets.device, budgets.host, budgets.disk)
    if placement is None:
        raise _infeasible(demand, budgets, f"{capacity} tokens")
    return None if placement.positions == capacity else demand.sizes(placement, budgets)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Positions that the device has slots for (all, or fewer and the coming one's among them), and the cap on working
    sets that this forces; None = none. deletes: host and disk are too small for the others, so that rows are deleted.
    """

    positions: int
    cap: int | None
    deletes: bool = False


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a generation needs in bytes and positions, whatever the budgets."""

    model: ModelShape
    config: AlisaConfig
    prompt: int
    new_tokens: int

    @property
    def capacity(self) -> int:
        """Positions that the store makes room for."""
        return max(self.prompt + self.new_tokens, self.config.max_length or 0)

    @property
    def last_position(self) -> int:
        """Positions at the last step; the last token is never stored."""
        return self.prompt + self.new_tokens - 1

    @property
    def kv(self) -> int:
        """Bytes of one position in all layers and sequences."""
        return sum(position_bytes(store, self.config) for store in self.model.stores)

    @property
    def hidden(self) -> int:
        """Bytes from which one position's K and V are rebuilt, in all layers and sequences."""
        return sum(hidden_bytes(store, self.config, self.model.hidden_size) for store in self.model.stores)

    @property
    def slot(self) -> int:
        """Bytes of one position in a device that does not hold all."""
        return self.kv + sum(owner_bytes(store, self.config) for store in self.model.stores)

    @property
    def staged(self) -> int:
        """Positions of one layer on their way through the device at a time."""
        least, most = STAGING
        return min(self.capacity, most, max(least, self.capacity // _STAGED_SHARE))

    @property
    def staging(self) -> int:
        """Bytes of these; every store has its own."""
        return self.staged * sum(layer_bytes(store, self.config) for store in self.model.stores)

    @property
    def may_recompute(self) -> bool:
        """Whether beta can be above 0: a hidden row as large as its KV row saves neither room nor traffic."""
        return self.config.recompute == "always" or (self.config.recompute == "auto" and self.hidden < self.kv)

    def selection(self, cap: int | None) -> SelectionSpec | None:
        """The policy under a cap."""
        return selection_spec(self._capped(cap))

    def _capped(self, cap: int | None) -> AlisaConfig:
        return self.config if cap is None else dataclasses.replace(self.config, max_rows=cap)

    def fixed(self, cap: int | None, *, tiered: bool = True, deletes: bool = False) -> int:
        """Bytes of tables, scores and working sets, which stay on the device. tiered: where not all rows do."""
        config = self._capped(cap)
        return sum(
            fixed_bytes(store, config, self.capacity, tiered=tiered, deletes=deletes) for store in self.model.stores
        )

    def needed(self, cap: int | None) -> int:
        """Positions that have to be on the device at once: the working sets; a dense step streams, all but its own."""
        selection = self.selection(cap)
        return 1 if selection is None else selection.rows_capacity(self.capacity)

    def placement(self, device: int, host: int, disk: int) -> Placement | None:
        """What the device holds where these budgets suffice, with rows deleted only if they must be; None = never."""
        for deletes in (False, True) if self.may_recompute else (False,):
            placement = self.place(device, deletes=deletes)
            if placement is None:
                continue
            below, room = self.below(placement), Below(self.kv, self.hidden, host, disk)
            must = self.config.recompute == "always" and below > 0
            if room.feasible(below, True, must) if deletes else room.feasible(below, False, False) and not must:
                return placement
        return None

    def place(self, budget: int, *, deletes: bool = False) -> Placement | None:
        """What a device budget holds; None = too little for any step."""
        if self.fixed(None, tiered=False) + self.kv * self.capacity <= budget:
            return Placement(self.capacity, None)

        def room(cap: int | None) -> int:
            return (budget - self.fixed(cap, deletes=deletes) - self.staging) // self.slot

        def works(cap: int | None) -> bool:
            return room(cap) >= self.needed(cap)

        if works(None):
            return Placement(room(None), None, deletes)
        if self.config.max_rows != "auto" or self.config.paper or not self.config.is_sparse:
            return None
        if not works(_SMALLEST_CAP):
            return None
        cap = _largest(works, _SMALLEST_CAP, self.needed(None))
        return Placement(room(cap), cap, deletes)

    def below(self, placement: Placement) -> int:
        """Most positions that are ever below the device; the store fills before it grows."""
        if placement.positions == self.capacity:
            return 0
        selection = self.selection(placement.cap)
        return first_recent(self.capacity, placement.positions, "" if selection is None else selection.encode(), 0)

    def sizes(self, placement: Placement, budgets: Budgets) -> TierSizes:
        """What the tiers hold, with as few positions deleted as possible."""
        device, cap, below = placement.positions, placement.cap, self.below(placement)
        if not placement.deletes:
            host = min(below, budgets.host // self.kv)
            return TierSizes(device, host, below - host, self.staged, cap)
        least = Below(self.kv, self.hidden, budgets.host, budgets.disk).least_deleted(below)
        deleted = below if self.config.recompute == "always" or least is None else least
        host, until = (0, 0) if deleted < below else self._shared_room(placement, deleted)
        if until:
            return TierSizes(device, host, 0, self.staged, cap, deleted, self.model.hidden_size, until)
        # Before rows are deleted the host has room for as many as beside their layer inputs.
        host = 0 if deleted == below else min(below, (budgets.host - self.hidden * deleted) // self.kv)
        disk = max(0, below - deleted - host)
        return TierSizes(device, host, disk, self.staged, cap, deleted, self.model.hidden_size)

    def _shared_room(self, placement: Placement, deleted: int) -> tuple[int, int]:
        """Where the host has room for layer inputs alone: positions whose rows it holds until these come, and tokens.

        None where K and V of several shapes, or scales, would not fit into one another's room, nor where all rows have
        to leave as layer inputs.
        """
        if self.config.recompute == "always" or self.config.kv_dtype == "int8" or len(self.model.stores) > 1:
            return 0, 0
        selection = self.selection(placement.cap)
        spec = "" if selection is None else selection.encode()

        def works(tokens: int) -> bool:
            return self.kv * first_recent(tokens, placement.positions, spec, 0) <= self.hidden * (deleted - tokens)

        fits = placement.positions - 1  # so many tokens, and nothing is below the device
        if fits < 1 or not works(fits):
            return 0, 0
        until = _largest(works, fits, deleted)
        return (self.hidden * (deleted - until) // self.kv, until) if until > fits else (0, 0)

    def is_feasible(self, device: int, host: int, disk: int) -> bool:
        """Whether some plan keeps within these budgets."""
        return self.placement(device, host, disk) is not None


def _largest(works: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that works; `low` does, and beyond one that does not, none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if works(middle) else (low, middle - 1)
    return low


def _problem(
    demand: Demand, placement: Placement, budgets: Budgets, profile: MachineProfile, objective: str
) -> Problem:
    steps = demand.new_tokens
    n = demand.prompt + np.arange(steps, dtype=np.int64)
    selection = demand.selection(placement.cap)
    refresh, churn = np.ones(steps), np.zeros(steps)
    working_set, next_set, dynamic, refresh_next = n, n + 1, np.zeros_like(n), np.ones(steps)
    if selection is not None:
        contexts = np.arange(demand.prompt, demand.prompt + steps + 1)
        local, globals_ = (
            np.array([int(rows(int(length))) for length in contexts], dtype=np.int64)
            for rows in (selection.local_rows, selection.dynamic_rows)
        )
        working_set, next_set, dynamic = (local + globals_)[:-1], (local + globals_)[1:], globals_[1:]
        shares = _refresh_shares(demand.model, selection, steps + 1)
        refresh, refresh_next = shares[:-1], shares[1:]
        churn[:] = churn_of(selection, profile, n + 1, next_set, dynamic)
    refresh[0] = churn[0] = 0  # a dense prefill attends to what it has at hand
    sizes = demand.sizes(placement, budgets)
    return Problem(
        prompt=demand.prompt,
        steps=steps,
        most_resident=placement.positions,
        least_resident=min(placement.positions, demand.needed(placement.cap)),
        below=Below(demand.kv, demand.hidden, budgets.host, budgets.disk),
        working_set=working_set,
        dynamic=dynamic,
        next_set=next_set,
        refresh=refresh,
        refresh_next=refresh_next,
        churn=churn,
        links=_links(demand, profile),
        compute=compute_table(demand.model, demand.config, profile, demand.capacity),
        recompute=recompute_table(demand.model, profile, demand.capacity),
        prefill_seconds=_prefill_seconds(demand.model, profile, demand.prompt),
        may_recompute=demand.may_recompute,
        least_deleted=sizes.deleted,
        shares_host=sizes.shared_until > 0,
        must_recompute=demand.config.recompute == "always",
        objective=objective,
    )


def churn_of(selection: SelectionSpec, profile: MachineProfile, n: Ints, working_set: Ints, dynamic: Ints) -> Floats:
    """Share of the dynamic rows that are new, by step."""
    if selection.rank in profile.churn:
        return np.full(len(n), profile.churn[selection.rank])
    if selection.rank == "hash":  # an even draw among all that are not local
        candidates = np.maximum(n - (working_set - dynamic), 1)
        return np.asarray(1 - dynamic / candidates, dtype=np.float64)
    return np.full(len(n), DEFAULT_CHURN[selection.rank])


def _refresh_shares(model: ModelShape, selection: SelectionSpec, steps: int) -> Floats:
    """Share of layers that attend to everything, by step; layers take turns, so it repeats."""
    if not selection.refresh:
        return np.zeros(steps)
    layers = [layer for store in model.stores for layer in range(store.num_layers)]
    cycle = [np.mean([selection.is_refresh_step(step, layer) for layer in layers]) for step in range(selection.refresh)]
    return np.resize(np.array(cycle, dtype=np.float64), steps)


def _links(demand: Demand, profile: MachineProfile) -> Links:
    """Effective rates over all stores: each moves rows of its own size."""
    sizes = [
        (position_bytes(store, demand.config), row_shape(store, demand.config).bytes_per_row)
        for store in demand.model.stores
    ]
    hidden_row = demand.hidden // (demand.model.layers * demand.model.batch_size)

    def rate(table: Table) -> float:
        return demand.kv / sum(share / float(table.at(row)) for share, row in sizes)

    return Links(
        down=rate(profile.device_to_host),
        up=rate(profile.host_to_device),
        disk_write=rate(profile.disk_write),
        disk_read=rate(profile.disk_read),
        hidden_down=float(profile.device_to_host.at(hidden_row)),
        hidden_up=float(profile.host_to_device.at(hidden_row)),
    )


def compute_table(model: ModelShape, config: AlisaConfig, profile: MachineProfile, capacity: int) -> Table:
    """Seconds of a decode step by rows attended: matrix products, attention in every layer, calls."""
    products = model.parameters * float(profile.linear.at(model.batch_size))
    products *= float(profile.matrix.at(model.matrix_parameters))
    calls = (model.layers + model.unmanaged) * profile.layer_seconds

    def seconds(rows: int) -> float:
        attention = 0.0
        for store in model.stores:
            layer = position_bytes(store, config) // store.num_layers
            attention += store.num_layers * float(profile.attention.at(rows * layer))
        return products + attention + calls

    return Table(tuple((float(rows), seconds(rows)) for rows in _powers(capacity)), grows=True)


def recompute_table(model: ModelShape, profile: MachineProfile, capacity: int) -> Table:
    """Seconds of rebuilding K and V of so many positions in all layers: two products a layer; from (0, 0)."""
    parameters = sum(
        2 * model.hidden_size * store.kv_heads * store.head_dim * store.num_layers for store in model.stores
    )
    points = [
        (float(count), parameters * float(profile.linear.at(count * model.batch_size))) for count in _powers(capacity)
    ]
    return Table(((0.0, 0.0), *points), grows=True)


def _prefill_seconds(model: ModelShape, profile: MachineProfile, prompt: int) -> float:
    """Compute of the prefill: every token times every parameter, and causal attention at the same rate."""
    tokens = prompt * model.batch_size
    # Per token, attention multiplies half of the prompt's K and V rows with every query head, about the hidden size.
    attended = model.layers * prompt * model.hidden_size
    return float(profile.linear.at(tokens)) * (model.parameters + attended)


def _powers(most: int) -> list[int]:
    return sorted({1 << exponent for exponent in range(most.bit_length())} | {most})


def _plan(
    demand: Demand,
    placement: Placement,
    budgets: Budgets,
    problem: Problem,
    line: Timeline,
    p2: int | None,
    deleted: int,
) -> Plan:
    kv, fixed, p1 = demand.kv, _fixed(demand, placement), problem.p1
    fits = placement.positions == demand.capacity
    staging = 0 if fits else demand.staging
    host = kv * (line.old - line.deleted - line.on_disk) + demand.hidden * line.hidden
    by_tier = {
        "device": _whole(fixed + staging + kv * line.resident),
        "host": _whole(host),
        "disk": _whole(kv * line.on_disk),
    }
    peak = {tier: max(steps) for tier, steps in by_tier.items()}
    peak["device"] = fixed + staging + kv * placement.positions
    if p2 is None:
        sizes = demand.sizes(placement, budgets)
        rows = 0 if sizes.shared_until else sizes.host
        peak |= {"host": kv * rows + demand.hidden * sizes.deleted, "disk": kv * sizes.disk}
    on_disk = np.flatnonzero(line.on_disk)
    last = problem.positions[-1]
    return Plan(
        batch_size=demand.model.batch_size,
        prompt_length=demand.prompt,
        max_new_tokens=demand.new_tokens,
        objective=problem.objective,
        p1=p1,
        p2=p2,
        alpha=float(1 - line.resident[-1] / last),
        beta=float(line.deleted[-1] / last),
        resident_positions=placement.positions,
        deleted_positions=deleted,
        max_rows=placement.cap,
        churn=float(np.median(problem.churn[1:])) if problem.steps > 1 else 0.0,
        first_disk_step=int(on_disk[0]) if len(on_disk) else None,
        position_bytes=kv,
        fixed_bytes=fixed,
        staging_bytes=staging,
        budget_bytes=budgets.by_tier,
        peak_bytes=peak,
        bytes_by_tier=by_tier,
        bytes_moved={name: _whole(values) for name, values in line.moved.items()},
        rows_recomputed=tuple(line.rebuilt.tolist()),
        compute_ms=_ms(line.compute),
        recompute_ms=_ms(line.recompute),
        transfer_ms=_ms(line.transfer),
        step_ms=_ms(line.seconds),
        reasons=_reasons(demand, placement, budgets, problem, line, p2, staging),
    )


def _fixed(demand: Demand, placement: Placement) -> int:
    """Bytes on the device beside rows and staging."""
    if placement.positions == demand.capacity:
        return demand.fixed(None, tiered=False)
    return demand.fixed(placement.cap, deletes=placement.deletes) + (demand.slot - demand.kv) * placement.positions


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(round(value) for value in values.tolist())


def _ms(seconds: Floats) -> tuple[float, ...]:
    return tuple((1e3 * seconds).tolist())


def _reasons(
    demand: Demand,
    placement: Placement,
    budgets: Budgets,
    problem: Problem,
    line: Timeline,
    p2: int | None,
    staging: int,
) -> dict[str, str]:
    """By phase, tier or variable, a few words each; a phase that never is has none."""
    kv, p1, fixed = demand.kv, problem.p1, _fixed(demand, placement)
    size = f"{format_bytes(budgets.device)} ({budgets.origin['device']})"
    reasons = {}
    if p1 is None:
        reasons["I"] = "everything fits the device"
        whole = format_bytes(fixed + staging + kv * placement.positions)
        which = "all" if placement.positions == demand.capacity else f"{placement.positions} of"
        reasons["device"] = f"{which} {demand.capacity} positions take {whole} of {size}"
    else:
        if p1 > 0:
            reasons["I"] = "until here everything fits the device"
        if p2 != p1:
            reasons["II"] = f"position {int(problem.positions[p1]) + 1} does not fit the device"
        reasons["device"] = (
            f"{size} holds {placement.positions} positions of {format_bytes(kv)}, beside {format_bytes(fixed)} of "
            f"tables and scores and {format_bytes(staging)} of staging"
        )
        reasons["alpha"] = f"{1 - line.resident[-1] / problem.positions[-1]:.3f} of the positions are away at the end"
        reasons["beta"] = _about_recompute(demand, problem, line, p2)
        reasons["form"] = _about_forms(demand, problem)
    if p2 is not None:
        reasons["III"] = f"the {int(line.deleted[-1])} oldest positions are rebuilt when needed"
        if demand.model.stores[0].device.type != "cpu":
            reasons["recompute"] = "not available yet on a GPU: there this phase can be planned, not run"
    if placement.cap is not None:
        full = demand.needed(None)
        reasons["max_rows"] = f"the working set stays at {placement.cap} rows, because {full} in all layers do not fit"
    if line.on_disk.any():
        first = int(np.flatnonzero(line.on_disk)[0])
        reasons["disk"] = f"used from step {first}, where the host's {format_bytes(budgets.host)} are full"
    if demand.model.unmanaged:
        reasons["unmanaged"] = f"{demand.model.unmanaged} layers keep transformers' own cache, which is not counted"
    return reasons


def _about_recompute(demand: Demand, problem: Problem, line: Timeline, p2: int | None) -> str:
    hidden, kv = format_bytes(demand.hidden), format_bytes(demand.kv)
    sizes = f"hidden states take {hidden} a position, K and V {kv}"
    if p2 is not None:
        share = line.deleted[-1] / problem.positions[-1]
        if demand.config.recompute == "always":
            why = "recompute='always'"
        elif problem.below.fits(int(line.old[-1]), 0, 0):
            why = "rebuilding them is faster than loading"
        else:
            why = "host and disk do not hold K and V of all"
        return f"{share:.3f} of the positions are deleted at the end: {why}; {sizes}"
    if demand.config.recompute == "off":
        return "0, because recompute is off"
    if demand.hidden >= demand.kv:
        return f"0, because recomputing cannot win: {sizes}"
    return "0, because loading K and V is not slower than rebuilding them"


def _about_forms(demand: Demand, problem: Problem) -> str:
    """What rows that are to be deleted are kept as, by the minimum cut of each K/V shape, and what that costs."""
    batch, capacity = demand.model.batch_size, demand.capacity
    products = 4 * demand.model.hidden_size * batch * capacity
    products *= sum(store.num_layers * store.kv_heads * store.head_dim for store in demand.model.stores)
    machine = Machine(problem.links.up, products / float(problem.recompute.at(capacity)))
    texts = []
    for store in demand.model.stores:
        tensors = layer_tensors(
            demand.model.hidden_size, store.kv_heads, store.head_dim, store.dtype.itemsize, demand.config.kv_dtype
        )
        smallest, *_, loaded = [*distinct_cuts(tensors)] * 2
        layers = "all layers" if len(demand.model.stores) == 1 else f"{store.num_layers} layers"
        if not smallest.flops:
            texts.append(f"{loaded.form} in {layers}: no smaller tensor makes K and V again")
            continue
        rebuild, load = (1e6 * cut.seconds(machine) for cut in (smallest, loaded))
        texts.append(
            f"{smallest.form} in {layers}: {smallest.bytes} B of a token's layer input instead of {loaded.bytes} B of "
            f"K and V, {smallest.flops / 1e6:.3g} MFLOP to rebuild them; {rebuild:.3g} us instead of {load:.3g} us"
        )
    return "; ".join(texts)


def _infeasible(demand: Demand, budgets: Budgets, tokens: str) -> InfeasibleError:
    given = budgets.by_tier
    everything = demand.fixed(None) + demand.staging + (demand.slot + demand.hidden) * demand.capacity
    smallest = {}
    for tier in TIERS:
        if demand.is_feasible(**{**given, tier: everything}):

            def too_small(size: int, tier: str = tier) -> bool:
                return not demand.is_feasible(**{**given, tier: size})

            smallest[tier] = _largest(too_small, given[tier], everything) + 1
    longest = _longest_context(demand, given)
    choices = [f"{tier}_kv_budget to {count} bytes ({format_bytes(count)})" for tier, count in smallest.items()]
    fix = f"raise {' or '.join(choices) if choices else 'the budgets of several tiers'}"
    fix += f", or use a context of at most {longest} tokens" if longest else "; no context at all fits"
    got = ", ".join(f"{tier} {format_bytes(size)} ({budgets.origin[tier]})" for tier, size in given.items())
    return InfeasibleError(
        f"{tokens} do not fit the KV budgets",
        got=got,
        expected=_expected(demand, given),
        fix=fix,
        smallest_budgets=smallest,
        longest_context=longest,
    )


def _expected(demand: Demand, given: dict[str, int]) -> str:
    kv = format_bytes(demand.kv)
    if demand.place(given["device"]) is not None:
        return f"room for all {demand.capacity} positions of {kv} on the three tiers together"
    capped = demand.config.max_rows == "auto" and demand.config.is_sparse and not demand.config.paper
    cap = _SMALLEST_CAP if capped else None
    needs = "the working sets of all layers" if demand.config.is_sparse else "one new position"
    return (
        f"on the device at least {format_bytes(demand.fixed(cap))} of tables and scores, "
        f"{format_bytes(demand.staging)} of staging, and {format_bytes(demand.needed(cap) * demand.slot)} for {needs}"
    )


def _longest_context(demand: Demand, given: dict[str, int]) -> int:
    """Prompt and new tokens together, the prompt shortened only where it must be; 0 = none."""

    def works(context: int) -> bool:
        prompt = min(demand.prompt, context - 1)
        shorter = Demand(demand.model, dataclasses.replace(demand.config, max_length=None), prompt, context - prompt)
        return shorter.is_feasible(**given)

    longest = demand.prompt + demand.new_tokens
    return _largest(works, 2, longest) if longest >= 2 and works(2) else 0
