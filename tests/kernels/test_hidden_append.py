"""`hidden_append` saves the layer inputs of the first tokens, and nothing else."""

from __future__ import annotations

import pytest
import torch

from alisa_compile import CacheError
from alisa_compile.kernels.quantize_row import dequantize_row
from alisa_compile.runtime.store import TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Driver, Heads, ops

LAYERS, BATCH, HIDDEN, MOST = 2, 3, 12, 10


def make_store(**options: str) -> TokenStore:
    sizes = TierSizes(8, 4, 0, 8, deleted=MOST, hidden_size=HIDDEN)
    return Driver(Heads(), capacity=32, layers=LAYERS, batch=BATCH, sizes=sizes, **options).store


def append(store: TokenStore, layer: int, start: int, count: int, *, shared: bool = False) -> torch.Tensor:
    hidden = torch.randn((BATCH, count, HIDDEN))
    positions = torch.arange(start, start + count)[None]
    store.length[layer] = start
    ops.hidden_append(
        hidden, positions if shared else positions + 7 * torch.arange(BATCH)[:, None], store.length, store.ticket, layer
    )
    return hidden


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_the_first_tokens_are_saved(kv_dtype: str) -> None:
    """Blocks, single tokens, a block across the end of what is kept, and tokens after it; each layer for itself."""
    store = make_store(kv_dtype=kv_dtype)
    assert store.tiers is not None and store.tiers.hidden is not None
    saved = store.tiers.hidden
    parts = [append(store, 1, start, count) for start, count in ((0, 4), (4, 1), (5, 20), (25, 1))]
    hidden = torch.cat(parts, 1)[:, :MOST]
    rows = saved.rows if saved.scales is None else dequantize_row(saved.rows, saved.scales, torch.float32)
    rows = rows.view(LAYERS, BATCH, MOST, HIDDEN)
    if saved.scales is None:
        assert torch.equal(rows[1], hidden)
    else:
        assert bool(((rows[1] - hidden).abs() <= 0.501 * saved.scales.view(LAYERS, BATCH, MOST, 1)[1]).all())
    assert not rows[0].any()
    assert saved.saved.tolist() == [0, MOST]
    assert torch.equal(saved.positions[:, :MOST], (torch.arange(MOST) + 7 * torch.arange(BATCH)[:, None]).int())
    assert store.counters()[0] == BATCH * MOST * saved.row_bytes  # device to host
    assert (
        store.bytes_by_tier()["host"] == saved.nbytes + store.tiers.host.nbytes * (5 if kv_dtype == "int8" else 4) // 4
    )


def test_positions_of_the_whole_batch() -> None:
    store = make_store()
    append(store, 0, 0, 5, shared=True)
    assert store.tiers is not None and store.tiers.hidden is not None
    assert torch.equal(store.tiers.hidden.positions[:, :5], torch.arange(5).int().expand(BATCH, -1))


def test_a_sequence_that_moved() -> None:
    """After a reorder tokens are saved to the part of the tiers that belongs to the sequence."""
    store = make_store()
    assert store.tiers is not None and store.tiers.hidden is not None
    first = append(store, 0, 0, 2)
    store.tiers.home.copy_(torch.tensor([2, 0, 1]))
    second = append(store, 0, 2, 2)
    rows = store.tiers.hidden.rows.view(LAYERS, BATCH, MOST, HIDDEN)[0]
    assert torch.equal(rows[:, :2], first) and torch.equal(rows[[2, 0, 1], 2:4], second)


def test_a_gap_is_refused() -> None:
    with pytest.raises(CacheError, match="earlier tokens were not saved"):
        append(make_store(), 0, 3, 1)


def test_registration() -> None:
    """torch's own checks: schema and mutation, shape function, autograd registration, AOT."""
    store = make_store()
    arguments = (torch.randn((BATCH, 2, HIDDEN)), torch.zeros((BATCH, 2), dtype=torch.int64), store.length)
    for op, args in (
        (ops.hidden_append.default, (*arguments, store.ticket, 0)),
        (ops.kv_recompute.default, (store.pool, None, store.ticket, 0)),
    ):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
