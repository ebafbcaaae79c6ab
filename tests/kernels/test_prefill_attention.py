"""`alisa::prefill_attention` against naive loops and torch's attention: output, seeding rows, padding."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from alisa_compile.kernels.selection import SelectionSpec
from tests.kernels.harness import Heads, close, naive_attention, ops, random_block

_PAPER = SelectionSpec(Fraction(1, 4), Fraction(1, 4), "ring").encode()
_DECAYED = SelectionSpec(Fraction(1, 10), Fraction(1, 10), window=3, sinks=4, refresh=32).encode()
_HEADS = [Heads(4, 4, 8), Heads(8, 2, 64), Heads(6, 1, 40)]


def _masks(length: int) -> torch.Tensor:
    """Five sequences: whole, left padded, right padded, with holes, and with one real token."""
    mask = torch.ones((5, length), dtype=torch.int64)
    mask[1, : length // 3] = 0
    mask[2, length - length // 3 :] = 0
    mask[3, 1 : length - 1 : 3] = 0
    mask[4, : length - 1] = 0
    return mask


def _expected_rows(length: int, spec: str, mask_row: torch.Tensor, seed_rows: int) -> list[int | None]:
    """Positions of the last `seed_rows` real queries, oldest first; None stands for no query."""
    real = mask_row.nonzero().flatten().tolist()[-seed_rows:] if seed_rows else []
    return [None] * (seed_rows - len(real)) + real


def _check_mass(
    mass: torch.Tensor, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, spec: str, heads: Heads
) -> None:
    groups, seed_rows, length = mass.shape[1], mass.shape[2], key.shape[2]
    for sequence in range(mask.shape[0]):
        real = mask[sequence].nonzero().flatten().tolist()
        for index, position in enumerate(_expected_rows(length, spec, mask[sequence], seed_rows)):
            expected = torch.zeros((groups, length), dtype=torch.float64)
            if position is not None:
                attended = [past for past in real if past <= position]
                _, weights = naive_attention(
                    query[sequence, :, position], key[sequence], key[sequence], attended, heads.scale
                )
                expected[:, attended] = weights.view(groups, -1, len(attended)).sum(1)
            close(mass[sequence, :, index], expected, query.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1, 63, 111])
@pytest.mark.parametrize("heads", _HEADS)
def test_without_padding_equals_torch(heads: Heads, length: int, dtype: torch.dtype) -> None:
    """Output is torch's causal attention, contiguous as the shape function says; no spec, no mass."""
    block = random_block(torch.Generator().manual_seed(0), heads, length, batch=2, dtype=dtype)
    query, key, value = block.layer(0)
    out, mass = ops.prefill_attention(query, key, value, None, 1, "", heads.scale)
    ratio = heads.query // heads.kv
    expected = F.scaled_dot_product_attention(
        query.double(),
        key.double().repeat_interleave(ratio, 1),
        value.double().repeat_interleave(ratio, 1),
        is_causal=True,
    )
    close(out, expected, dtype)
    assert out.is_contiguous() and out.dtype == dtype
    assert mass.shape == (2, 1, 0, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [3, 63])
@pytest.mark.parametrize("heads", _HEADS)
def test_padding_is_attended_by_no_real_token(heads: Heads, length: int, dtype: torch.dtype) -> None:
    """Real rows equal the naive loops over real tokens; padding rows are finite whatever they hold."""
    block = random_block(torch.Generator().manual_seed(1), heads, length, batch=5, dtype=dtype)
    query, key, value = block.layer(0)
    mask = _masks(length)
    out, _ = ops.prefill_attention(query, key, value, mask, 1, _PAPER, heads.scale)
    assert bool(out.isfinite().all())
    for sequence in range(5):
        real = mask[sequence].nonzero().flatten().tolist()
        for position in real:
            attended = [past for past in real if past <= position]
            expected, _ = naive_attention(
                query[sequence, :, position], key[sequence], value[sequence], attended, heads.scale
            )
            close(out[sequence, :, position], expected, dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", ["one", "per KV head"])
@pytest.mark.parametrize("spec", [_PAPER, _DECAYED])
@pytest.mark.parametrize("heads", _HEADS)
@pytest.mark.parametrize("length", [1, 30])
def test_mass_is_that_of_the_last_real_rows(heads: Heads, length: int, spec: str, groups: str, masked: bool) -> None:
    """Rows that seed: the last of each sequence, oldest first, head-summed by group, else zeros."""
    block = random_block(torch.Generator().manual_seed(2), heads, length, batch=5, dtype=torch.float32)
    query, key, value = block.layer(0)
    mask = _masks(length) if masked else torch.ones((5, length))
    count = 1 if groups == "one" else heads.kv
    _, mass = ops.prefill_attention(query, key, value, mask if masked else None, count, spec, heads.scale)
    rows = min(12, length) if spec == _DECAYED else max(1, (length + 3) // 4)
    assert mass.shape == (5, count, rows, length) and mass.dtype == torch.float32
    _check_mass(mass, query, key, mask, spec, heads)


def test_long_prompts_are_computed_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of query rows, cut at odd places, change neither output nor mass."""
    from alisa_compile.kernels.prefill_attention import reference

    heads = Heads(4, 2, 8)
    query, key, value = random_block(torch.Generator().manual_seed(3), heads, 50, batch=5, dtype=torch.float64).layer(0)
    whole = reference.prefill_attention(query, key, value, _masks(50), 1, _PAPER, heads.scale)
    monkeypatch.setattr(reference, "_MASK_ELEMENTS", 5 * 50 * 7)
    monkeypatch.setattr(reference, "_MASS_ELEMENTS", 5 * 50 * 7)
    blocks = reference.prefill_attention(query, key, value, _masks(50), 1, _PAPER, heads.scale)
    close(blocks[0], whole[0], torch.float64)
    close(blocks[1], whole[1], torch.float64)
