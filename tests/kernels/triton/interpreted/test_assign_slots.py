"""Slots for entering rows on the GPU against the reference: the same table, owners, lists and counts."""

from __future__ import annotations

import pytest
import torch

from alisa_compile.kernels.assign_slots import triton as kernel
from alisa_compile.kernels.assign_slots.reference import assign_slots as reference
from tests.kernels.triton.running import DEVICE

_LAYERS, _LAYER = 2, 1


def _check(quota: int, tokens: int, below: int, wanted: int, *, batch: int = 2, groups: int = 1, reserved: bool = False,
           capacity: int | None = None, seed: int = 0) -> None:  # fmt: skip
    """Lists whose slots hold random rows; all that are not below are among them. wanted: rows of a working set."""
    generator = torch.Generator().manual_seed(seed)
    capacity = tokens + 6 if capacity is None else capacity
    lists = _LAYERS * batch * groups
    regions = torch.randperm(lists, generator=generator).view(_LAYERS, batch, groups)
    table = torch.full((_LAYERS, batch, groups, capacity), -1, dtype=torch.int32)
    owner = torch.full((lists * quota,), -1, dtype=torch.int32)
    width = wanted + 3
    rows = torch.full((_LAYERS, batch, groups, width), capacity - 1, dtype=torch.int32)
    counts = torch.full((_LAYERS, batch, groups), -1, dtype=torch.int32)
    for layer in range(_LAYERS):
        for sequence in range(batch):
            for group in range(groups):
                base = int(regions[layer, sequence, group]) * quota
                recent = list(range(below, tokens + reserved))
                old = torch.randperm(below, generator=generator)[: max(0, quota - len(recent) - seed % 3)].tolist()
                slots = torch.randperm(quota, generator=generator)
                for slot, position in zip(slots.tolist(), [*recent, *old], strict=False):
                    owner[base + slot] = position
                    table[layer, sequence, group, position] = base + slot
                count = min(wanted, tokens + 1) - (sequence + group) % 2
                chosen = torch.randperm(tokens, generator=generator)[: count - 1].sort().values
                rows[layer, sequence, group, : count - 1] = chosen.int()
                rows[layer, sequence, group, count - 1] = tokens  # the coming token itself
                counts[layer, sequence, group] = -1 if (seed + sequence) % 4 == 3 else count
    state = [table, owner, torch.zeros(2, dtype=torch.int64), regions]
    there = [tensor.to(DEVICE, copy=True) for tensor in state]
    for selection in ((rows, counts), (None, None)):
        tail = (_LAYER, tokens, below)
        expected = reference(*state, *selection, *tail)
        moved = [None if tensor is None else tensor.to(DEVICE) for tensor in selection]
        got = kernel.assign_slots(*there, *moved, *tail)
        for ours, theirs in zip((*got, *there), (*expected, *state), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_slots(seed: int) -> None:
    """Room for all, some or none; free slots or not; the coming token with and without a slot, or without room."""
    _check(40, 111, 90, 20, seed=seed)
    _check(40, 111, 90, 38, seed=seed, groups=2)
    _check(33, 63, 50, 45, seed=seed, batch=1)
    _check(30, 63, 40, 25, seed=seed, batch=1, reserved=True)
    _check(30, 63, 33, 40, seed=seed, batch=1, capacity=63)
    _check(1, 5, 5, 3, seed=seed, batch=1)


def test_several_blocks() -> None:
    """Positions and slots that go on from block to block."""
    _check(1100, 2500, 2000, 1090, batch=1, seed=1)
