"""Bytes that the copy primitives count are those that the tables say must have moved, kind by kind, step by step.

What must have moved is worked out here by hand from where each row was before and after a step, with loops over plain
numbers, and from nothing that the code under test says about it.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch

from alisa_compile import kernels
from alisa_compile.kernels.tiers import drain
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, random_block

HEADS = Heads()
LAYERS, BATCH, PROMPT, STEPS = 2, 2, 20, 200
LENGTH = PROMPT + STEPS
KINDS = ("device_to_host", "host_to_device", "disk_write", "disk_read")
POLICIES: dict[str, dict[str, Any]] = {
    "swa": {"refresh": 16, "sparsity": 0.7},
    "churn": {"policy": "churn", "sparsity": 0.7},
    "dense": {"sparsity": 0.0},
    "per head": {"refresh": 16, "sparsity": 0.7, "head_mode": "per_kv_head"},
    "int8": {"refresh": 16, "sparsity": 0.7, "kv_dtype": "int8"},
}
SIZES = {
    "host": TierSizes(device=80, host=LENGTH, disk=0, staging=32),
    "disk": TierSizes(device=80, host=30, disk=LENGTH, staging=32),
    "no host": TierSizes(device=80, host=0, disk=LENGTH, staging=32),
}


class PlainTorch(Driver):
    """Moves rows by the references, also where native kernels serve."""

    def move(self, layer: int) -> None:
        store = self.store
        rows = (store.pool, store.scales, store.table, store.length)
        kernels.kv_offload.reference.kv_offload(*rows, store.ticket, layer, store.spec)
        kernels.kv_prefetch.reference.kv_prefetch(*rows, store.rows, store.counts, store.ticket, layer)


@dataclasses.dataclass
class Snapshot:
    """Where every row is, and what the coming step attends to; all copies."""

    tokens: int
    slots: list[Any]  # [L][B][G][C]
    below: list[int]
    on_disk: list[int]
    working_sets: list[Any] | None  # [L][B][G], positions or None = all
    counted: list[int]

    @classmethod
    def of(cls, driver: Driver) -> Snapshot:
        """Between steps, once all transfers have ended."""
        store, tiers = driver.store, driver.store.tiers
        assert tiers is not None
        drain(tiers)
        sets = None
        if store.counts is not None:
            groups = range(store.groups)
            sets = [
                [[driver.working_set(layer, row, group) for group in groups] for row in range(BATCH)]
                for layer in range(LAYERS)
            ]
        return cls(
            store.host_length, store.table.tolist(), tiers.below.tolist(), tiers.on_disk.tolist(),
            sets, tiers.traffic[:4].tolist(),
        )  # fmt: skip

    def is_dense(self, layer: int) -> bool:
        """Whether the coming step attends to everything in this layer."""
        sets = self.working_sets
        return sets is None or any(chosen is None for row in sets[layer] for chosen in row)


def _row_bytes(driver: Driver) -> int:
    """K and V of one token and group, with one float32 scale for each head if they are int8."""
    heads = HEADS.kv // driver.store.groups
    values = 2 * heads * HEADS.dim
    return values + 2 * heads * 4 if driver.store.is_int8 else values * 4


def _moved(before: Snapshot, after: Snapshot, row_bytes: int) -> collections.Counter[str]:
    """Bytes of each kind that a step must have moved, `missed` and `streamed` as parts of `host_to_device`."""
    moved: collections.Counter[str] = collections.Counter()

    def up(kind: str, layer: int, position: int, on_disk: int) -> None:
        assert position < after.below[layer], "a row that was fetched is below"
        moved["host_to_device"] += row_bytes
        moved[kind] += row_bytes
        if position < on_disk:
            moved["disk_read"] += row_bytes

    for layer in range(LAYERS):
        for sequence in range(BATCH):
            for group, old in enumerate(before.slots[layer][sequence]):
                new = after.slots[layer][sequence][group]
                moved["device_to_host"] += row_bytes * (after.below[layer] - before.below[layer])
                moved["disk_write"] += row_bytes * (after.on_disk[layer] - before.on_disk[layer])
                # While the layer attends: rows that are not on the device pass through it.
                if before.is_dense(layer):
                    attended, kind = range(before.tokens if before.below[layer] else 0), "streamed"
                else:
                    assert before.working_sets is not None
                    attended, kind = before.working_sets[layer][sequence][group], "missed"
                for position in attended:
                    if old[position] < 0:
                        up(kind, layer, position, before.on_disk[layer])
                # After it has attended and its old rows have gone down: rows enter for the next step.
                for position in range(after.below[layer]):
                    if old[position] < 0 <= new[position]:
                        up("entered", layer, position, after.on_disk[layer])
    return moved


def _kind_of(before: Snapshot, after: Snapshot) -> str:
    if not any(before.below):
        return "phase change" if any(after.below) else "phase I"
    return "refresh" if any(before.is_dense(layer) for layer in range(LAYERS)) else "steady"


def _run(driver: Driver, steps: int) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Check each step of a generation; the kinds of steps there were, and what they moved by cause."""
    generator = torch.Generator().manual_seed(5)
    row_bytes = _row_bytes(driver)
    kinds: collections.Counter[str] = collections.Counter()
    causes: collections.Counter[str] = collections.Counter()
    before = Snapshot.of(driver)
    for step in range(steps + 1):
        tokens = PROMPT if step == 0 else 1
        driver.forward(random_block(generator, HEADS, tokens, layers=LAYERS, batch=BATCH, dtype=torch.float32))
        after = Snapshot.of(driver)
        moved = _moved(before, after, row_bytes)
        expected = [moved[kind] for kind in KINDS]
        counted = [new - old for new, old in zip(after.counted, before.counted, strict=True)]
        kind = _kind_of(before, after)
        # Each kind of step has a claim of its own beside the equality.
        if kind == "phase I":
            assert expected == counted == [0, 0, 0, 0], f"step {step} moved {counted} though everything fits"
        elif kind == "phase change":
            assert counted == expected and counted[0] > 0, f"step {step}, phase change: {counted}, not {expected}"
        elif kind == "refresh":
            assert counted == expected and moved["streamed"] > 0, f"step {step}, refresh: {counted}, not {expected}"
        else:
            assert counted == expected and moved["streamed"] == 0, f"step {step}, steady: {counted}, not {expected}"
        kinds[kind] += 1
        causes += moved
        before = after
    return kinds, causes


