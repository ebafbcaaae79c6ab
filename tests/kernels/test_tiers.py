"""Ops over a store whose rows do not all fit the device, against the same ops with everything on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, close, random_block

HEADS = Heads()
POLICIES: dict[str, dict[str, Any]] = {
    "swa": {"refresh": 8},
    "dense": {"sparsity": 0.0},
    "local": {"policy": "local"},
    "strided": {"policy": "strided"},
    "h2o": {"policy": "h2o"},
    "churn": {"policy": "churn"},
    "paper": {"paper": True},
    "per head": {"refresh": 8, "head_mode": "per_kv_head"},
    "int8": {"refresh": 8, "kv_dtype": "int8"},
}
SIZES = {
    "host": TierSizes(device=40, host=200, disk=0, staging=16),
    "disk": TierSizes(device=40, host=24, disk=200, staging=16),
    "no host": TierSizes(device=40, host=0, disk=200, staging=16),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tiers", SIZES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_the_same_outputs_as_with_everything_on_the_device(policy: str, tiers: str, padded: bool) -> None:
    """A prompt beyond the quota, a phase change or none, long and short blocks, many steps: float64, near equality."""
    generator = torch.Generator().manual_seed(5)
    common = {"capacity": 200, "layers": 2, "batch": 2, "dtype": torch.float64, **POLICIES[policy]}
    ours, theirs = Driver(HEADS, sizes=SIZES[tiers], **common), Driver(HEADS, **common)
    mask = torch.ones((2, 200), dtype=torch.int64)
    if padded:
        mask[1, :7] = 0
        mask[0, 50:55] = 0  # inside the prompt, as right padding leaves it
    stored = 0
    for tokens in (30, 1, 1, 25, *[1] * 40, 5, *[1] * 10, 20, *[1] * 50):
        block = random_block(generator, HEADS, tokens, layers=2, batch=2, dtype=torch.float64)
        stored += tokens
        known = mask[:, :stored] if padded else None
        got, expected = ours.forward(block, known), theirs.forward(block, known)
        real = mask[:, stored - tokens : stored].bool()[None, :, None, :, None].expand_as(got)
        # int8 rows are scaled in float32 by the references and in float64 by the kernels.
        close(got[real], expected[real], torch.float32 if policy == "int8" else torch.float64)
        if ours.store.counts is not None:
            assert torch.equal(ours.store.counts, theirs.store.counts)
        _check(ours)
    assert ours.store.tiers is not None
    assert int(ours.store.tiers.traffic[1]) > 0 or policy in ("local",)


def _check(driver: Driver) -> None:
    """Slots have one owner, nothing is lost, and the coming working set is on the device."""
    store, tiers = driver.store, driver.store.tiers
    assert tiers is not None
    used = store.table[store.table >= 0]
    assert len(used.unique()) == len(used)
    stored = store.host_length
    for layer in range(store.shape.num_layers):
        resident = store.table[layer, :, :, :stored] >= 0
        assert bool(resident[..., int(tiers.below[layer]) :].all()), "a row is nowhere"
        assert bool((store.table[layer, :, :, stored] >= 0).all()), "no slot for the coming token"
        owner = tiers.owner.view(store.shape.num_layers, -1)[layer]
        assert int((owner >= 0).sum()) == int((store.table[layer] >= 0).sum())
        if store.counts is not None and store.rows is not None and int(store.counts[layer].min()) >= 0:
            missing = 0
            for sequence in range(store.shape.batch_size):
                for group in range(store.groups):
                    chosen = driver.working_set(layer, sequence, group)
                    missing += int((store.table[layer, sequence, group, chosen] < 0).sum())
            assert missing == int(tiers.misses[layer])
