"""The churn as it was measured from a run's traffic, and the plan corrected by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import alisa_compile
from alisa_compile import AlisaConfig
from alisa_compile.runtime.budgets import Budgets
from alisa_compile.runtime.forecast import CHURN_STEPS, Forecast
from alisa_compile.runtime.plan import ModelShape, Plan, make_plan, tier_sizes
from alisa_compile.runtime.policies import selection_spec
from alisa_compile.runtime.profile import MachineProfile, Table
from alisa_compile.runtime.store import StoreShape
from tests.kernels.harness import Driver, Heads, random_block

HEADS = Heads()
LAYERS, PROMPT, STEPS = 2, 120, 60
RATE = Table(((4096.0, 1e6),))  # so slow that what moves decides the time of a step
PROFILE = MachineProfile(
    machine="test", device="cpu", dtype="float32", device_to_host=RATE, host_to_device=RATE, disk_write=RATE,
    disk_read=RATE, attention=Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
    linear=Table(((1.0, 1e-12), (64.0, 1e-12)), grows=True), layer_seconds=1e-6,
)  # fmt: skip


class Run:
    """A store that generates within a budget, with its forecast: what `report` asks of a cache."""

    def __init__(self, believed: float | None = None, **options: Any) -> None:
        self.believed = believed
        self.config = AlisaConfig(**options)
        self.shape = ModelShape(
            (StoreShape(LAYERS, 1, HEADS.kv, HEADS.dim, torch.float32, torch.device("cpu")),), 64, 9
        )
        capacity = PROMPT + STEPS
        self.budgets = Budgets(60_000, 10**9, 0, dict.fromkeys(("device", "host", "disk"), "as given"))
        sizes = tier_sizes(self.shape, self.config, self.budgets, capacity)
        assert sizes is not None
        self.driver = Driver(HEADS, capacity=capacity, layers=LAYERS, sizes=sizes, **options)
        self.stores = [self.driver.store]
        self.stores[0].statistics.forecast = Forecast(self.plan)
        self.generator = torch.Generator().manual_seed(0)
        self.new_rows = self.dynamic_rows = 0

    def plan(self, churn: float | None) -> Plan:
        spec, profile = selection_spec(self.config), PROFILE
        churn = self.believed if churn is None else churn
        if churn is not None and spec is not None:
            profile = dataclasses.replace(profile, churn={spec.rank: churn})
        return make_plan(self.shape, self.config, self.budgets, profile, prompt_length=PROMPT, max_new_tokens=STEPS)

    def forward(self, tokens: int) -> None:
        self.driver.forward(random_block(self.generator, HEADS, tokens, layers=LAYERS, dtype=torch.float32))

    def decode(self, steps: int) -> None:
        """Steps of one token, counting which dynamic rows are new in each."""
        selection = self.stores[0].selection
        assert selection is not None
        for _ in range(steps):
            before = [set(self.driver.working_set(layer) or ()) for layer in range(LAYERS)]
            self.forward(1)
            length = self.stores[0].host_length
            for layer, old in enumerate(before):
                dynamic = (self.driver.working_set(layer) or [])[: selection.dynamic_rows(length + 1)]
                self.new_rows += len(set(dynamic) - old)
                self.dynamic_rows += len(dynamic)


@pytest.mark.parametrize("believed", (None, 0.01))
def test_churn_is_measured_from_what_moves(believed: float | None) -> None:
    """Against the share of new rows, counted from the working sets; and the corrected plan moves what was moved."""
    run = Run(believed, policy="churn", refresh=0)
    run.forward(PROMPT)
    run.decode(STEPS - 1)
    report = alisa_compile.report(run).to_dict()
    expected, measured = report["churn"]["expected"], report["churn"]["measured"]
    assert measured == pytest.approx(run.new_rows / run.dynamic_rows, rel=0.2) and measured > 0.1
    corrected = run.plan(measured)
    moved = report["bytes_moved"]["host_to_device"] - run.plan(0.0).bytes_moved["host_to_device"][0]
    assert sum(corrected.bytes_moved["host_to_device"][1:]) == pytest.approx(moved, rel=0.05)
    assert report["predicted_step_ms"] == pytest.approx(sorted(run.plan(None).step_ms[1:])[(STEPS - 1) // 2], rel=0.05)
    if believed is None:  # an even draw, whose churn is known
        assert expected == pytest.approx(measured, rel=0.1)
    else:
        assert expected == believed
        assert report["corrected_step_ms"] > 1.2 * report["predicted_step_ms"]
    assert f"{expected:.2%} expected, {measured:.2%} measured" in str(alisa_compile.report(run))


def test_rows_that_stay_have_no_churn() -> None:
    """Random rows hardly return under swa, and those that do are mostly still on the device."""
    run = Run(0.5, refresh=0)
    run.forward(PROMPT)
    run.decode(STEPS - 1)
    report = alisa_compile.report(run).to_dict()
    assert report["churn"] == {"expected": 0.5, "measured": pytest.approx(0, abs=0.02)}
    assert report["corrected_step_ms"] < report["predicted_step_ms"]


def test_it_needs_enough_steps_of_one_token() -> None:
    run = Run(policy="churn", refresh=0)
    run.forward(PROMPT)
    run.decode(CHURN_STEPS - 1)
    assert alisa_compile.report(run).to_dict()["churn"] == {"expected": None, "measured": None}
    run.decode(1)
    assert alisa_compile.report(run).to_dict()["churn"]["measured"] is not None
    run.forward(3)  # a block of drafts: steps are no longer those of the plan
    run.decode(1)
    report = alisa_compile.report(run).to_dict()
    assert report["churn"]["measured"] is None and report["corrected_step_ms"] is None
    assert report["predicted_step_ms"] is not None


def test_refresh_steps_are_not_taken_for_churn() -> None:
    """Rows that stream through in a refresh are planned apart: the same churn with them as without."""
    measured = []
    for refresh in (0, 8):
        run = Run(policy="churn", refresh=refresh)
        run.forward(PROMPT)
        run.decode(STEPS - 1)
        measured.append(alisa_compile.report(run).to_dict()["churn"]["measured"])
    assert measured[1] == pytest.approx(measured[0], rel=0.25)
