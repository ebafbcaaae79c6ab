"""The search against brute force, phases where the arithmetic says, and plans that never get worse with more room."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers as hf

import alisa_compile
from alisa_compile import AlisaConfig, ConfigError, InfeasibleError, NotAvailableError
from alisa_compile.kernels.tiers import TRAFFIC_PLACES
from alisa_compile.runtime import budgets as budgets_module
from alisa_compile.runtime.budgets import Budgets
from alisa_compile.runtime.footprint import fixed_bytes, position_bytes, store_bytes, tier_bytes
from alisa_compile.runtime.plan import ModelShape, Plan, make_plan
from alisa_compile.runtime.planner import Below, Links, Problem, search, timeline
from alisa_compile.runtime.profile import MachineProfile, Table
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.support import tiny_model

CPU = torch.device("cpu")
GIB = 2**30


def profile(link: float = 1e9, **changes: Any) -> MachineProfile:
    """A machine with round numbers: link and disk in bytes a second, attention 10 GB/s, products 1 ns a parameter."""
    rates = Table(((256.0, link / 2), (4096.0, link)))
    numbers: dict[str, Any] = {
        "machine": "test",
        "device": "cpu",
        "dtype": "float32",
        "device_to_host": rates,
        "host_to_device": rates,
        "disk_write": Table(((4096.0, link / 10),)),
        "disk_read": Table(((4096.0, link / 10),)),
        "attention": Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
        "linear": Table(((1.0, 1e-9), (64.0, 1e-9), (128.0, 2e-9)), grows=True),
        "layer_seconds": 1e-6,
    }
    return MachineProfile(**{**numbers, **changes})


def store(**changes: Any) -> StoreShape:
    return StoreShape(
        **{"num_layers": 4, "batch_size": 1, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32, **changes},
        device=CPU,
    )


def model(*stores: StoreShape, hidden: int = 128) -> ModelShape:
    return ModelShape(stores or (store(),), hidden, 100_000)


def planned(
    device: int,
    host: int = GIB,
    disk: int = 0,
    *,
    prompt: int = 300,
    new: int = 100,
    shape: ModelShape | None = None,
    machine: MachineProfile | None = None,
    objective: str = "overlapped",
    **options: Any,
) -> Plan:
    budgets = Budgets(device, host, disk, dict.fromkeys(("device", "host", "disk"), "as given"))
    return make_plan(
        shape or model(),
        AlisaConfig(**options),
        budgets,
        machine or profile(),
        prompt_length=prompt,
        max_new_tokens=new,
        objective=objective,
    )


# the search


def random_problem(seed: int) -> Problem:
    """Small, with tables that rise and fall; every third can recompute more cheaply than load."""
    rng = random.Random(seed)
    prompt, steps = rng.randint(1, 8), rng.randint(1, 9)
    last = prompt + steps - 1
    contexts = range(prompt, prompt + steps + 1)
    local = [rng.randint(1, max(1, n // 3)) for n in contexts]
    dynamic = sorted(rng.randint(0, max(0, n // 3)) for n in contexts)
    working = [min(n, a + b) for n, a, b in zip(contexts, local, dynamic, strict=True)]
    shares = [rng.choice((0.0, 0.0, 0.5, 1.0)) for _ in contexts]
    least = max(working)
    most = rng.randint(least, max(least, last + 1))
    kv = rng.choice((100, 64))
    hidden = rng.choice((kv // 2, kv // 4, 10, kv, 2 * kv))
    host = rng.choice((rng.randint(0, kv * last + kv), 1 << 62))

    def table(first: float, high: float) -> Table:
        xs = sorted({first, *(float(rng.randint(1, last + 2)) for _ in range(4))})
        ys = [0.0 if x == 0 else rng.uniform(0.01, 1) * high for x in xs]
        if rng.random() < 0.3:
            ys.sort()
        return Table(tuple(zip(xs, ys, strict=True)), grows=len(xs) > 1)

    link = [rng.uniform(20, 400) for _ in range(6)]
    return Problem(
        prompt=prompt,
        steps=steps,
        most_resident=most,
        least_resident=least,
        below=Below(kv, hidden, host, rng.choice((0, kv * rng.randint(0, last)))),
        working_set=np.array(working[:-1]),
        next_set=np.array(working[1:]),
        dynamic=np.array(dynamic[1:]),
        refresh=np.array([0.0, *shares[1:-1]]),
        refresh_next=np.array(shares[1:]),
        churn=np.array([0.0, *(rng.random() for _ in range(steps - 1))]),
        links=Links(*link),
        compute=table(1.0, 2),
        recompute=table(0.0, rng.choice((0.01, 1))),
        prefill_seconds=rng.random(),
        may_recompute=rng.random() < 0.8,
        objective=rng.choice(("overlapped", "paper")),
        shares_host=rng.random() < 0.2,
    )


def interpolate(table: Table, x: float) -> float:
    """Straight lines, constant before the first point, proportional after the last."""
    points = table.points
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1] * (x / points[-1][0] if table.grows else 1)


def brute_cost(p: Problem, resident: int, count: int, p2: int) -> float:
    """Seconds of all steps, position by position and without the code under test; inf = it does not fit.

    p2 = steps: never.
    """
    kv, hidden, link = p.below.kv, p.below.hidden, p.links
    starts = [j for j in range(p.steps) if p.prompt + j >= p.most_resident]
    written: set[int] = set()  # positions that the host or disk was given
    on_disk_before: set[int] = set()
    hidden_before: set[int] = set()
    old_count = 0
    disk_share_before = 0.0
    total = 0.0
    for j in range(p.steps):
        n = p.prompt + j
        away = n - resident if j in starts else 0
        dynamic = int(p.dynamic[j]) if j in starts else 0
        # Slots for the coming step: its dynamic rows, and its token.
        old = list(range(min(n, away + dynamic + 1) if j in starts else 0))
        gone = set(old[:count]) if j >= p2 else set()
        kept = [position for position in old if position not in gone]
        states = set(range(min(count, n)))
        room, on_disk = p.below.host - hidden * count, p.below.disk  # kept free for all of them
        if p.shares_host and count:
            room, on_disk = min(p.below.host, hidden * count) - hidden * len(states), 0
        in_host = max(0, min(len(kept), room // kv))
        disk = set(kept[: len(kept) - in_host])
        if room < 0 or len(disk) * kv > on_disk:
            return math.inf
        new = [position for position in kept if position >= old_count and position not in written]
        share = len(gone) / max(len(old), 1)
        w, rho, rho_next = int(p.working_set[j]), float(p.refresh[j]), float(p.refresh_next[j])
        others = n + 1 - int(p.next_set[j])  # neither local nor dynamic in the coming step
        entering = float(p.churn[j]) * dynamic * away / max(others, 1)
        if j == 0:
            entering += dynamic * len(old) / max(others + dynamic, 1)
        needed = (1 - rho_next) * entering + rho * away
        transfer = kv * len(new) / link.down + hidden * len(states - hidden_before) / link.hidden_down
        transfer += kv * needed * (1 - share) / link.up + hidden * needed * share / link.hidden_up
        transfer += kv * len([x for x in disk if x > max(on_disk_before, default=-1)]) / link.disk_write
        read = (1 - rho_next) * entering * len(disk) / max(len(old), 1) + rho * away * disk_share_before
        transfer += kv * read / link.disk_read
        compute = (1 - rho) * interpolate(p.compute, w) + rho * interpolate(p.compute, n)
        if j == 0:
            compute = p.prefill_seconds
        compute += (1 - rho_next) * interpolate(p.recompute, entering * share)
        compute += rho * interpolate(p.recompute, away * share)
        waited = rho * away * (kv * (1 - share) / link.up + hidden * share / link.hidden_up)
        waited += kv * rho * away * disk_share_before / link.disk_read
        total += max(compute + waited, transfer) if p.objective == "overlapped" else compute + transfer
        written.update(kept)
        disk_share_before = len(disk) / max(len(old), 1)
        old_count = max(old_count, len(old))
        on_disk_before, hidden_before = on_disk_before | disk | gone, states
    return total


def brute_force(p: Problem) -> float:
    """The least over every R, D and p2."""
    starts = [j for j in range(p.steps) if p.prompt + j >= p.most_resident]
    if not starts:
        return brute_cost(p, p.most_resident, 0, p.steps)
    last = p.prompt + p.steps - 1
    best = math.inf
    for resident in range(p.least_resident, p.most_resident + 1):
        best = min(best, brute_cost(p, resident, 0, p.steps))
        for count in range(1, min(last, last - resident + int(p.dynamic[-1]) + 1) + 1 if p.may_recompute else 1):
            for p2 in range(starts[0], p.steps):
                best = min(best, brute_cost(p, resident, count, p2))
    return best


def test_search_equals_brute_force() -> None:
    """200 random problems; all kinds occur: each last phase, III by choice, disk, no room, and tables that fall."""
    kinds = {"I": 0, "II": 0, "III": 0, "early III": 0, "disk": 0, "no fit": 0, "falling": 0}
    for seed in range(200):
        problem = random_problem(seed)
        found, expected = search(problem), brute_force(problem)
        if found is None:
            assert expected == math.inf, seed
            kinds["no fit"] += 1
            continue
        assert found.seconds == pytest.approx(expected, rel=1e-9, abs=1e-9), (seed, found)
        line = timeline(problem, found.resident, found.deleted, found.p2)
        assert line.seconds.sum() == pytest.approx(expected, rel=1e-9, abs=1e-9), (seed, found)
        assert line.fits.all()
        kinds["falling"] += not problem.recompute.is_rising
        kinds["disk"] += bool(line.on_disk.any())
        kinds["early III"] += found.p2 is not None and bool(problem.below.fits(int(line.old[-1]), 0, 0))
        kinds["III" if found.p2 is not None else "I" if problem.p1 is None else "II"] += 1
    assert all(count >= 5 for count in kinds.values()), kinds


def test_greedy_alpha_would_fail() -> None:
    """Rebuilding one row takes longer than rebuilding ten, and some have to be: fewer resident positions are best."""
    steps = 3
    problem = Problem(
        prompt=20,
        steps=steps,
        most_resident=17,
        least_resident=1,
        below=Below(100, 10, 400, 0),
        working_set=20 + np.arange(steps),
        next_set=21 + np.arange(steps),
        dynamic=np.zeros(steps, dtype=np.int64),
        refresh=np.array([0.0, 1.0, 1.0]),
        refresh_next=np.ones(steps),
        churn=np.zeros(steps),
        links=Links(*[1e6] * 6),
        compute=Table(((1.0, 1.0),)),
        recompute=Table(((0.0, 0.0), (1.0, 100.0), (10.0, 1.0)), grows=True),
    )
    found = search(problem)
    assert found is not None and found.resident < 17 and found.deleted > 0
    assert found.seconds == pytest.approx(brute_force(problem), rel=1e-9)
    rising = dataclasses.replace(problem, recompute=Table(((0.0, 0.0), (10.0, 1.0)), grows=True))
    found = search(rising)
    assert found is not None and found.resident == 17
    assert found.seconds == pytest.approx(brute_force(rising), rel=1e-9)


def test_ties_delete_nothing() -> None:
    """Where the transfer hides behind compute either way, rows are not deleted for nothing."""
    shape = model(store(kv_heads=8), hidden=64)
    plan = planned(400_000, shape=shape, machine=profile(link=1e15))
    assert plan.p1 is not None and plan.p2 is None and plan.beta == 0


def test_slow_link_recomputes_before_the_host_is_full() -> None:
    """Hidden states a quarter of K and V over a slow link: rebuilding is faster, and p2 is no question of room."""
    shape = model(store(kv_heads=8), hidden=64)
    plan = planned(400_000, shape=shape, machine=profile(link=1e6), policy="churn")
    assert plan.p2 is not None and plan.beta > 0 and sum(plan.rows_recomputed) > 0
    assert (
        plan.total_ms
        < planned(400_000, shape=shape, machine=profile(link=1e6), policy="churn", recompute="off").total_ms
    )


# phases


def test_everything_fits() -> None:
    plan = planned(GIB)
    assert (plan.p1, plan.p2, plan.alpha, plan.beta) == (None, None, 0, 0)
    assert [phase["phase"] for phase in plan.phases] == ["I"]
    assert not any(any(steps) for steps in plan.bytes_moved.values())
    assert not any(plan.bytes_by_tier["host"]) and set(plan.step_ms) == set(plan.compute_ms)
    everything = sum(store_bytes(store(), AlisaConfig(), 400).values())
    assert plan.peak_bytes == {"device": everything, "host": 0, "disk": 0}
    assert planned(everything).p1 is None
    assert planned(everything - 1).p1 is not None


def opt_30b() -> ModelShape:
    return ModelShape((StoreShape(48, 64, 56, 128, torch.float16, CPU),), 7168, 30_000_000_000)


def test_opt_30b_at_the_setting_of_the_paper() -> None:
    """b 64, s 128, n 512, 16 GiB for KV in float16: 4blh = 88.1 MB a position, so about 180 fit and p1 is about 54.

    Exactly: from 16 GiB go the residency table and the validity bits of 640 positions, 128 staged positions of one
    layer, the numbers of the tiers, and the owner of each slot.
    """
    position = 4 * 64 * 48 * 7168
    assert position == 88_080_384
    table, valid, length = 48 * 64 * 640 * 4, 64 * 640, 48 * 8
    staging, movement, slot = 128 * (position // 48), 8 * (4 * 48 + 1 + 64 + TRAFFIC_PLACES), position + 48 * 64 * 4
    fits = (16 * GIB - table - valid - length - movement - staging) // slot
    assert fits == 192
    plan = planned(16 * GIB, 128 * GIB, prompt=128, new=512, shape=opt_30b(), sparsity=0.0)
    assert plan.position_bytes == position and plan.resident_positions == fits
    assert plan.p1 == fits - 128 == 64
    assert plan.alpha == pytest.approx(1 - fits / (128 + 511))
    # 16e9 bytes are 181.7 positions, less 2.8 of staging and tables.
    assert planned(16 * 10**9, 128 * GIB, prompt=128, new=512, shape=opt_30b(), sparsity=0.0).p1 == 178 - 128
    sparse = planned(16 * GIB, 128 * GIB, prompt=128, new=512, shape=opt_30b())
    scores, sets = 48 * 64 * 640 * 4, 48 * 64 * (128 + 1) * 4 + 16
    without_owners = table + valid + length + movement + scores + sets
    fits = (16 * GIB - without_owners - staging) // slot
    assert sparse.fixed_bytes == without_owners + fits * (slot - position)
    assert sparse.p1 == fits - 128


def test_prompt_larger_than_the_device() -> None:
    """p1 = 0: the prefill itself leaves, all but the most recent positions: the others' slots are for the coming
    step, of its dynamic rows and its token. The dynamic rows among those that left come back at once.
    """
    plan = planned(200_000, sinks=0, refresh=0)
    assert plan.p1 == 0 and plan.phases[0]["phase"] == "II"
    dynamic = 30  # a tenth of 300
    moved = plan.bytes_moved["device_to_host"]
    left = 300 - plan.resident_positions + dynamic + 1
    assert moved[0] == plan.position_bytes * left
    assert plan.bytes_moved["host_to_device"][0] == round(plan.position_bytes * dynamic * left / (301 - 30))
    # From then on one position a step, and one more whenever a dynamic row more may be dropped.
    later = [count // plan.position_bytes for count in moved[1:]]
    assert set(later) == {1, 2} and sum(later) == 99 + 10
    assert plan.bytes_by_tier["host"][-1] == sum(moved)


def test_refresh_streams_what_is_not_resident() -> None:
    """A layer that refreshes reads every position: at such a step its share of all non-resident ones moves."""
    plan = planned(250_000, refresh=32, policy="swa", sinks=0)
    calm = planned(250_000, refresh=0, policy="swa", sinks=0)
    up, calm_up = plan.bytes_moved["host_to_device"], calm.bytes_moved["host_to_device"]
    layer = plan.position_bytes / 4
    for step in range(1, 100):
        away = 300 + step - plan.resident_positions
        turn = sum((step + index) % 32 == 0 for index in range(4))
        coming = sum((step + 1 + index) % 32 == 0 for index in range(4))  # has no working set to fetch
        assert up[step] == pytest.approx(turn * layer * away + (1 - coming / 4) * calm_up[step], abs=1), step
    assert sum(up) > 2 * sum(calm_up)


def test_churn_policy_moves_much() -> None:
    """At 0.8 sparsity 8 of 9 dynamic rows are new in each step; of these, those come that were not resident."""
    plan = planned(250_000, policy="churn")
    step, n = 50, 350
    local = dynamic = 35
    away = n - plan.resident_positions
    expected = plan.position_bytes * dynamic * away / (n + 1 - local)
    assert plan.bytes_moved["host_to_device"][step] == round(expected)
    local_only = planned(250_000, policy="local")
    assert not any(local_only.bytes_moved["host_to_device"]) and any(local_only.bytes_moved["device_to_host"])


def test_measured_churn_replaces_the_default() -> None:
    calm, busy = (planned(250_000, refresh=0, machine=profile(churn={"decay": share})) for share in (0.01, 0.5))
    pairs = list(zip(calm.bytes_moved["host_to_device"], busy.bytes_moved["host_to_device"], strict=True))
    assert all(b == pytest.approx(50 * a, abs=30) for a, b in pairs[1:])
    assert pairs[0][0] == pairs[0][1] > 0  # what the prefill seeds is no churn
    assert sum(busy.bytes_moved["host_to_device"]) > 0


def test_dense_streams_everything() -> None:
    """At sparsity 0 every step needs every position, and the device may hold as little as one."""
    plan = planned(150_000, sparsity=0.0)
    away = [300 + step - plan.resident_positions for step in range(100)]
    assert list(plan.bytes_moved["host_to_device"][1:]) == [plan.position_bytes * count for count in away[1:]]
    assert plan.bytes_moved["host_to_device"][0] == 0


def test_disk_takes_what_the_host_cannot() -> None:
    slow: dict[str, Any] = {"recompute": "off", "policy": "churn", "machine": profile(link=1e7)}
    plan = planned(250_000, 100_000, GIB, **slow)
    assert plan.first_disk_step is not None and plan.p2 is None
    assert "disk" in plan.reasons and max(plan.bytes_by_tier["host"]) <= 100_000
    assert sum(plan.bytes_moved["disk_write"]) == plan.bytes_by_tier["disk"][-1] > 0
    assert sum(plan.bytes_moved["disk_read"]) > 0
    roomy = planned(250_000, GIB, GIB, **slow)
    assert roomy.first_disk_step is None
    assert plan.total_ms > roomy.total_ms


def test_phase_three_where_the_host_is_full() -> None:
    """Hidden states half of K and V: deleting makes room."""
    shape = model(store(kv_heads=8), hidden=128)
    needed = max(planned(1_500_000, shape=shape, machine=profile(link=1e15)).bytes_by_tier["host"])
    plan = planned(1_500_000, 3 * needed // 4, shape=shape, machine=profile(link=1e15))
    assert plan.p1 is not None and plan.p2 is not None and plan.p1 < plan.p2
    assert [phase["phase"] for phase in plan.phases] == ["I", "II", "III"]
    assert max(plan.bytes_by_tier["host"]) <= 3 * needed // 4
    assert "recompute" not in plan.reasons  # which is where a GPU's cannot be run yet
    with pytest.raises(InfeasibleError):
        planned(1_500_000, 3 * needed // 4, shape=shape, recompute="off")
    always = planned(1_500_000, shape=shape, recompute="always")
    assert always.p2 == always.p1 and always.deleted_positions * always.position_bytes >= needed


def test_phase_three_where_the_host_ends_with_layer_inputs_alone() -> None:
    """Half of what K and V need: rows have what is free of it until the inputs come."""
    shape, machine, lengths = model(store(kv_heads=8), hidden=128), profile(link=1e15), {"prompt": 100, "new": 350}
    with pytest.raises(InfeasibleError) as caught:
        planned(800_000, 100_000, shape=shape, machine=machine, **lengths)
    host = caught.value.smallest_budgets["host"]
    plan = planned(800_000, host, shape=shape, machine=machine, **lengths)
    assert plan.p1 is not None and plan.p2 is not None and 0 < plan.p1 < plan.p2
    on_host, hidden, kv = plan.bytes_by_tier["host"], plan.position_bytes // 2, plan.position_bytes
    assert max(on_host) <= host
    assert on_host[-1] == hidden * plan.deleted_positions  # no K and V are left there
    assert on_host[plan.p2 - 1] > hidden * (100 + plan.p2 - 1)  # some were
    assert on_host[plan.p2 - 1] + kv + hidden >= hidden * plan.deleted_positions  # as long as they had room


def test_recompute_cannot_win_with_grouped_heads() -> None:
    """GQA 4:1: a hidden row is twice the K and V row, so beta is 0 even where the host is too small."""
    plan = planned(250_000, policy="churn", machine=profile(link=1e6))
    assert plan.beta == 0 and "cannot win" in plan.reasons["beta"]
    with pytest.raises(InfeasibleError) as caught:
        planned(250_000, 100_000)
    assert set(caught.value.smallest_budgets) == {"device", "host", "disk"}


def test_objective() -> None:
    """The paper adds; overlapped, a step takes what is longer."""
    options: dict[str, Any] = {"policy": "churn", "machine": profile(link=2e8)}
    added = planned(250_000, objective="paper", **options)
    hidden = planned(250_000, objective="overlapped", **options)
    parts = list(zip(hidden.compute_ms, hidden.transfer_ms, strict=True))
    assert hidden.step_ms == pytest.approx([max(pair) for pair in parts])
    assert added.step_ms == pytest.approx([sum(pair) for pair in parts])
    with pytest.raises(ConfigError, match=r"objective.*'serial'.*overlapped, paper"):
        planned(GIB, objective="serial")


# budgets


def test_working_set_is_capped_by_the_device() -> None:
    """max_rows='auto' caps it; None and the paper's Algorithm 1 never do."""
    plan = planned(70_000)
    assert plan.max_rows is not None and plan.max_rows <= plan.resident_positions < 78
    assert plan.peak_bytes["device"] <= 70_000
    assert f"stays at {plan.max_rows} rows" in plan.reasons["max_rows"]
    for options in ({"max_rows": None}, {"max_rows": 80}):
        with pytest.raises(InfeasibleError, match="the working sets of all layers"):
            planned(70_000, **options)
    assert planned(250_000).max_rows is None


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"max_rows": None},
        {"sparsity": 0.0},
        {"paper": True},
        {"kv_dtype": "int8"},
        {"policy": "local", "max_rows": None},
        {"head_mode": "per_kv_head"},
    ),
)
def test_smallest_budget_works_and_one_byte_less_does_not(options: dict[str, Any]) -> None:
    with pytest.raises(InfeasibleError) as caught:
        planned(100, **options)
    smallest = caught.value.smallest_budgets["device"]
    assert str(smallest) in str(caught.value)
    plan = planned(smallest, **options)
    assert plan.peak_bytes["device"] <= smallest
    with pytest.raises(InfeasibleError):
        planned(smallest - 1, **options)


