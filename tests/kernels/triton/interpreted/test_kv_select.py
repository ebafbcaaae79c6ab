"""Selection on the GPU against the reference: the same scores, bit for bit, and the same working sets."""

from __future__ import annotations

import pytest
import torch

from alisa_compile.config import AlisaConfig
from alisa_compile.kernels.kv_select import triton as kernel
from alisa_compile.kernels.kv_select.reference import kv_select as reference
from alisa_compile.kernels.selection import SelectionSpec
from alisa_compile.runtime.policies import selection_spec
from tests.kernels.triton.running import DEVICE

_LAYERS, _LAYER = 2, 1


def _spec(**options: object) -> SelectionSpec:
    spec = selection_spec(AlisaConfig.from_options({"max_rows": None, **options}))
    assert spec is not None
    return spec


POLICIES = {
    "decay": _spec(window=4, refresh=0),
    "refresh": _spec(window=4, refresh=8),
    "capped": _spec(window=4, refresh=0, max_rows=12),
    "half": _spec(window=4, refresh=0, sparsity=0.37, local_fraction=0.7),
    "no sinks": _spec(window=4, refresh=0, sinks=0),
    "local": _spec(policy="local"),
    "strided": _spec(policy="strided"),
    "h2o": _spec(policy="h2o"),
    "churn": _spec(policy="churn"),
}


def _check(spec: SelectionSpec, tokens: int, *, batch: int = 2, groups: int = 2, padded: bool = False, cap: int = 0,
           dense: bool = False, ties: bool = False, origin: int = 3, seed: int = 0) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    capacity = tokens + 5
    width = spec.rows_capacity(capacity + 1)
    lists = (_LAYERS, batch, groups)
    scores = torch.rand((*lists, 1, capacity), generator=generator)
    if ties:
        scores = (scores * 3).round()
    if spec.rank == "sum":
        scores[..., 0, : tokens // 3] = float("-inf")
    scores[..., tokens:] = 0
    rows = torch.full((*lists, width), capacity - 1, dtype=torch.int32)
    counts = torch.full(lists, -1, dtype=torch.int32)
    mass = torch.full((batch, groups, capacity), float("nan"))
    mass[..., :tokens] = torch.rand((batch, groups, tokens), generator=generator)
    if ties:
        mass = mass.round()
    if not dense:
        for sequence in range(batch):
            for group in range(groups):
                count = min(width, max(1, tokens // 4 + sequence + group), tokens)
                chosen = torch.randperm(tokens, generator=generator)[:count].sort().values
                rows[_LAYER, sequence, group, :count] = chosen.int()
                counts[_LAYER, sequence, group] = count
                mass[sequence, group, count:] = float("nan")
    valid = None
    if padded:
        valid = torch.rand((batch, capacity), generator=generator) > 0.3
        valid[0, tokens - 1], valid[-1, tokens - 1] = True, tokens % 2 == 0
    given = (
        scores,
        rows,
        counts,
        mass,
        torch.tensor([tokens + 2, tokens]),
        torch.tensor([min(origin, tokens), cap]),
        valid,
    )
    there = [None if tensor is None else tensor.to(DEVICE, copy=True) for tensor in given]
    reference(*given, _LAYER, spec.encode())
    kernel.kv_select(*there, _LAYER, spec.encode())
    assert torch.equal(there[0].cpu(), scores)
    assert torch.equal(there[2].cpu(), counts)
    assert torch.equal(there[1].cpu(), rows)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_rows(policy: str) -> None:
    """Odd lengths, padded and not, after a sparse and a dense step, random scores and many equal ones."""
    spec = POLICIES[policy]
    for tokens in (1, 5, 111):
        _check(spec, tokens, seed=tokens)
    _check(spec, 64, padded=True)
    _check(spec, 63, dense=True, ties=True, groups=1)
    _check(spec, 90, ties=True, padded=True, cap=25, batch=1, groups=1)


def test_the_first_token_counts_as_a_dense_block() -> None:
    """From which refreshes are counted anew."""
    _check(_spec(window=4, refresh=2), 1, origin=0)


def test_scores_fade_where_the_exponent_returns_to_zero() -> None:
    """Every 16 windows all scores of the layer are scaled, and no others."""
    for tokens in (63, 64):
        _check(POLICIES["decay"], tokens)


def test_several_blocks_of_positions() -> None:
    """Ties, ranks and places are carried from block to block."""
    _check(POLICIES["decay"], 2500, ties=True, batch=1, groups=1)
    _check(POLICIES["churn"], 2049, padded=True, batch=1, groups=1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_rows_at_many_lengths(policy: str) -> None:
    """Every length from 1 to 130, and some longer."""
    for tokens in (*range(1, 131), 1000, 1023, 1024, 1025, 3000):
        _check(POLICIES[policy], tokens, padded=tokens % 2 == 0, ties=tokens % 3 == 0, seed=tokens, batch=1, groups=1)
