"""`alisa::swa_attention` against naive loops: shapes, dtypes, poisoned rows, permuted slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.harness import Driver, Heads, close, naive_attention, random_block, stored_rows

_SHAPES = [
    (Heads(4, 4, 8), "shared"),
    (Heads(8, 2, 64), "shared"),
    (Heads(8, 2, 16), "per_kv_head"),
    (Heads(6, 1, 40), "shared"),
    (Heads(3, 3, 24), "per_kv_head"),
]
_DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _filled(heads: Heads, length: int, *, seed: int = 0, slack: int = 9, batch: int = 2, **options: Any) -> Driver:
    """A store with `length` random tokens in each sequence, unused rows poisoned, slots shuffled."""
    generator = torch.Generator().manual_seed(seed)
    driver = Driver(heads, capacity=length + slack, batch=batch, **options)
    driver.permute_slots(generator)
    block = random_block(generator, heads, length, batch=batch, dtype=driver.store.shape.dtype)
    driver.append(block, 0)
    driver.store.host_length, driver.store.has_history = length, True
    driver.poison()
    return driver


def _random_sets(driver: Driver, length: int, seed: int) -> list[list[list[int]]]:
    """An ascending working set per sequence and group, of different sizes, the last token always in it."""
    generator = torch.Generator().manual_seed(seed)
    assert driver.store.rows is not None
    width = driver.store.rows.shape[-1]
    sets = []
    for sequence in range(driver.store.shape.batch_size):
        sets.append([])
        for group in range(driver.store.groups):
            size = min(1 + (sequence + group) * 3, length, width)
            others = torch.randperm(length - 1, generator=generator)[: size - 1].tolist()
            sets[sequence].append(sorted([*others, length - 1]))
    return sets


def _query(driver: Driver, seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    store = driver.store
    return random_block(generator, driver.heads, 1, batch=store.shape.batch_size, dtype=store.shape.dtype)


def _check(
    driver: Driver, out: torch.Tensor, mass: torch.Tensor, query: torch.Tensor, sets: list[list[list[int]]]
) -> None:
    """Output and mass of each sequence and head group against the naive loops over the given positions."""
    heads, groups = driver.heads, driver.store.groups
    dtype = driver.store.shape.dtype
    for sequence, chosen in enumerate(sets):
        key, value = stored_rows(driver, 0, sequence)
        for group, positions in enumerate(chosen):
            kv = slice(group * heads.kv // groups, (group + 1) * heads.kv // groups)
            q = slice(group * heads.query // groups, (group + 1) * heads.query // groups)
            expected, weights = naive_attention(query[sequence, q, 0], key[kv], value[kv], positions, heads.scale)
            close(out[sequence, q, 0], expected, dtype)
            close(mass[sequence, group, : len(positions)], weights.sum(0), dtype)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("length", [1, 63, 111])
@pytest.mark.parametrize(("heads", "head_mode"), _SHAPES)
def test_working_set_against_loops(heads: Heads, head_mode: str, length: int, dtype: torch.dtype) -> None:
    """Only counted rows matter: unwritten rows are NaN, and entries past the count name unwritten rows."""
    driver = _filled(heads, length, dtype=dtype, head_mode=head_mode)
    sets = _random_sets(driver, length, seed=1)
    driver.set_working_set(sets, garbage=driver.store.capacity - 1)
    block = _query(driver)
    out, mass = driver.attend(block, 0)
    assert out.dtype == dtype and out.is_contiguous()
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    _check(driver, out, mass, block.query[0], sets)


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize(("heads", "head_mode"), _SHAPES)
def test_int8_rows_are_read_with_their_own_scales(heads: Heads, head_mode: str, length: int) -> None:
    """Each row has its scale, per KV head, for K and V apart; poisoned scales of other rows do not leak."""
    driver = _filled(heads, length, kv_dtype="int8", head_mode=head_mode)
    sets = _random_sets(driver, length, seed=2)
    driver.set_working_set(sets, garbage=driver.store.capacity - 1)
    block = _query(driver)
    out, mass = driver.attend(block, 0)
    _check(driver, out, mass, block.query[0], sets)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("heads", "head_mode"), _SHAPES)
def test_refresh_and_dense_attend_to_every_valid_row(
    heads: Heads, head_mode: str, dense: bool, padded: bool, dtype: torch.dtype
) -> None:
    """Count -1, and a store without selection, cover all valid positions below the length, no others."""
    length = 63
    driver = _filled(heads, length, dtype=dtype, head_mode=head_mode)
    assert driver.store.counts is not None
    driver.store.counts.fill_(-1)
    mask = torch.ones((2, length))
    mask[1, :20] = 0
    mask[0, 30] = 0
    if padded:
        driver.store.valid[:, :length] = mask.bool()
    block = _query(driver)
    out, mass = driver.attend(block, 0, mask if padded else None, dense=dense)
    assert out.is_contiguous()
    every = [[row.nonzero().flatten().tolist()] * driver.store.groups for row in (mask if padded else mask * 0 + 1)]
    if dense:
        assert mass.shape == (2, driver.store.groups, 0)
        spread = torch.zeros((2, driver.store.groups, length))
        _check_output_only(driver, out, block.query[0], every)
    else:
        # Of a refresh step the mass is by position: padding has none.
        spread = mass[..., :length]
        assert bool((spread.transpose(1, 2)[~driver.store.valid[:, :length]] == 0).all())
        packed = torch.zeros_like(mass)
        for sequence, groups in enumerate(every):
            packed[sequence, :, : len(groups[0])] = spread[sequence][:, groups[0]]
        _check(driver, out, packed, block.query[0], every)


def _check_output_only(driver: Driver, out: torch.Tensor, query: torch.Tensor, sets: list[list[list[int]]]) -> None:
    for sequence, chosen in enumerate(sets):
        key, value = stored_rows(driver, 0, sequence)
        expected, _ = naive_attention(query[sequence, :, 0], key, value, chosen[0], driver.heads.scale)
        close(out[sequence, :, 0], expected, driver.store.shape.dtype)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("fault", ["permuted", "poisoned"])
def test_a_run_does_not_depend_on_slots_or_unwritten_rows(fault: str, head_mode: str, kv_dtype: str) -> None:
    """Prompt, steps, a turn and more steps: bit-identical with shuffled slots, or NaN in unwritten rows."""
    results = []
    for changed in (False, True):
        generator = torch.Generator().manual_seed(3)
        heads = Heads(4, 2, 16)
        options: dict[str, Any] = {"sparsity": 0.4, "sinks": 1, "refresh": 5}
        options |= {"kv_dtype": kv_dtype, "head_mode": head_mode}
        driver = Driver(heads, capacity=64, layers=2, batch=2, **options)
        if changed and fault == "permuted":
            driver.permute_slots(torch.Generator().manual_seed(4))
        outputs = []
        for tokens in [11, *[1] * 12, 6, *[1] * 12]:
            if changed and fault == "poisoned":
                driver.poison()
            block = random_block(generator, heads, tokens, layers=2, batch=2, dtype=torch.float32)
            outputs.append(driver.forward(block))
        results.append((outputs, driver.store.rows, driver.store.counts, driver.store.scores))
    for before, after in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(before, after)
    for before, after in zip(results[0][1:], results[1][1:], strict=True):
        assert before is not None and after is not None and torch.equal(before, after)