def test_smallest_budget_is_the_largest_need() -> None:
    """Working sets of all layers, or a single position, beside tables and staging."""
    for options, rows in (({"max_rows": None, "sinks": 0}, 80), ({"sparsity": 0.0}, 1)):
        with pytest.raises(InfeasibleError) as caught:
            planned(100, **options)
        config, capacity = AlisaConfig(**options), 400
        position, owners = position_bytes(store(), config), 4 * 4
        expected = (
            fixed_bytes(store(), config, capacity, tiered=True) + 128 * position // 4 + rows * (position + owners)
        )
        assert caught.value.smallest_budgets == {"device": expected}


def test_smallest_host_and_disk() -> None:
    with pytest.raises(InfeasibleError) as caught:
        planned(250_000, 1000, 0)
    found = caught.value.smallest_budgets
    for tier in ("device", "host", "disk"):
        budgets = {"device": 250_000, "host": 1000, "disk": 0, tier: found[tier]}
        assert planned(**budgets).p1 is not None or tier == "device"
        with pytest.raises(InfeasibleError):
            planned(**{**budgets, tier: found[tier] - 1})


def test_longest_context() -> None:
    """What the error names works, and one token more does not."""
    for device, host in ((100_000, 60_000), (60_000, GIB), (250_000, 1000)):
        options: dict[str, Any] = {"max_rows": None, "prompt": 3000, "new": 100}
        with pytest.raises(InfeasibleError, match="a context of at most") as caught:
            planned(device, host, **options)
        longest = caught.value.longest_context
        assert 2 <= longest < 3100 and f"at most {longest} tokens" in str(caught.value)
        for context in (longest, longest + 1):
            new = max(1, context - 3000)
            options |= {"prompt": context - new, "new": new}
            if context == longest:
                planned(device, host, **options)
            else:
                with pytest.raises(InfeasibleError):
                    planned(device, host, **options)
    with pytest.raises(InfeasibleError, match="no context at all fits") as caught:
        planned(10, 0)
    assert caught.value.longest_context == 0


