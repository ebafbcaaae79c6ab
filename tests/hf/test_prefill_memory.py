"""A prompt whose activations do not fit the memory is read in shorter pieces, with one warning a halving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from alisa_compile import AlisaCache, backend
from tests.hf.modes import generate
from tests.support import compiled, left_padded, tiny_model

PROMPT = 300


class ShortMemory:
    """The device takes no more than `tokens` tokens at once, and says so in the second layer's attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tokens, self.blocks = tokens, []
        monkeypatch.setattr(backend, "_compile", lambda gm, *_: lambda *args: self._run(gm, args))

    def _run(self, gm: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        memory, seen = self, 0

        class Run(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                nonlocal seen
                if "_attention" in str(target):
                    seen += 1
                    if seen == 2:
                        memory.blocks.append(args[0].shape[2])
                        if args[0].shape[2] > memory.tokens:
                            raise torch.OutOfMemoryError("a pretended CUDA out of memory")
                return super().call_function(target, args, kwargs)

        return Run(gm).run(*args)


@pytest.mark.parametrize(
    "options",
    (
        pytest.param({"sparsity": 0.0}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
        {"device_kv_budget": "150KB"},
    ),
    ids=str,
)
def test_shorter_pieces(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = tiny_model("llama", layers=2, seed=3)
    ids, mask = left_padded(2, PROMPT)
    want = generate(compiled(stock, inner="eager", **options), ids, mask, max_new_tokens=12)
    candidate = compiled(stock, inner="eager", **options)
    memory = ShortMemory(monkeypatch, 80)
    got = generate(candidate, ids, mask, max_new_tokens=12)
    assert torch.equal(got, want)
    assert memory.blocks[:7] == [300, 150, 75, 75, 75, 75, 1]
    assert caplog.text.count("do not fit the memory") == 2 and "75 tokens at a time" in caplog.text
    assert generate(candidate, ids, mask, max_new_tokens=12).equal(want)  # and again


def test_a_history_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tokens of the failed prefill are read again."""
    stock = tiny_model("llama", layers=2, seed=3)
    ids, _ = left_padded(1, PROMPT)
    further = torch.cat((ids, ids.flip(1)), 1)
    want = generate(stock, further, max_new_tokens=8)
    cache = AlisaCache(stock.config, sparsity=0.0, max_length=800)
    candidate = compiled(stock, inner="eager", sparsity=0.0)
    memory = ShortMemory(monkeypatch, 310)
    generate(candidate, ids, max_new_tokens=1, past_key_values=cache)
    memory.tokens = 160
    assert torch.equal(generate(candidate, further, max_new_tokens=8, past_key_values=cache), want)
    assert memory.blocks[:4] == [300, 300, 150, 150]


def test_too_little_for_any_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raised comes out, and the model works when there is memory again."""
    stock = tiny_model("llama", layers=2, seed=3)
    ids, mask = left_padded(2, PROMPT)
    candidate = compiled(stock, inner="eager", sparsity=0.0)
    memory = ShortMemory(monkeypatch, 10)
    with pytest.raises(torch.OutOfMemoryError):
        generate(candidate, ids, mask, max_new_tokens=4)
    assert memory.blocks == [300, 150, 75, 64]
    memory.tokens = 1000
    assert torch.equal(generate(candidate, ids, mask, max_new_tokens=4), generate(stock, ids, mask, max_new_tokens=4))
