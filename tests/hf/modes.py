"""Generation modes: each takes a stock model and its compiled twin, and fails where they differ.

`exact` modes compare tokens in float32 at sparsity 0. A mode that needs another model or dtype makes its own pair.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from alisa_compile import AlisaCache
from tests.support import assert_same_tokens, compiled, left_padded

NEW = 12
Mode = Callable[[Any, Any], None]
MODES: dict[str, Mode] = {}


def mode(name: str) -> Callable[[Mode], Mode]:
    """Enter a mode into the table."""

    def enter(run: Mode) -> Mode:
        MODES[name] = run
        return run

    return enter


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Greedy unless told otherwise, `NEW` tokens."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


def same(stock: Any, candidate: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Tokens of both, equal."""
    torch.manual_seed(1)
    expected = generate(stock, ids, mask, **options)
    torch.manual_seed(1)
    got = generate(candidate, ids, mask, **options)
    assert torch.equal(got, expected), f"{got.tolist()} instead of {expected.tolist()}"
    return got


def _prompt(batch_size: int = 1, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded(batch_size, length)


@mode("greedy, left-padded batch")
def _(stock: Any, candidate: Any) -> None:
    assert_same_tokens(stock, candidate, *_prompt(2), NEW)


@mode("extra left padding")
def _(stock: Any, candidate: Any) -> None:
    ids, mask = _prompt(2)
    expected = same(stock, candidate, ids, mask)
    pad = torch.zeros((2, 7), dtype=torch.int64)
    got = generate(candidate, torch.cat([pad, ids], 1), torch.cat([pad, mask], 1))
    assert torch.equal(got[:, 7:], expected)


@mode("right-padded batch")
def _(stock: Any, candidate: Any) -> None:
    ids, mask = _prompt(2)
    same(stock, candidate, ids.flip(1), mask.flip(1))


@mode("sampling with a seed")
def _(stock: Any, candidate: Any) -> None:
    same(stock, candidate, *_prompt(2), do_sample=True, temperature=1.3, top_k=20)


@mode("num_return_sequences")
def _(stock: Any, candidate: Any) -> None:
    out = same(stock, candidate, *_prompt(1), do_sample=True, num_return_sequences=2)
    assert out.shape[0] == 2


@mode("streaming")
def _(stock: Any, candidate: Any) -> None:
    class Collect(hf.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    ids = _prompt(1)[0]
    streamer = Collect()
    expected = generate(stock, ids)
    generate(candidate, ids, streamer=streamer)
    assert streamer.tokens == [*expected[0].tolist(), -1]


@mode("stopping criteria")
def _(stock: Any, candidate: Any) -> None:
    class AtLength(hf.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 19)

    out = same(stock, candidate, *_prompt(2), stopping_criteria=hf.StoppingCriteriaList([AtLength()]))
    assert out.shape[1] == 19


@mode("rows that finish at different times")
def _(stock: Any, candidate: Any) -> None:
    ids, mask = _prompt(2)
    plain = generate(stock, ids, mask)[:, 13:].tolist()

    def first(row: int, token: int) -> int:
        return plain[row].index(token) if token in plain[row] else NEW

    # A token that the second row produces before the first does: that row is padded from there on.
    end = next(token for token in plain[1] if first(1, token) < first(0, token))
    out = same(stock, candidate, ids, mask, eos_token_id=end)[:, 13:]
    assert out.shape[1] == min(first(0, end) + 1, NEW)
    assert out[1, first(1, end)] == end and bool((out[1, first(1, end) + 1 :] == 0).all())


@mode("prefill in chunks")
def _(stock: Any, candidate: Any) -> None:
    same(stock, candidate, *_prompt(2, 21), prefill_chunk_size=8)


@mode("turns over one cache")
def _(stock: Any, candidate: Any) -> None:
    ids = _prompt(1)[0]
    cache, theirs = AlisaCache(stock.config, sparsity=0.0), hf.DynamicCache(config=stock.config)
    out, expected = ids, ids
    for turn in range(3):
        question = torch.randint(2, 120, (1, 4 + turn), generator=torch.Generator().manual_seed(turn))
        expected = generate(stock, torch.cat([expected, question], 1), past_key_values=theirs, max_new_tokens=5)
        out = generate(candidate, torch.cat([out, question], 1), past_key_values=cache, max_new_tokens=5)
        assert torch.equal(out, expected), f"turn {turn}"


@mode("reset and reuse of a cache")
def _(stock: Any, candidate: Any) -> None:
    cache = AlisaCache(stock.config, sparsity=0.0)
    for seed in range(2):
        ids = left_padded(1, 9 + seed, seed=seed)[0]
        assert torch.equal(generate(candidate, ids, past_key_values=cache), generate(stock, ids))
        cache.reset()


@mode("beam search")
def _(stock: Any, candidate: Any) -> None:
    same(stock, candidate, *_prompt(2), num_beams=2)


@mode("prompt lookup")
def _(stock: Any, candidate: Any) -> None:
    ids = _prompt(1)[0]
    same(stock, candidate, torch.cat([ids, ids], 1), prompt_lookup_num_tokens=3)


@mode("assisted decoding")
def _(stock: Any, candidate: Any) -> None:
    draft = copy.deepcopy(stock)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    same(stock, candidate, _prompt(1)[0], assistant_model=draft)


@mode("inference_mode and no_grad")
def _(stock: Any, candidate: Any) -> None:
    ids, mask = _prompt(2)
    expected = generate(stock, ids, mask)
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(generate(candidate, ids, mask), expected)


def logits_error(model: Any, ids: torch.Tensor, mask: torch.Tensor, reference: Any) -> float:
    """Largest difference of teacher-forced logits from those of a float32 model, over a prompt and decode steps."""
    tokens = reference.sequences[:, ids.shape[1] :]

    class Force(hf.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, float("-inf"))
            return forced.scatter(1, tokens[:, input_ids.shape[1] - ids.shape[1]].unsqueeze(1), 0.0)

    out = generate(
        model, ids, mask, logits_processor=hf.LogitsProcessorList([Force()]), output_logits=True,
        return_dict_in_generate=True, max_new_tokens=tokens.shape[1],
    )  # fmt: skip
    assert torch.equal(out.sequences, reference.sequences)
    pairs = zip(out.logits, reference.logits, strict=True)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


def _as_close_as_stock(stock: Any, dtype: torch.dtype, autocast: bool = False) -> None:
    """In a short dtype tokens are a matter of rounding: our logits must be as near to float32's as stock's are."""
    ids, mask = _prompt(2)
    reference = generate(stock, ids, mask, output_logits=True, return_dict_in_generate=True)
    short = copy.deepcopy(stock) if autocast else copy.deepcopy(stock).to(dtype)
    errors = []
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        for model in (short, compiled(short, sparsity=0.0)):
            errors.append(logits_error(model, ids, mask, reference))
    assert errors[0] > 0
    assert errors[1] <= 2 * errors[0], f"off by {errors[1]:.3g}, stock by {errors[0]:.3g}"


@mode("bfloat16")
def _(stock: Any, candidate: Any) -> None:
    _as_close_as_stock(stock, torch.bfloat16)


@mode("float16")
def _(stock: Any, candidate: Any) -> None:
    _as_close_as_stock(stock, torch.float16)


@mode("autocast")
def _(stock: Any, candidate: Any) -> None:
    _as_close_as_stock(stock, torch.bfloat16, autocast=True)


@mode("int8 KV rows")
def _(stock: Any, candidate: Any) -> None:
    ids, mask = _prompt(2)
    reference = generate(stock, ids, mask, output_logits=True, return_dict_in_generate=True)
    scale = max(float(step.abs().max()) for step in reference.logits)
    error = logits_error(compiled(stock, sparsity=0.0, kv_dtype="int8"), ids, mask, reference)
    assert error <= 0.1 * scale, f"off by {error:.3g} of {scale:.3g}"


@mode("two models at once")
def _(stock: Any, candidate: Any) -> None:
    other = copy.deepcopy(stock)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    pairs = [(stock, candidate), (other, compiled(other, sparsity=0.0))]
    ids = _prompt(1)[0]
    expected = [generate(model, ids) for model, _ in pairs]
    got: list[Any] = [None, None]

    def run(place: int) -> None:
        got[place] = generate(pairs[place][1], ids)

    for place in (0, 1):  # one after the other, as compilation is one at a time
        run(place)
    threads = [threading.Thread(target=run, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
