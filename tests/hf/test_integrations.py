"""How people wrap models: pipelines, quantised weights, tied weights. Each against the same model, stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.hf.modes import NEW, generate
from tests.support import ASSETS, compiled, novel, passage, recorded_compiles, tiny_model


def _same(stock: Any, ids: torch.Tensor) -> None:
    expected = generate(stock, ids)
    with recorded_compiles() as rows:
        assert torch.equal(generate(compiled(stock, sparsity=0.0), ids), expected)
    assert {row.stage: row.rewritten for row in rows} == dict.fromkeys(("prefill", "decode"), _layers(stock))


def _layers(model: Any) -> int:
    layers: int = model.config.num_hidden_layers
    return layers


def test_text_generation_pipeline() -> None:
    """`pipeline("text-generation", model=compiled)`: the same text, one prompt and a batch, and it is compiled."""
    model, tokenizer = novel()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = (ASSETS / "moby-dick-excerpt.txt").read_text(encoding="utf-8")
    prompts = [text[:200], text[1000:1120]]
    options = {"max_new_tokens": NEW, "do_sample": False}
    stock = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = [stock(prompts[0], **options), stock(prompts, batch_size=2, **options)]
    ours = hf.pipeline("text-generation", model=compiled(model, sparsity=0.0), tokenizer=tokenizer)
    with recorded_compiles() as rows:
        got = [ours(prompts[0], **options), ours(prompts, batch_size=2, **options)]
    assert got == expected
    assert rows and all(row.rewritten == _layers(model) for row in rows)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_tied_weights(family: str) -> None:
    """Embedding and output projection are one tensor."""
    model = tiny_model(family, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    _same(model, torch.randint(2, 120, (1, 17), generator=torch.Generator().manual_seed(0)))


def test_torchao_int8_weights() -> None:
    """int8 weight-only quantisation: weights are tensor subclasses."""
    quantization = pytest.importorskip("torchao.quantization")
    model, tokenizer = novel()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    _same(model, passage(tokenizer, 40))


def test_bitsandbytes_int8_weights() -> None:
    """`Linear8bitLt` layers, as `load_in_8bit=True` makes them."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=128)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    short = bnb.nn.Linear8bitLt(
                        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
                    )
                    short.load_state_dict(linear.state_dict())
                    setattr(block, name, short.to("cpu"))
    _same(model, torch.randint(2, 120, (1, 17), generator=torch.Generator().manual_seed(0)))