@settings(max_examples=60, deadline=None)
@given(
    device=st.integers(80_000, 900_000),
    more=st.integers(0, 400_000),
    sparsity=st.sampled_from((0.0, 0.5, 0.8)),
    policy=st.sampled_from(("swa", "local", "churn", "h2o")),
    kv_dtype=st.sampled_from(("auto", "int8")),
    prompt=st.integers(1, 400),
    new=st.integers(1, 120),
)
def test_more_room_is_never_worse(
    device: int, more: int, sparsity: float, policy: str, kv_dtype: str, prompt: int, new: int
) -> None:
    """A larger device budget: p1 never earlier, alpha never larger, not more time; and every plan keeps its budgets."""
    options: dict[str, Any] = {
        "sparsity": sparsity, "policy": policy, "kv_dtype": kv_dtype, "prompt": prompt, "new": new
    }  # fmt: skip
    small, large = (planned(budget, **options) for budget in (device, device + more))
    never = 10**9
    assert (large.p1 if large.p1 is not None else never) >= (small.p1 if small.p1 is not None else never)
    assert large.alpha <= small.alpha
    # A cap that the small budget forces makes its attention cheaper, which is no merit.
    assert large.total_ms <= small.total_ms * (1 + 1e-12) or small.max_rows != large.max_rows
    for plan, budget in ((small, device), (large, device + more)):
        assert max(plan.bytes_by_tier["device"]) <= plan.peak_bytes["device"] <= budget
        assert max(plan.bytes_by_tier["host"]) <= GIB
        stored = plan.resident_positions * plan.position_bytes + plan.bytes_by_tier["host"][-1]
        assert plan.p1 is None or stored >= (prompt + new - 1) * plan.position_bytes
        assert sum(plan.bytes_moved["device_to_host"]) == plan.bytes_by_tier["host"][-1]


