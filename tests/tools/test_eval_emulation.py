"""Decoding layer by layer agrees with the real recurrence, token by token."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

from alisa_compile.config import AlisaConfig
from alisa_compile.errors import AlisaError
from alisa_compile.hf.cache import AlisaCache
from alisa_compile.tools.emulation import Decoder, Predictions
from alisa_compile.tools.recall import Plan, ask, make_trials
from tests.support import NOVEL, novel, passage, tiny_model

DENSE = AlisaConfig(policy="dense")
TOLERANCE = 1e-5  # nats, per token


@functools.cache
def model_and_tokens(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """A model of at least three layers (so that staggered refresh steps differ), and tokens `[3, 90]`."""
    if family == "novel":
        model = hf.AutoModelForCausalLM.from_pretrained(NOVEL, dtype=dtype, num_hidden_layers=3).eval()
        return model, passage(hf.AutoTokenizer.from_pretrained(NOVEL), 270).reshape(3, 90)
    generator = torch.Generator().manual_seed(0)
    return tiny_model(family, layers=3).to(dtype), torch.randint(2, 128, (3, 90), generator=generator)


CASES = [
    ("novel", {"policy": "swa", "sparsity": 0.5}),
    ("novel", {"policy": "swa", "sparsity": 0.8, "refresh": 5}),
    ("novel", {"policy": "swa", "sparsity": 0.8, "refresh": 0, "window": 8, "sinks": 1, "local_fraction": 0.3}),
    ("novel", {"policy": "swa", "sparsity": 0.8, "head_mode": "per_kv_head"}),
    ("novel", {"policy": "swa", "sparsity": 0.6, "paper": True}),
    ("novel", {"policy": "swa", "sparsity": 0.8, "kv_dtype": "int8"}),
    ("novel", {"policy": "local", "sparsity": 0.8}),
    ("novel", {"policy": "strided", "sparsity": 0.6}),
    ("novel", {"policy": "h2o", "sparsity": 0.8}),
    ("novel", {"policy": "h2o", "sparsity": 0.4, "kv_dtype": "int8"}),
    ("novel", {"policy": "churn", "sparsity": 0.8}),
    ("novel", {"policy": "dense", "kv_dtype": "int8"}),
    ("qwen3", {"policy": "swa", "sparsity": 0.8}),
    ("opt", {"policy": "swa", "sparsity": 0.6}),
    ("neox", {"policy": "h2o", "sparsity": 0.8}),
]


def predictions(family: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[Predictions, Predictions]:
    """Emulated and real, after a check that the options do something: or agreement would say nothing."""
    model, tokens = model_and_tokens(family, dtype)
    emulated = Decoder(model).predict(tokens, 20, AlisaConfig(**options))
    dense = Decoder(model).predict(tokens, 20, DENSE)
    assert emulated.loss.shape == emulated.hit.shape == (3, 70)
    assert torch.equal(emulated.loss[:, 0], dense.loss[:, 0]), "the prompt itself is dense"
    assert (emulated.loss - dense.loss).abs().max() > 100 * TOLERANCE
    return emulated, Decoder(model, "recurrence").predict(tokens, 20, AlisaConfig(**options))


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda case: str(case).replace(" ", ""))
def test_emulation_equals_recurrence(family: str, options: dict[str, Any]) -> None:
    """In float64: a matmul over one token rounds otherwise than one over all, and in float32 that is enough to turn
    a near tie between two rows, or the rounding of an int8 value."""
    emulated, real = predictions(family, options, torch.float64)
    torch.testing.assert_close(emulated.loss, real.loss, rtol=0, atol=TOLERANCE)
    assert torch.equal(emulated.hit, real.hit)


@pytest.mark.parametrize("policy", ["swa", "local", "strided", "h2o"])
def test_emulation_equals_recurrence_in_float32(policy: str) -> None:
    """Every token where nothing is ranked; the mean where a near tie may turn."""
    emulated, real = predictions("novel", {"policy": policy, "sparsity": 0.8}, torch.float32)
    if policy in ("local", "strided"):
        torch.testing.assert_close(emulated.loss, real.loss, rtol=0, atol=10 * TOLERANCE)
    assert abs(float(emulated.loss.mean() - real.loss.mean())) < 0.02


def test_policies_differ() -> None:
    model, tokens = model_and_tokens("novel")
    losses = {
        policy: Decoder(model).predict(tokens, 20, AlisaConfig(policy=policy, sparsity=0.8)).loss
        for policy in ("swa", "local", "strided", "h2o", "churn")
    }
    for first, one in losses.items():
        for second, other in losses.items():
            assert first == second or (one - other).abs().max() > 1e-3, f"{first} is {second}"


@torch.no_grad()
@pytest.mark.parametrize("method", ["emulation", "recurrence"])
def test_dense_equals_stock(method: str) -> None:
    model, tokens = model_and_tokens("novel", torch.float64)
    before = model.config._attn_implementation
    found = Decoder(model, method).predict(tokens, 20, DENSE)
    assert model.config._attn_implementation == before
    logits = model(tokens).logits[:, 19:-1].float()
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 20:], reduction="none")
    # Other kernels than ours, and the norms of Llama compute in float32 in any case.
    torch.testing.assert_close(found.loss, expected, rtol=0, atol=10 * TOLERANCE)
    assert torch.equal(found.hit, logits.argmax(-1) == tokens[:, 20:])


@torch.no_grad()
def test_sliding_layers_stay_as_they_are() -> None:
    config = hf.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(2, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    found = Decoder(model).predict(tokens, 10, DENSE)
    logits = model(tokens).logits[:, 9:-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 10:], reduction="none")
    torch.testing.assert_close(found.loss, expected, rtol=0, atol=TOLERANCE)
    sparse = Decoder(model).predict(tokens, 10, AlisaConfig(sparsity=0.8))
    assert (sparse.loss - found.loss).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("method", ["emulation", "recurrence"])
def test_own_attention_is_refused(method: str) -> None:
    """GPT-J brings its own attention: it would be dense under every name."""
    torch.manual_seed(0)
    config = hf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(AlisaError, match="cannot be replaced"):
        Decoder(model, method).predict(torch.ones((1, 12), dtype=torch.int64), 4, AlisaConfig())


# secret numbers


def trials(length: int = 120, depth: float = 0.5, count: int = 6) -> tuple[Any, Any, list[Any]]:
    model, tokenizer = novel()
    plan = Plan((length,), (depth,), count, seed=3)
    filler = passage(tokenizer, 3000)[0]
    return model, tokenizer, make_trials(tokenizer, filler, length, depth, plan, filler.new_empty(0))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_trials_tell_once_and_ask_at_the_end(depth: float) -> None:
    _, tokenizer, made = trials(depth=depth)
    names = set()
    for trial in made:
        text = tokenizer.decode(trial.tokens)
        assert len(trial.tokens) == 120
        told = text.index("The secret number of")
        sentence = text[told : text.index(".\n", told)]
        name, number = sentence.removeprefix("The secret number of ").split(" is ")
        assert text.endswith(f" What is the secret number of {name}? It is {number}")
        assert text.count(number) == 2
        answer = tokenizer.decode(trial.tokens[-len(trial.digits) :])
        assert answer.strip() == number and int(trial.digits.sum()) == 5
        question = tokenizer.decode(trial.tokens[-len(trial.digits) - trial.question : -len(trial.digits)])
        assert question == f" What is the secret number of {name}? It is"
        before = len(tokenizer(text[:told])["input_ids"])
        assert abs(before - depth * (120 - len(tokenizer(sentence)["input_ids"]) - 20)) < 5
        names.add((name, number))
    assert len(names) > 3
    again = trials(depth=depth)[2]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made, again, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_recall_is_what_generate_writes(sparsity: float) -> None:
    """Form `prompt` against real greedy decoding, one trial at a time."""
    model, _, made = trials(count=8)
    config = AlisaConfig(sparsity=sparsity)
    written = []
    for trial in made:
        prompt = trial.tokens[: -len(trial.digits)][None]
        model.set_attn_implementation("alisa")
        cache = AlisaCache(model.config, sparsity=sparsity)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=len(trial.digits),
            do_sample=False,
            pad_token_id=0,
        )
        model.set_attn_implementation("sdpa")
        written.append(torch.equal(out[0], trial.tokens))
    found = ask(Decoder(model), made, "prompt", config)
    assert found.exact == written
    assert any(written) or sparsity > 0
    assert all(share == 1 or not whole for share, whole in zip(found.digits, found.exact, strict=True))
    assert not any(math.isnan(share) for share in found.digits)


def test_asked_later_decodes_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, made = trials()
    prompts = {}
    original = Decoder.predict

    def predict(self: Decoder, tokens: torch.Tensor, prompt: int, config: AlisaConfig) -> Any:
        prompts[form] = prompt
        return original(self, tokens, prompt, config)

    monkeypatch.setattr(Decoder, "predict", predict)
    results = {}
    for form in ("prompt", "later"):
        results[form] = ask(Decoder(model), made, form, AlisaConfig(sparsity=0.8))
    assert prompts["prompt"] == 120 - max(len(trial.digits) for trial in made)
    assert prompts["later"] == 120 - max(len(trial.digits) + trial.question for trial in made)
    assert results["prompt"] != results["later"]
