"""The report: what the store counted, in numbers for scripts, in 79 columns, and as a table of a notebook."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

import alisa_compile
from alisa_compile.runtime.budgets import format_bytes
from alisa_compile.runtime.report import COUNTERS, CompileRow, Report, SkipRow
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, random_block

HEADS = Heads()
SIZES = TierSizes(device=40, host=20, disk=200, staging=16)
ROW = 2 * 2 * 16 * 4  # K and V, two heads of 16 float32


class Held:
    """What `report` asks of a cache."""

    def __init__(self, *drivers: Driver) -> None:
        self.drivers, self.stores = drivers, [driver.store for driver in drivers]
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, *tokens: int) -> None:
        for count in tokens:
            for driver in self.drivers:
                batch = driver.store.shape.batch_size
                block = random_block(self.generator, HEADS, count, layers=2, batch=batch, dtype=torch.float32)
                driver.forward(block)

    @property
    def report(self) -> Report:
        return alisa_compile.report(self)


def held(sizes: TierSizes | None = SIZES, *, stores: int = 1, batch: int = 1, **options: Any) -> Held:
    common: dict[str, Any] = {"capacity": 100, "layers": 2, "batch": batch, "dtype": torch.float32, "sparsity": 0.0}
    return Held(*(Driver(HEADS, sizes=sizes, **{**common, **options}) for _ in range(stores)))


def test_dense_steps_by_hand() -> None:
    """40 slots: at 40 tokens one row goes below, and each dense step streams those that have no slot."""
    cache = held()
    cache.forward(38, *[1] * 25)
    report = cache.report.to_dict()
    assert report["phases"] == [
        {"phase": "I", "first_step": 0, "last_step": 1},
        {"phase": "II", "first_step": 2, "last_step": 25},
    ]
    layers = 2
    below = 63 + 1 - 40
    streamed = sum(range(63 - 40 + 1))
    assert report["bytes_moved"] == {
        "device_to_host": layers * ROW * below,
        "host_to_device": layers * ROW * streamed,
        "disk_write": layers * ROW * (below - 20),
        "disk_read": layers * ROW * sum(range(1, below - 20)),
    }
    assert report["misses"] == report["rows_recomputed"] == 0
    assert report["bytes_per_row"] == dict.fromkeys(("device", "host", "disk"), ROW)
    assert report["peak_bytes"] == cache.stores[0].bytes_by_tier()
    assert report["budget_bytes"] == dict.fromkeys(("device", "host", "disk"))
    assert report["disk_stall_ms"] <= report["stall_ms"]
    assert report["predicted_step_ms"] is None and report["effective_sparsity"] == 0


def test_stores_add_up() -> None:
    """Models with two K/V shapes have two stores; batch and all count."""
    one, two = held(batch=2), held(batch=2, stores=2)
    for cache in (one, two):
        cache.forward(60, *[1] * 5)
    single, double = (cache.report.to_dict() for cache in (one, two))
    for key in ("bytes_moved", "peak_bytes"):
        assert double[key] == {name: 2 * count for name, count in single[key].items()} and sum(double[key].values())
    assert double["phases"] == single["phases"] == [{"phase": "II", "first_step": 0, "last_step": 5}]


def test_everything_on_the_device() -> None:
    cache = held(None)
    cache.forward(50, 1, 1)
    report = cache.report
    numbers = report.to_dict()
    assert numbers["phases"] == [{"phase": "I", "first_step": 0, "last_step": 2}]
    assert not any(numbers["bytes_moved"].values()) and numbers["stall_ms"] == numbers["disk_stall_ms"] == 0
    assert numbers["peak_bytes"] == {"device": cache.stores[0].nbytes, "host": 0, "disk": 0}
    assert numbers["bytes_per_row"] == {"device": ROW}
    assert "bytes moved           0" in str(report) and "peak bytes, host" not in str(report)


def test_a_new_call_counts_from_nothing() -> None:
    cache = held()
    cache.forward(60, *[1] * 5)
    first = cache.report.to_dict()["bytes_moved"]
    assert cache.report.to_dict()["bytes_moved"] == first
    store = cache.stores[0]
    store.statistics.budget_bytes = {"device": 1 << 20, "host": 1 << 20, "disk": 0}
    store.reset()
    store.statistics.restart()
    cache.forward(60, *[1] * 5)
    assert cache.report.to_dict()["bytes_moved"] == first
    assert cache.report.to_dict()["budget_bytes"] == {"device": 1 << 20, "host": 1 << 20, "disk": 0}
    store.reset()
    store.statistics.restart()
    cache.forward(10)
    assert not any(cache.report.to_dict()["bytes_moved"].values())


@pytest.mark.parametrize("change", ["grow", "smaller batch"])
def test_counts_survive_a_change_of_storage(change: str) -> None:
    """What the old tiers moved stays in the report, and what copying to the new ones moves comes on top."""
    cache = held(batch=2)
    cache.forward(60, *[1] * 5)
    before = cache.report.to_dict()["bytes_moved"]
    store = cache.stores[0]
    if change == "grow":
        store.reserve(150)
    else:
        store.select_sequences([1])
    after = cache.report.to_dict()["bytes_moved"]
    assert all(after[name] >= count for name, count in before.items())
    cache.forward(1)
    later = cache.report.to_dict()["bytes_moved"]
    assert later["device_to_host"] == after["device_to_host"] + 2 * store.shape.batch_size * ROW


def test_phase_one_returns_with_room() -> None:
    """A cache that is emptied has nothing below; one that forgot its last rows still has the others there."""
    cache = held()
    cache.forward(38, 1, 1, 1)
    cache.stores[0].crop(20)
    cache.forward(1)
    cache.stores[0].reset()
    cache.forward(20)
    assert [phase["phase"] for phase in cache.report.to_dict()["phases"]] == ["I", "II", "I"]


def test_predicted_step_times_stand_beside_the_measured() -> None:
    cache = held()
    planned = types.SimpleNamespace(step_ms=(100.0, 3.0, 1.0, 2.0))
    cache.stores[0].statistics.forecast = types.SimpleNamespace(plan=planned)
    cache.forward(50, 1, 1)
    assert cache.report.to_dict()["predicted_step_ms"] == 2.0
    assert "step time, predicted" in str(cache.report) and "2.00 ms" in str(cache.report)
    cache.stores[0].statistics.restart()
    cache.forward(1)
    assert cache.report.to_dict()["predicted_step_ms"] is None


def test_text_fits_a_terminal_and_a_notebook() -> None:
    """Everything at once, with the longest numbers that there could be."""
    tiers = ("device", "host", "disk")
    skips = tuple(SkipRow(f"layer {n}", n, "sliding-window attention is already bounded & <small>") for n in range(3))
    report = Report(
        steps=123_456,
        tokens=131_072,
        batch_size=64,
        capacity=131_072,
        sparsity=0.8,
        sparsity_by_step=(0.5, 0.7),
        phase_by_step=("I", "II", "II"),
        peak_bytes=dict.fromkeys(tiers, 999 * 2**30 + 12345),
        budget_bytes=dict.fromkeys(tiers, 12345 * 2**30),
        bytes_per_row=dict.fromkeys(tiers, 65536),
        moved=dict.fromkeys(COUNTERS, 987_654_321_000),
        graphs=tuple(CompileRow(stage, 80, skips, 123.4) for stage in ("prefill", "decode", "extend")),
        decode_ms=(1234.5678, 99999.9),
        prefill_ms=(5.0,),
        predicted_ms=(1.0, 2.0),
    )
    text, html = str(report), report._repr_html_()
    assert max(map(len, text.splitlines())) <= 79
    for part in (
        "phase II", "steps 1 to 2", format_bytes(999 * 2**30 + 12345), "disk read", "987654321000: no slot",
        "layer 2:", "of it for the disk",
    ):  # fmt: skip
        assert part in " ".join(text.split()), part
    assert html.startswith("<table>") and "peak bytes, host" in html and "&lt;small&gt;" in html
    assert max(map(len, str(Report.without_cache(skips)).splitlines())) <= 79
    assert set(dataclasses.asdict(report)) >= {"moved", "phase_by_step"}
