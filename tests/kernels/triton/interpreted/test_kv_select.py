"""Selection on the GPU against the reference: the same scores, bit for bit, and the same working sets."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from alisa_compile.config import AlisaConfig
from alisa_compile.kernels.kv_select import triton as kernel
from alisa_compile.kernels.kv_select.reference import kv_select as reference
from alisa_compile.kernels.selection import SelectionSpec
from alisa_compile.runtime.policies import selection_spec
from tests.kernels.triton.running import DEVICE, poison_scratch

_LAYERS, _LAYER = 2, 1


@triton.jit
def _powers(out, DECAY: tl.constexpr, PERIOD: tl.constexpr, BITS: tl.constexpr):
    for exponent in range(PERIOD):
        tl.store(out + exponent, kernel.growth(DECAY, exponent, BITS).to(tl.float32))


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


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_scratch(monkeypatch)


def _share_out(monkeypatch: pytest.MonkeyPatch, programs: int, block: int) -> None:
    """Let so many programs, with so many positions at a time, share the positions of the lists."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda _: programs)
    monkeypatch.setattr(kernel, "_BLOCK", block)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_rows(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd lengths, padded and not, after a sparse and a dense step, random scores and many equal ones."""
    spec = POLICIES[policy]
    _share_out(monkeypatch, 4, 32)
    _check(spec, 1)
    _check(spec, 111, batch=1, seed=111)
    _check(spec, 64, padded=True, groups=1)
    _check(spec, 63, dense=True, ties=True, batch=1, groups=1)
    _check(spec, 150, ties=True, padded=True, cap=45, batch=1, groups=1)


@pytest.mark.parametrize("programs", [1, 2, 8, 16])
def test_shares_of_a_list(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, ranks and places go on from program to program and from block to block, some with nothing to do."""
    _share_out(monkeypatch, programs, 16)
    _check(POLICIES["decay"], 130, ties=True, batch=1, groups=1)
    _check(POLICIES["churn"], 95, padded=True, batch=1, groups=1)


def test_the_first_token_counts_as_a_dense_block() -> None:
    """From which refreshes are counted anew."""
    _check(_spec(window=4, refresh=2), 1, origin=0)


@pytest.mark.parametrize("window", [2, 3, 64])
def test_decay_factors(window: int) -> None:
    """Every power that a score may be multiplied by, to the last bit: as many as there are lengths in a period."""
    spec = _spec(window=window, refresh=0)
    period = 16 * window
    out = torch.empty(period, device=DEVICE)
    _powers[(1,)](out, spec.decay, period, BITS=period.bit_length())
    expected = torch.tensor([spec.decay**-exponent for exponent in range(period)])
    assert torch.equal(out.cpu(), expected)


def test_scores_fade_where_the_exponent_returns_to_zero() -> None:
    """Every 16 windows all scores of the layer are scaled, and no others."""
    for tokens in (63, 64):
        _check(POLICIES["decay"], tokens)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 2, 16, 32])
def test_long_lists(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of the size that a GPU gets."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda _: programs)
    _check(POLICIES["decay"], 2500, ties=True, batch=1, groups=1)
    _check(POLICIES["churn"], 2049, padded=True, batch=1, groups=1)
    _check(POLICIES["h2o"], 33000, batch=1, groups=1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_rows_at_many_lengths(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length from 1 to 130, and some longer."""
    _share_out(monkeypatch, 4, 64)
    for tokens in (*range(1, 131), 1000, 1023, 1024, 1025, 3000):
        _check(POLICIES[policy], tokens, padded=tokens % 2 == 0, ties=tokens % 3 == 0, seed=tokens, batch=1, groups=1)
