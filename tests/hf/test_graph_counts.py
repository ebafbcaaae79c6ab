"""How many graphs a conversation costs: two, and a third for continued turns. Never one for another length."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from alisa_compile import AlisaCache
from tests.support import compiled, left_padded, recorded_compiles, tiny_model

OPTIONS = pytest.mark.parametrize(
    "options",
    (
        {"sparsity": 0.0},
        {},
        pytest.param({"paper": True}, marks=pytest.mark.slow),
        pytest.param({"kv_dtype": "int8"}, marks=pytest.mark.slow),
    ),
)


@OPTIONS
def test_two_graphs_then_none(options: dict[str, object]) -> None:
    """512 tokens: two graphs; other prompt length, other max_new_tokens, larger capacity: none; no graph break."""
    model = compiled(tiny_model("llama"), **options)
    with recorded_compiles() as rows:
        _generate(model, prompt=17, new_tokens=512)
        assert [row.stage for row in rows] == ["prefill", "decode"]
        _generate(model, prompt=17, new_tokens=8)
        _generate(model, prompt=33, new_tokens=20)
        _generate(model, prompt=600, new_tokens=700)
        _generate(model, prompt=2, new_tokens=3)
    assert [row.stage for row in rows] == ["prefill", "decode"]
    assert all(row.rewritten == 2 and not row.skipped for row in rows)
    assert not counters["graph_break"]


def test_equal_sizes_are_not_tied_together() -> None:
    """A prompt as long as the capacity or the index set was must not make their sizes one symbol."""
    model = compiled(tiny_model("llama"), sparsity=0.5, max_length=64)
    with recorded_compiles() as rows:
        _generate(model, prompt=32, new_tokens=32)
        _generate(model, prompt=64, new_tokens=64)
        _generate(model, prompt=63, new_tokens=5)
    assert len(rows) == 2


def test_third_graph_for_continued_turns() -> None:
    """A second turn on the same cache compiles one graph, a third turn none."""
    stock = tiny_model("llama")
    model = compiled(stock, sparsity=0.0)
    cache = AlisaCache(stock.config, sparsity=0.0)
    ids, _ = left_padded(1, 12)
    with recorded_compiles() as rows:
        for turn in range(3):
            out = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
            if turn == 0:
                assert [row.stage for row in rows] == ["prefill", "decode"]
            ids = torch.cat([out, torch.randint(2, 128, (1, 5 + turn))], dim=1)
    assert [row.stage for row in rows] == ["prefill", "decode", "extend"]
    assert not counters["graph_break"]


def test_padded_batches_have_their_own_pair() -> None:
    """A padded batch after an unpadded one of the same size: one more pair of graphs, then none."""
    model = compiled(tiny_model("llama"), sparsity=0.5)
    ids, mask = left_padded(3, 20)
    with recorded_compiles() as rows:
        model.generate(ids, attention_mask=torch.ones_like(mask), max_new_tokens=4)
        assert len(rows) == 2
        model.generate(ids, attention_mask=mask, max_new_tokens=4)
        assert len(rows) == 4
        model.generate(ids[:, 2:], attention_mask=mask[:, 2:], max_new_tokens=9)
        model.generate(ids, attention_mask=torch.ones_like(mask), max_new_tokens=4)
    assert len(rows) == 4


def _generate(model: object, prompt: int, new_tokens: int) -> None:
    ids, mask = left_padded(1, prompt)
    model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[attr-defined]