@settings(max_examples=30, deadline=None)
@given(host=st.integers(0, 900_000), more=st.integers(0, 400_000), link=st.sampled_from((1e6, 1e8, 1e10)))
def test_more_host_is_never_worse(host: int, more: int, link: float) -> None:
    """A larger host budget never makes an infeasible plan out of a feasible one, nor a slower one."""
    options: dict[str, Any] = {
        "shape": model(store(kv_heads=8), hidden=64), "machine": profile(link), "policy": "churn", "new": 40
    }  # fmt: skip
    try:
        small = planned(400_000, host, **options)
    except InfeasibleError:
        return
    large = planned(400_000, host + more, **options)
    assert large.total_ms <= small.total_ms * (1 + 1e-12)
    assert large.p1 == small.p1


# bytes


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"sparsity": 0.0},
        {"policy": "dense"},
        {"paper": True},
        {"kv_dtype": "int8"},
        {"kv_dtype": "int8", "head_mode": "per_kv_head"},
        {"head_mode": "per_kv_head", "max_rows": 20},
        {"policy": "h2o", "sparsity": 0.5},
        {"policy": "strided"},
        {"policy": "churn", "max_rows": 2},
    ),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("capacity", (2, 77))
def test_bytes_are_those_of_the_store(options: dict[str, Any], dtype: torch.dtype, capacity: int) -> None:
    """By kind and in sum, so that the plan cannot drift from what the store allocates; with tiers and without."""
    shape, config = store(dtype=dtype, batch_size=3), AlisaConfig(**options)
    made = TokenStore(shape, config, capacity)
    kinds = store_bytes(shape, config, capacity)
    assert sum(kinds.values()) == made.nbytes

    def size(*tensors: torch.Tensor | None) -> int:
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    assert kinds == {
        "rows": size(made.pool),
        "scales": size(made.scales),
        "table": size(made.table),
        "length": size(made.length),
        "valid": size(made.valid),
        "scores": size(made.scores),
        "working_sets": size(made.rows, made.counts, made.origin),
        "owner": 0,
        "movement": 0,
        "staging": 0,
    }
    assert kinds["rows"] + kinds["scales"] == position_bytes(shape, config) * capacity
    for sizes in (TierSizes(capacity - 1, capacity, 0, 2), TierSizes(1, 0, capacity, capacity)):
        below = TokenStore(shape, config, capacity, lambda *_, sizes=sizes: sizes)
        tiers, kinds = below.tiers, store_bytes(shape, config, capacity, sizes)
        assert tiers is not None and kinds | {
            "rows": size(below.pool),
            "scales": size(below.scales),
            "owner": size(tiers.owner),
            "movement": size(
                below.ticket, tiers.below, tiers.on_disk, tiers.home, tiers.traffic, tiers.misses
            ),
            "staging": size(tiers.staging, tiers.staging_scales),
        } == kinds  # fmt: skip
        assert tier_bytes(shape, config, capacity, sizes) == below.bytes_by_tier()
        assert below.bytes_by_tier()["device"] == sum(kinds.values())
        if below.disk is not None:
            assert os.fstat(below.disk.fileno()).st_size == below.bytes_by_tier()["disk"]


