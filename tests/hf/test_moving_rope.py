"""Rotary embeddings whose frequencies change with the length: dynamic NTK and LongRoPE, across their boundary."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import transformers as hf

from alisa_compile.hf import generate
from tests.support import compiled, left_padded, recorded_compiles, tiny_model

_BOUNDARY = 32
_ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {
        "max_position_embeddings": _BOUNDARY,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0},
    },
    "longrope": {
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": _BOUNDARY,
            "factor": 8.0,
        },
    },
}


def _logits(model: Any, length: int, new_tokens: int, processor: Any = None) -> torch.Tensor:
    """Logits `[new_tokens, 2, V]` of a padded batch."""
    ids, mask = left_padded(2, length)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=hf.LogitsProcessorList([] if processor is None else [processor]),
    )
    return torch.stack(out.logits)


def _pair(kind: str) -> tuple[Any, Any]:
    """Two equal models: the frequencies are state that a model carries from call to call."""
    model = tiny_model("llama", **_ROPES[kind])
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("kind", _ROPES)
def test_across_the_boundary_and_back(kind: str) -> None:
    """Every step equals stock: growing past the boundary, a short prompt after that, a long prompt; two graphs."""
    stock, model = _pair(kind)
    candidate = compiled(model, sparsity=0.0)
    frequencies = set()
    with recorded_compiles() as rows:
        for length, new_tokens in ((13, 30), (9, 6), (40, 6), (5, 6)):
            expected = _logits(stock, length, new_tokens)
            torch.testing.assert_close(_logits(candidate, length, new_tokens), expected, rtol=1e-4, atol=1e-4)
            frequencies.add(float(model.model.rotary_emb.inv_freq[-1]))
    assert [(row.stage, row.rewritten) for row in rows] == [("prefill", 2), ("decode", 2)]
    assert len(frequencies) > 1, "the boundary was not crossed"
    assert "forward" not in vars(model.model.rotary_emb), "the route was left behind"


class _Elsewhere:
    """Runs the original model's forward on a longer sequence in the middle of a generate, in a thread or not."""

    def __init__(self, model: Any, in_thread: bool) -> None:
        self.model, self.in_thread, self.seen = model, in_thread, []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        run = threading.Thread(target=self._run) if self.in_thread else None
        if run is None:
            self._run()
        else:
            run.start()
            run.join()
        return scores

    @torch.no_grad()
    def _run(self) -> None:
        ids = torch.arange(2, 2 + _BOUNDARY + 9)[None]
        self.seen.append(self.model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("in_thread", (False, True))
def test_other_forward_passes_keep_their_update(in_thread: bool) -> None:
    """While a compiled generate runs, the same model's own forward sets its frequencies as ever."""
    stock, model = _pair("dynamic")
    expected, got = _Elsewhere(stock, in_thread), _Elsewhere(model, in_thread)
    reference = _logits(stock, 9, 4, expected)
    torch.testing.assert_close(_logits(compiled(model, sparsity=0.0), 9, 4, got), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.seen, expected.seen, rtol=1e-4, atol=1e-4)
    assert len(got.seen) == 4


def test_the_models_own_compilation_keeps_its_update() -> None:
    """What the user compiles while a generate runs has the update in it."""
    stock, model = _pair("dynamic")
    own = torch.compile(model.forward, backend="eager")
    seen = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        long = torch.arange(2, 2 + _BOUNDARY + 9)[None]
        seen.append(own(input_ids=long, use_cache=False).logits)
        return scores

    _logits(compiled(model, sparsity=0.0), 9, 2, look)
    with torch.no_grad():
        expected = stock(input_ids=torch.arange(2, 2 + _BOUNDARY + 9)[None], use_cache=False).logits
    torch.testing.assert_close(seen, [expected, expected], rtol=1e-4, atol=1e-4)


def test_a_copy_made_meanwhile_has_its_own_rotary_embedding() -> None:
    """deepcopy of the model inside a generate: the copy's forward is its own, and unrouted."""
    _, model = _pair("dynamic")
    copies = []

    def duplicate(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        copies.append(copy.deepcopy(model))
        return scores

    _logits(compiled(model, sparsity=0.0), 9, 1, duplicate)
    (twin,) = copies
    assert twin.model.rotary_emb.forward.__self__ is twin.model.rotary_emb
    assert not isinstance(twin.model.rotary_emb.forward, generate._Route)


def test_positions_of_the_models_own_making() -> None:
    """Without position_ids only the model knows its positions: that pass stays eager and exact."""
    stock, model = _pair("dynamic")

    def without_positions(this: Any) -> None:
        original = this.prepare_inputs_for_generation

        def prepare(*args: Any, **kwargs: Any) -> Any:
            inputs = original(*args, **kwargs)
            inputs.pop("position_ids", None)
            return inputs

        this.prepare_inputs_for_generation = prepare

    for this in (stock, model):
        without_positions(this)
    expected = _logits(stock, 13, 30)
    with recorded_compiles() as rows:
        torch.testing.assert_close(_logits(compiled(model, sparsity=0.0), 13, 30), expected, rtol=1e-4, atol=1e-4)
    assert not rows
