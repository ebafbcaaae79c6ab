"""`alisa::kv_append`: rows land in the slots the table names, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.harness import Driver, Heads, random_block, stored_rows

_HEADS = Heads(8, 4, 24)


def _driver(**options: Any) -> Driver:
    driver = Driver(_HEADS, capacity=12, layers=2, batch=3, **options)
    driver.permute_slots(torch.Generator().manual_seed(9))
    return driver


@pytest.mark.parametrize("head_mode", ["shared", "per_kv_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_read_back_as_written(dtype: torch.dtype, head_mode: str) -> None:
    """Exact, in order, layer by layer, for blocks and single tokens, with model-like (transposed) inputs."""
    driver = _driver(dtype=dtype, head_mode=head_mode)
    generator = torch.Generator().manual_seed(0)
    blocks = [random_block(generator, _HEADS, tokens, layers=2, batch=3, dtype=dtype) for tokens in (5, 1, 1, 3)]
    for block in blocks:
        for layer in range(2):
            driver.append(block, layer)
    assert driver.store.length.tolist() == [10, 10]
    for layer in range(2):
        for sequence in range(3):
            key, value = stored_rows(driver, layer, sequence)
            assert torch.equal(key, torch.cat([b.key[layer, sequence] for b in blocks], 1).double())
            assert torch.equal(value, torch.cat([b.value[layer, sequence] for b in blocks], 1).double())


def test_int8_rows_keep_codes_and_scales_per_head() -> None:
    """Codes times their own scale are within half a scale of K and V."""
    driver = _driver(kv_dtype="int8", head_mode="per_kv_head")
    block = random_block(torch.Generator().manual_seed(1), _HEADS, 4, layers=2, batch=3, dtype=torch.float32)
    driver.append(block, 1)
    for sequence in range(3):
        for got, states in zip(stored_rows(driver, 1, sequence), (block.key, block.value), strict=True):
            expected = states[1, sequence].double()
            bound = expected.abs().amax(-1, keepdim=True) / 127 / 2
            assert bool(((got - expected).abs() <= bound * (1 + 1e-4)).all())


def test_nothing_else_is_touched() -> None:
    """Other layers' slots and lengths, slots of later positions and validity keep their values."""
    driver = _driver()
    store = driver.store
    store.pool.fill_(7.0)
    block = random_block(torch.Generator().manual_seed(2), _HEADS, 4, layers=2, batch=3, dtype=torch.float32)
    driver.append(block, 1)
    written = set(store.table[1, :, :, :4].flatten().tolist())
    untouched = [slot for slot in range(store.pool.shape[0]) if slot not in written]
    assert bool((store.pool[untouched] == 7.0).all())
    assert store.length.tolist() == [0, 4]
    assert bool(store.valid.all())


def test_padding_mask_of_a_block_restates_history() -> None:
    """A block's mask covers all positions so far; later positions stay valid."""
    driver = _driver()
    generator = torch.Generator().manual_seed(3)
    first = random_block(generator, _HEADS, 3, layers=2, batch=3, dtype=torch.float32)
    second = random_block(generator, _HEADS, 2, layers=2, batch=3, dtype=torch.float32)
    driver.append(first, 0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 0, 1, 1]])
    driver.append(second, 0, mask)
    assert torch.equal(driver.store.valid[:, :5], mask.bool())
    assert bool(driver.store.valid[:, 5:].all())


def test_padding_mask_of_one_token_restates_history_too() -> None:
    """A decode step with a mask that leaves out other history than before is masked as asked."""
    driver = _driver()
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    driver.append(random_block(generator, _HEADS, 3, layers=2, batch=3, dtype=torch.float32), 0, mask)
    step = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    driver.append(random_block(generator, _HEADS, 1, layers=2, batch=3, dtype=torch.float32), 0, step)
    assert torch.equal(driver.store.valid[:, :4], step.bool())