# the public function


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


def test_plan_of_a_model_and_of_its_config(llama: Any) -> None:
    """Weights are not needed, and make no difference."""
    options: dict[str, Any] = {
        "prompt_length": 100, "max_new_tokens": 20, "device_kv_budget": "100KiB", "host_kv_budget": "1 MiB",
        "profile": profile(),
    }  # fmt: skip
    with torch.device("meta"):
        meta = hf.AutoModelForCausalLM.from_config(llama.config)
    plans = [
        alisa_compile.plan(given, **options).to_dict()
        for given in (llama, llama.config, torch.compile(llama, backend="alisa"), meta)
    ]
    assert plans[0] == plans[1] == plans[2] == plans[3]
    assert plans[0]["position_bytes"] == 2 * 2 * 2 * 16 * 4
    assert {"p1", "p2", "alpha", "beta", "bytes_by_tier", "bytes_moved", "step_ms", "reasons"} <= set(plans[0])
    assert len(plans[0]["step_ms"]) == 20 and plans[0]["budget_bytes"]["host"] == 2**20


def test_plan_of_a_config_reads_no_weights() -> None:
    """OPT-30B: the shapes alone, in seconds and in little memory."""
    config = hf.OPTConfig(
        vocab_size=50272, hidden_size=7168, num_hidden_layers=48, num_attention_heads=56, ffn_dim=28672, dtype="float16"
    )
    plan = alisa_compile.plan(
        config, batch_size=64, prompt_length=128, max_new_tokens=512, device_kv_budget="16GiB",
        host_kv_budget="128GiB", profile=profile(), sparsity=0.0,
    )  # fmt: skip
    assert plan.p1 == 64 and plan.position_bytes == 4 * 64 * 48 * 7168


