"""`alisa::extend_attention` against naive loops: several new tokens over a stored history."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.harness import Driver, Heads, close, naive_attention, random_block, stored_rows

_CASES: list[tuple[Heads, dict[str, Any]]] = [
    (Heads(4, 4, 8), {"paper": True, "sparsity": 0.5}),
    (Heads(8, 2, 64), {"window": 3}),
    (Heads(6, 2, 16), {"window": 3, "head_mode": "per_kv_head"}),
    (Heads(6, 1, 40), {"kv_dtype": "int8"}),
    (Heads(4, 2, 16), {"sparsity": 0}),
]


def _mask(length: int) -> torch.Tensor:
    mask = torch.ones((3, length), dtype=torch.int64)
    mask[1, :4] = 0
    mask[2, length - 3 :] = 0
    mask[2, 1] = 0
    return mask


def _run(
    heads: Heads, options: dict[str, Any], history: int, tokens: int, masked: bool, dtype: torch.dtype
) -> tuple[Driver, torch.Tensor, torch.Tensor, torch.Tensor]:
    """History appended, rows past it poisoned, block attended: driver, query, output and mass."""
    generator = torch.Generator().manual_seed(0)
    driver = Driver(heads, capacity=history + tokens + 5, batch=3, dtype=dtype, **options)
    driver.permute_slots(generator)
    driver.append(random_block(generator, heads, history, batch=3, dtype=dtype), 0)
    driver.store.host_length, driver.store.has_history = history, True
    driver.poison()
    block = random_block(generator, heads, tokens, batch=3, dtype=dtype)
    mask = _mask(history + tokens) if masked else None
    driver.append(block, 0, mask)
    out, mass = driver.attend(block, 0, mask)
    return driver, block.query[0], out, mass


def _seed_rows(driver: Driver, tokens: int) -> int:
    """How many rows the next window may need of this block, by hand."""
    if driver.store.selection is None:
        return 0
    if driver.store.selection.window:
        return min(4 * driver.store.selection.window, tokens)
    return min((driver.store.capacity + 1 + 2) // 4, tokens)  # sparsity 0.5: k = nearest(n / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("history", "tokens"), [(1, 2), (9, 22)])
@pytest.mark.parametrize(("heads", "options"), _CASES)
def test_against_loops(
    heads: Heads, options: dict[str, Any], history: int, tokens: int, masked: bool, dtype: torch.dtype
) -> None:
    """Causal over history and block, without padding; unwritten rows are NaN; mass of the last real rows."""
    driver, query, out, mass = _run(heads, options, history, tokens, masked, dtype)
    if driver.store.is_int8 and dtype == torch.float64:
        dtype = torch.float32  # rows are decoded in float32 whatever the model's dtype
    length, groups, seed_rows = history + tokens, driver.store.groups, _seed_rows(driver, tokens)
    mask = _mask(length) if masked else torch.ones((3, length), dtype=torch.int64)
    assert out.is_contiguous() and bool(out.isfinite().all())
    assert mass.shape == (3, groups, seed_rows, driver.store.capacity)
    assert bool((mass[..., length:] == 0).all())
    for sequence in range(3):
        key, value = stored_rows(driver, 0, sequence)
        real = mask[sequence].nonzero().flatten().tolist()
        own = [position for position in real if position >= history]
        assert bool((mass[sequence, :, : max(0, seed_rows - len(own))] == 0).all())
        for place, position in enumerate(own):
            attended = [past for past in real if past <= position]
            expected, weights = naive_attention(
                query[sequence, :, position - history], key, value, attended, heads.scale
            )
            close(out[sequence, :, position - history], expected, dtype)
            index = seed_rows - len(own) + place
            if index >= 0:
                row = torch.zeros((groups, length), dtype=torch.float64)
                row[:, attended] = weights.view(groups, -1, len(attended)).sum(1)
                close(mass[sequence, :, index, :length], row, dtype)


def test_chunks_equal_one_prefill() -> None:
    """A prompt in chunks gives the output and the choice of the prompt in one block."""
    heads = Heads(4, 2, 16)
    block = random_block(torch.Generator().manual_seed(5), heads, 40, batch=2, dtype=torch.float64)
    options: dict[str, Any] = {
        "capacity": 60,
        "batch": 2,
        "dtype": torch.float64,
        "paper": True,
        "sparsity": 0.5,
    }
    whole, chunked = Driver(heads, **options), Driver(heads, **options)
    expected = whole.forward(block)
    outputs = []
    for start, end in ((0, 7), (7, 9), (9, 31), (31, 40)):
        part = [states[:, :, :, start:end] for states in (block.query, block.key, block.value)]
        outputs.append(chunked.forward(type(block)(*part)))
    close(torch.cat(outputs, 3), expected, torch.float64)
    for sequence in range(2):
        assert whole.working_set(0, sequence) == chunked.working_set(0, sequence)
