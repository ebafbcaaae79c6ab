"""Soft-capped scores in every attention op, on every path of the CPU, against naive loops; and as one op."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from alisa_compile.kernels.swa_attention import reference
from alisa_compile.kernels.swa_attention.tiered import swa_attention_tiered
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import (
    Block,
    Driver,
    Heads,
    close,
    naive_attention,
    naive_capped_attention,
    ops,
    random_block,
    stored_rows,
)

HEADS = Heads(6, 2, 24)
CAP = 0.7  # of scores with deviation 1: far from what the same scores give without
_TYPES = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float64, "auto"), (torch.bfloat16, "int8")]


def _driver(dtype: torch.dtype = torch.float32, **options: Any) -> Driver:
    driver = Driver(HEADS, capacity=200, batch=2, dtype=dtype, **options)
    driver.soft_cap = CAP
    return driver


def _filled(length: int, dtype: torch.dtype, **options: Any) -> tuple[Driver, Block]:
    """A store with random tokens in shuffled slots, unwritten rows poisoned, and the block of one token."""
    generator = torch.Generator().manual_seed(0)
    driver = _driver(dtype, **options)
    driver.permute_slots(generator)
    driver.append(random_block(generator, HEADS, length, batch=2, dtype=dtype), 0)
    driver.store.host_length, driver.store.has_history = length, True
    driver.poison()
    return driver, random_block(generator, HEADS, 1, batch=2, dtype=dtype)


def _expected(driver: Driver, query: torch.Tensor, sequence: int, attended: list[int]) -> tuple[Any, Any]:
    """Output `[Hq, D]` and mass of the attended rows by group, in float64."""
    key, value = stored_rows(driver, 0, sequence)
    out, weights = naive_capped_attention(query, key, value, attended, HEADS.scale, CAP)
    return out, weights.view(driver.store.groups, -1, len(attended)).sum(1)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("mode", ["sparse", "refresh", "dense"])
@pytest.mark.parametrize(("dtype", "kv_dtype"), _TYPES)
def test_decode(dtype: torch.dtype, kv_dtype: str, mode: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and mass of a step; without padding where rows are chosen, with padding where all are attended to."""
    if not native:
        monkeypatch.setattr(ops.swa_attention, "default", reference.swa_attention)
    length = 111
    driver, block = _filled(length, dtype, kv_dtype=kv_dtype, head_mode="per_kv_head")
    chosen, mask = list(range(3, length, 5)), None
    if mode == "sparse":
        driver.set_working_set([[chosen] * 2] * 2, garbage=driver.store.capacity - 1)
    else:
        driver.store.attend_to_all()
        mask = torch.ones((2, length))
        mask[1, :30] = 0
        driver.store.valid[:, :length] = mask.bool()
    out, mass = driver.attend(block, 0, mask, dense=mode == "dense")
    for sequence in range(2):
        attended = chosen if mask is None else mask[sequence].nonzero().flatten().tolist()
        expected, received = _expected(driver, block.query[0, sequence, :, 0], sequence, attended)
        close(out[sequence, :, 0], expected, dtype)
        if mode != "dense":
            places = range(len(attended)) if mode == "sparse" else attended
            close(mass[sequence][:, list(places)], received, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{"paper": True}, {"window": 3}, {"policy": "h2o"}, {"sparsity": 0.0}], ids=str)
