"""torch's own checks of every op: schema and mutation, shape function, autograd registration, AOT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alisa_compile.kernels.quantize_row import quantize_row
from tests.kernels.harness import Driver, Heads, ops, random_block

_HEADS = Heads(4, 2, 8)
_HISTORY = 6
_STORES: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_kv_head": {"head_mode": "per_kv_head"},
    "paper": {"paper": True, "sparsity": 0.5},
    "int8": {"kv_dtype": "int8"},
    "dense": {"sparsity": 0},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(params=list(_STORES))
def driver(request: pytest.FixtureRequest) -> Driver:
    """A store of each kind with a short history and room for more."""
    made = Driver(_HEADS, capacity=16, layers=2, batch=2, **_STORES[request.param])
    made.forward(_block(made, _HISTORY))
    return made


def _block(driver: Driver, tokens: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return random_block(generator, _HEADS, tokens, layers=2, batch=2, dtype=driver.store.shape.dtype)


def _check(op: Any, *args: Any) -> None:
    results = torch.library.opcheck(op, args)
    assert set(results.values()) == {"SUCCESS"}, results


def _each_padding(check: Callable[[torch.Tensor | None], None], given: torch.Tensor) -> None:
    check(None)
    check(given)


@pytest.mark.parametrize("tokens", [1, 3])
def test_kv_append(driver: Driver, tokens: int) -> None:
    """With and without a padding mask, one token and several; int8 with scales."""
    store, block = driver.store, _block(driver, tokens)
    _, key, value = block.layer(1)
    scales = (None, None)
    if store.is_int8:
        (key, key_scale), (value, value_scale) = quantize_row(key), quantize_row(value)
        scales = (key_scale, value_scale)
    state = (store.pool, store.scales, store.table, store.length, store.valid)
    _each_padding(
        lambda mask: _check(ops.kv_append.default, *state, key, value, *scales, mask, 1),
        torch.ones((2, _HISTORY + tokens), dtype=torch.int64),
    )


@pytest.mark.parametrize(("stage", "tokens"), [("prefill", 5), ("decode", 1), ("extend", 3)])
def test_kv_read(driver: Driver, stage: str, tokens: int) -> None:
    """Every stage returns tensors of its own, laid out as promised."""
    store, (_, key, value) = driver.store, _block(driver, tokens).layer(1)
    state = (store.pool, store.scales, store.table, store.length, store.valid)
    selection = (store.scores, store.rows, store.counts, store.origin)
    _check(ops.kv_read.default, *state, *selection, key, value, 1, stage, store.spec, True)


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
@pytest.mark.parametrize("dense", [False, True])
def test_swa_attention(driver: Driver, dense: bool, soft_cap: float) -> None:
    """With a working set and without one, with validity bits and without."""
    store, query = driver.store, _block(driver, 1).query[1]
    rows, counts = (None, None) if dense else (store.rows, store.counts)
    state = (store.pool, store.scales, store.table, store.length)
    _each_padding(
        lambda valid: _check(
            ops.swa_attention.default, query, *state, valid, rows, counts, 1, _HEADS.scale, soft_cap
        ),
        store.valid,
    )  # fmt: skip


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_prefill_attention(driver: Driver, soft_cap: float) -> None:
    """With and without padding; transposed inputs as models make them, and contiguous ones."""
    store, states = driver.store, _block(driver, 7).layer(1)
    for query, key, value in (states, [part.contiguous() for part in states]):
        _each_padding(
            lambda mask, q=query, k=key, v=value: _check(  # type: ignore[misc]
                ops.prefill_attention.default, q, k, v, mask, store.groups, store.spec, _HEADS.scale, soft_cap
            ),
            torch.ones((2, 7), dtype=torch.int64),
        )


@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_extend_attention(driver: Driver, soft_cap: float) -> None:
    """With and without validity bits."""
    store, block = driver.store, _block(driver, 4)
    for layer in range(2):
        driver.append(block, layer)
    state = (store.pool, store.scales, store.table, store.length)
    _each_padding(
        lambda valid: _check(
            ops.extend_attention.default, block.query[1], *state, valid, store.rows, store.counts, 1, store.spec,
            _HEADS.scale, soft_cap,
        ),
        store.valid,
    )  # fmt: skip


@pytest.mark.parametrize("driver", [name for name in _STORES if name != "dense"], indirect=True)
@pytest.mark.parametrize("op", ["kv_select", "kv_seed"])
def test_kv_select_and_kv_seed(driver: Driver, op: str) -> None:
    """After a step and after a block, with validity bits and without."""
    store = driver.store
    tokens = 1 if op == "kv_select" else 4
    block = _block(driver, tokens)
    for layer in range(2):
        driver.append(block, layer)
    _, mass = driver.attend(block, 1)
    state = (store.scores, store.rows, store.counts, mass, store.length, store.origin)
    extra = () if op == "kv_select" else (tokens,)
    _each_padding(lambda valid: _check(getattr(ops, op).default, *state, valid, *extra, 1, store.spec), store.valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_row(dtype: torch.dtype) -> None:
    """The decomposed op, transposed input included."""
    rows = torch.randn((2, 3, 5, 8)).to(dtype)
    _check(ops.quantize_row.default, rows)
    _check(ops.quantize_row.default, rows.transpose(1, 2))


@pytest.mark.parametrize("masked", (False, True))
def test_capped_attention(masked: bool) -> None:
    """The decomposed op, with and without a mask."""
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 3, 5) > 0.3 if masked else None
    named = {"scale": 0.3, "soft_cap": 5.0}
    torch.library.opcheck(ops.capped_attention.default, (query, key, key, mask), named)
