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
_H2O: dict[str, Any] = {"policy": "h2o", "sparsity": 0.5}


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
    """A prompt in long chunks gives the output and the choice of the prompt in one block."""
    heads = Heads(4, 2, 16)
    block = random_block(torch.Generator().manual_seed(5), heads, 60, batch=2, dtype=torch.float64)
    options: dict[str, Any] = {
        "capacity": 80,
        "batch": 2,
        "dtype": torch.float64,
        "paper": True,
        "sparsity": 0.5,
    }
    whole, chunked = Driver(heads, **options), Driver(heads, **options)
    expected = whole.forward(block)
    outputs = []
    for start, end in ((0, 7), (7, 24), (24, 43), (43, 60)):
        part = [states[:, :, :, start:end] for states in (block.query, block.key, block.value)]
        outputs.append(chunked.forward(type(block)(*part)))
    close(torch.cat(outputs, 3), expected, torch.float64)
    for sequence in range(2):
        assert whole.working_set(0, sequence) == chunked.working_set(0, sequence)


_SETS = [[0, 3, 4, 9], [2, 9], [0, 1, 2, 5, 7, 8, 9]]  # of the step at position 9, for each sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [2, 5, 16, 17])
@pytest.mark.parametrize(
    ("heads", "options"), [case for case in _CASES if case[1].get("sparsity") != 0] + [(Heads(4, 2, 8), _H2O)]
)
def test_short_blocks_attend_to_the_working_set(
    heads: Heads, options: dict[str, Any], tokens: int, masked: bool, dtype: torch.dtype
) -> None:
    """Up to 16 new tokens see the set chosen for the first of them and each other; 17 see everything.

    Rows that are in no set are NaN, so that reading one would show.
    """
    history, generator = 9, torch.Generator().manual_seed(1)
    driver = Driver(heads, capacity=40, batch=3, dtype=dtype, **options)
    store = driver.store
    driver.permute_slots(generator)
    driver.append(random_block(generator, heads, history, batch=3, dtype=dtype), 0)
    store.host_length, store.has_history = history, True
    driver.poison()
    driver.set_working_set([[positions] * store.groups for positions in _SETS], garbage=35)
    block = random_block(generator, heads, tokens, batch=3, dtype=dtype)
    length = history + tokens
    mask = torch.ones((3, length), dtype=torch.int64)
    if masked:
        mask[2, length - 1] = 0
    driver.append(block, 0, mask if masked else None)
    kept = [stored_rows(driver, 0, sequence) for sequence in range(3)]
    if tokens <= 16:
        for sequence, positions in enumerate(_SETS):
            unused = [position for position in range(history) if position not in positions]
            slots = store.table[0, sequence][:, unused].reshape(-1).long()
            (store.pool if store.scales is None else store.scales)[slots] = float("nan")
    out, mass = driver.attend(block, 0, mask if masked else None)
    if store.is_int8 and dtype == torch.float64:
        dtype = torch.float32
    assert store.selection is not None
    seed_rows = int(store.selection.seed_rows(tokens, 40))
    assert mass.shape == (3, store.groups, seed_rows, 40)
    for sequence, positions in enumerate(_SETS):
        rows = []
        for place in range(tokens):
            here = history + place
            if not mask[sequence, here]:
                continue
            past = list(range(history)) if tokens > 16 else [p for p in positions if p < history]
            attended = past + list(range(history, here + 1))
            query = block.query[0, sequence, :, place]
            expected, weights = naive_attention(query, *kept[sequence], attended, heads.scale)
            close(out[sequence, :, place], expected, dtype)
            row = torch.zeros((store.groups, 40), dtype=torch.float64)
            row[:, attended] = weights.view(store.groups, -1, len(attended)).sum(1)
            rows.append(row)
        if options.get("policy") == "h2o":
            close(mass[sequence, :, 0], torch.stack(rows).sum(0), dtype)
            continue
        assert bool((mass[sequence, :, : max(0, seed_rows - len(rows))] == 0).all())
        for back in range(1, min(seed_rows, len(rows)) + 1):
            close(mass[sequence, :, seed_rows - back], rows[-back], dtype)


def test_a_refresh_makes_a_short_block_dense() -> None:
    """A count of -1 stands for every row, here too."""
    heads, generator = Heads(4, 2, 8), torch.Generator().manual_seed(2)
    driver = Driver(heads, capacity=40, dtype=torch.float64, refresh=2)
    driver.forward(random_block(generator, heads, 9, dtype=torch.float64))
    driver.forward(random_block(generator, heads, 1, dtype=torch.float64))
    assert driver.working_set() is None
    block = random_block(generator, heads, 3, dtype=torch.float64)
    out = driver.forward(block)
    key, value = stored_rows(driver, 0, 0)
    for place in range(3):
        query = block.query[0, 0, :, place]
        close(
            out[0, 0, :, place],
            naive_attention(query, key, value, list(range(11 + place)), heads.scale)[0],
            torch.float64,
        )