@pytest.mark.parametrize("history", [0, 9])
def test_blocks(history: int, options: dict[str, Any], masked: bool) -> None:
    """A prompt, and a dense block on a history: every real row, and the mass that its last rows leave."""
    generator, dtype, tokens = torch.Generator().manual_seed(0), torch.float64, 40
    driver = _driver(dtype, **options)
    if history:
        driver.append(random_block(generator, HEADS, history, batch=2, dtype=dtype), 0)
        driver.store.host_length, driver.store.has_history = history, True
    block = random_block(generator, HEADS, tokens, batch=2, dtype=dtype)
    mask = torch.ones((2, history + tokens), dtype=torch.int64)
    mask[1, : history + 3] = 0
    given = mask if masked else None
    driver.append(block, 0, given)
    out, mass = driver.attend(block, 0, given)
    assert bool(out.isfinite().all())
    is_sum = options.get("policy") == "h2o"
    for sequence in range(2):
        real = (mask if masked else mask * 0 + 1)[sequence].nonzero().flatten().tolist()
        own = [position for position in real if position >= history]
        total = torch.zeros(history + tokens, dtype=torch.float64)
        for place, position in enumerate(own):
            attended = [past for past in real if past <= position]
            expected, received = _expected(driver, block.query[0, sequence, :, position - history], sequence, attended)
            close(out[sequence, :, position - history], expected, dtype)
            row = torch.zeros(history + tokens, dtype=torch.float64)
            row[attended] = received[0]
            total += row
            index = mass.shape[2] - len(own) + place
            if index >= 0 and not is_sum:
                close(mass[sequence, 0, index, : history + tokens], row, dtype)
        if is_sum:
            close(mass[sequence, 0, 0, : history + tokens], total, dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_a_short_block_on_a_working_set(masked: bool) -> None:
    """It attends to the rows chosen for its first token, and causally to itself."""
    generator, dtype, history, tokens = torch.Generator().manual_seed(0), torch.float64, 30, 4
    driver = _driver(dtype)
    driver.append(random_block(generator, HEADS, history, batch=2, dtype=dtype), 0)
    driver.store.host_length, driver.store.has_history = history, True
    chosen = [2, 3, 11, history]
    driver.set_working_set([[chosen]] * 2, 0)
    block = random_block(generator, HEADS, tokens, batch=2, dtype=dtype)
    mask = torch.ones((2, history + tokens), dtype=torch.int64) if masked else None
    driver.append(block, 0, mask)
    out, _ = driver.attend(block, 0, mask)
    for sequence, token in itertools.product(range(2), range(tokens)):
        attended = [*chosen[:-1], *range(history, history + token + 1)]
        expected, _ = _expected(driver, block.query[0, sequence, :, token], sequence, attended)
        close(out[sequence, :, token], expected, dtype)


@pytest.mark.parametrize("native", [True, False], ids=["native", "Python"])
@pytest.mark.parametrize("policy", [{"refresh": 7}, {"policy": "churn"}, {"sparsity": 0.0}], ids=str)
def test_rows_below_the_device(policy: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt beyond the quota, steps, a long block and a short one: as with everything on the device."""
    if not native:
        monkeypatch.setattr(ops.swa_attention, "tiered", swa_attention_tiered)
    generator = torch.Generator().manual_seed(1)
    sizes = TierSizes(device=30, host=200, disk=0, staging=8)
    ours, theirs = _driver(sizes=sizes, **policy), _driver(**policy)
    for tokens in (60, *[1] * 20, 25, 1, 4, 1):
        block = random_block(generator, HEADS, tokens, batch=2, dtype=torch.float32)
        close(ours.forward(block), theirs.forward(block), torch.float32)
    assert ours.store.counters()[1] > 0


def test_the_prompts_mass_has_a_native_kernel() -> None:
    """All dtypes, with padding: the reference's in float64."""
    generator = torch.Generator().manual_seed(2)
    valid = torch.ones((2, 63), dtype=torch.bool)
    valid[1, :20] = False
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        query, key, _ = random_block(generator, HEADS, 63, batch=2, dtype=dtype).layer(0)
        mass = ops.prefill_mass(query, key, valid, 2, 9, 0, HEADS.scale, CAP)
        expected = ops.prefill_mass(query.double(), key.double(), valid, 2, 9, 0, HEADS.scale, CAP)
        rows = [[position for position in range(63) if valid[b, position]][-9:] for b in range(2)]
        for sequence, group, row in itertools.product(range(2), range(2), range(9)):
            position = rows[sequence][row]
            attended = [past for past in range(position + 1) if valid[sequence, past]]
            heads = slice(3 * group, 3 * group + 3)
            _, weights = naive_capped_attention(
                query[sequence, heads, position], key[sequence, group : group + 1], key[sequence, group : group + 1],
                attended, HEADS.scale, CAP,
            )  # fmt: skip
            close(expected[sequence, group, row, attended], weights.sum(0), torch.float64)
        torch.testing.assert_close(mass.double(), expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_one_op(mask: str) -> None:
    """`alisa::capped_attention` with grouped heads; a row that may attend to nothing is 0, also where K is NaN."""
    query, key, value = random_block(torch.Generator().manual_seed(3), HEADS, 9, batch=2, dtype=torch.float64).layer(0)
    attends = torch.ones((2, 1, 9, 9), dtype=torch.bool).tril() if mask != "none" else torch.ones(2, 1, 9, 9).bool()
    if mask == "bool":
        attends[1, :, :3] = False
    given = {"none": None, "bool": attends, "added": torch.zeros(2, 1, 9, 9).masked_fill(~attends, -math.inf)}[mask]
    out = ops.capped_attention(query, key, value, given, scale=HEADS.scale, soft_cap=CAP)
    for sequence, row in itertools.product(range(2), range(9)):
        attended = attends[sequence, 0, row].nonzero().flatten().tolist()
        expected = torch.zeros((HEADS.query, HEADS.dim), dtype=torch.float64)
        if attended:
            states = (query[sequence, :, row], key[sequence], value[sequence])
            expected, _ = naive_capped_attention(*states, attended, HEADS.scale, CAP)
        close(out[sequence, :, row], expected, torch.float64)


def test_a_large_cap_is_none() -> None:
    """And a small one is not."""
    driver, block = _filled(50, torch.float64)
    driver.store.attend_to_all()
    differences = []
    for driver.soft_cap in (1e6, CAP):
        out, _ = driver.attend(block, 0)
        key, value = stored_rows(driver, 0, 0)
        plain, _ = naive_attention(block.query[0, 0, :, 0], key, value, list(range(50)), HEADS.scale)
        differences.append(float((out[0, :, 0] - plain).abs().max()))
    assert differences[0] < 1e-9 and differences[1] > 1e-2