def test_kv_heads_as_the_model_makes_them() -> None:
    """Falcon's new decoder caches K already broadcast: the config's number would be wrong."""
    config = hf.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True,
    )  # fmt: skip
    stored = hf.AutoModelForCausalLM.from_config(config)
    cache = stored(torch.ones(1, 3, dtype=torch.int64), use_cache=True).past_key_values
    heads, width = cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]
    plan = alisa_compile.plan(
        config, prompt_length=10, max_new_tokens=2, device_kv_budget="1GiB", host_kv_budget=0, profile=profile()
    )
    assert plan.position_bytes == 2 * 2 * heads * width * 4


def test_auto_budgets(llama: Any) -> None:
    """A small model fits the machine; the reason says what `auto` came to."""
    plan = alisa_compile.plan(llama, prompt_length=10, max_new_tokens=2, profile=profile())
    assert plan.p1 is None and plan.budget_bytes["device"] > 2**20
    assert "auto: " in plan.reasons["device"] and "free" in plan.reasons["device"]


def test_mistakes(llama: Any) -> None:
    ask: dict[str, Any] = {"prompt_length": 10, "max_new_tokens": 2, "profile": profile()}
    for asked, changes, kind, text in (
        (torch.nn.Linear(2, 2), {}, ConfigError, "got: Linear; expected: a transformers model, or its config"),
        (llama, {"prompt_length": 0}, ConfigError, "prompt_length is out of range; got: 0; expected: an integer >= 1"),
        (llama, {"batch_size": 1.5}, ConfigError, r"batch_size is out of range; got: 1\.5"),
        (llama, {"max_new_tokens": True}, ConfigError, "max_new_tokens is out of range; got: True"),
        (llama, {"device_kv_budget": "6 apples"}, ConfigError, "'device_kv_budget' is not a number of bytes.*'6GiB'"),
        (llama, {"sparcity": 0.5}, ConfigError, "did you mean 'sparsity'"),
        (llama, {"validate": 2}, NotAvailableError, "validate"),
        (llama, {"device": "abacus"}, ConfigError, "cannot use this device; got: abacus"),
    ):
        with pytest.raises(kind, match=text):
            alisa_compile.plan(asked, **{**ask, **changes})


def test_budgets_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """auto: what is free, less a tenth, the weights to load and the activations; on a CPU the host gets the rest."""
    monkeypatch.setattr(budgets_module, "_free_memory", lambda: 1000)
    auto = budgets_module.resolve(AlisaConfig(), CPU, 300, 100)
    assert (auto.device, auto.host, auto.disk) == (500, 0, 0)
    part = budgets_module.resolve(AlisaConfig(device_kv_budget=200), CPU, 300, 100)
    assert (part.device, part.host) == (200, 300) and part.origin["device"] == "as given"
    full = budgets_module.resolve(AlisaConfig(host_kv_budget="1KiB"), CPU, 5000, 0)
    assert (full.device, full.host) == (0, 1024)
    disk = budgets_module.resolve(AlisaConfig(disk_kv_budget="auto", disk_path=str(tmp_path)), CPU, 0, 0)
    assert disk.disk > 0 and str(tmp_path) in disk.origin["disk"]
    with pytest.raises(ConfigError, match="a folder that exists"):
        budgets_module.resolve(AlisaConfig(disk_kv_budget="auto", disk_path=str(tmp_path / "no")), CPU, 0, 0)