@pytest.mark.parametrize("moves", [Driver, PlainTorch])
@pytest.mark.parametrize("below", SIZES)
@pytest.mark.parametrize("policy", POLICIES)
def test_counted_bytes_are_those_of_the_tables(policy: str, below: str, moves: type[Driver]) -> None:
    """200 steps from phase I into phase II; phase changes, refreshes and steady steps apart."""
    driver = moves(
        HEADS, capacity=LENGTH + 2, layers=LAYERS, batch=BATCH, sizes=SIZES[below], **POLICIES[policy]
    )  # fmt: skip
    kinds, causes = _run(driver, STEPS)
    assert kinds["phase I"] > 20 and kinds["phase change"] == 1
    assert kinds["refresh"] > 3 or policy == "churn"
    assert kinds["steady"] > 100 or policy == "dense"
    assert causes["entered"] > 0 or policy == "dense"
    assert (causes["disk_write"] > 0) == (causes["disk_read"] > 0) == (below != "host")


@pytest.mark.parametrize("moves", [Driver, PlainTorch])
@pytest.mark.parametrize("below", ["host", "disk"])
def test_missed_rows_are_counted(below: str, moves: type[Driver]) -> None:
    """With fewer slots than the working set has rows, those left out are fetched where they are attended to."""
    sizes = dataclasses.replace(SIZES[below], device=9)
    driver = moves(HEADS, capacity=90, layers=LAYERS, batch=BATCH, sizes=sizes, refresh=16)
    kinds, causes = _run(driver, 60)
    assert kinds["steady"] > 20 and kinds["refresh"] > 0
    assert causes["missed"] > 0 and causes["entered"] > 0


def test_a_byte_too_many_would_be_seen() -> None:
    """The comparison fails if the primitive counts a row that no table shows."""

    class Liar(Driver):
        def move(self, layer: int) -> None:
            super().move(layer)
            tiers = self.store.tiers
            assert tiers is not None
            if self.store.host_length == 120:
                drain(tiers)
                tiers.traffic[1] += 1

    driver = Liar(HEADS, capacity=LENGTH + 2, layers=LAYERS, batch=BATCH, sizes=SIZES["host"], refresh=16)
    with pytest.raises(AssertionError, match=r"steady|refresh"):
        _run(driver, STEPS)
