"""Small models, and the rule by which two implementations' tokens are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from alisa_compile import backend as alisa_backend
from alisa_compile.runtime.report import CompileRow

ASSETS = Path(__file__).resolve().parent.parent / "benchmarks" / "assets"
NOVEL = ASSETS / "novel-7m"
MARGIN = 1e-4  # a token may differ where the reference itself is this close to undecided ...
EXCUSED = 0.01  # ... and at most this share of tokens may be excused that way

_COMMON = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def tiny_model(family: str, layers: int = 2, seed: int = 0, **changes: Any) -> Any:
    """A random model of a transformers family, float32, in eval mode, that never stops by itself."""
    gqa = {"num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": layers}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**{**_COMMON, **gqa, **_TOKENS, **changes}),
        "mistral": lambda: hf.MistralConfig(**{**_COMMON, **gqa, **_TOKENS, "sliding_window": None, **changes}),
        "qwen3": lambda: hf.Qwen3Config(**{**_COMMON, **gqa, **_TOKENS, "head_dim": 24, **changes}),
        "neox": lambda: hf.GPTNeoXConfig(
            **{**_COMMON, **_TOKENS, "intermediate_size": 96, "num_hidden_layers": layers, **changes}
        ),
        "falcon": lambda: hf.FalconConfig(
            **{**_COMMON, **_TOKENS, "num_hidden_layers": layers, "multi_query": False, "alibi": False, **changes}
        ),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **{
                **_COMMON,
                **gqa,
                **_TOKENS,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "layer_types": ["full_attention"] * layers,
                **changes,
            }
        ),
        "opt": lambda: hf.OPTConfig(
            **{
                **_COMMON,
                **_TOKENS,
                "ffn_dim": 96,
                "word_embed_proj_dim": 64,
                "num_hidden_layers": layers,
                **changes,
            }
        ),
    }
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(configs[family]()).eval()
    # Freshly initialised models are so close to uniform that greedy decoding is mostly a constant; larger weights
    # make the tokens depend on the whole context, which is what the comparison is for.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(3.0)
    return model


def novel(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The embedded trained model and its tokenizer."""
    model = hf.AutoModelForCausalLM.from_pretrained(NOVEL, dtype=dtype).eval()
    return model, hf.AutoTokenizer.from_pretrained(NOVEL)


def passage(tokenizer: Any, tokens: int, start: int = 0) -> torch.Tensor:
    """Token ids `[1, tokens]` of the held-out text."""
    text = (ASSETS / "moby-dick-excerpt.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    return ids[:, start : start + tokens]


def left_padded(batch_size: int, length: int, vocab: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and mask where row i has 3 i padding tokens on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        mask[row, : 3 * row] = 0
        ids[row, : 3 * row] = 0
    return ids, mask


def compiled(model: Any, inner: str = "aot_eager", **options: Any) -> Any:
    """The model under our backend."""
    return torch.compile(model, backend=alisa_backend.alisa, options={"inner_compiler": inner, **options})


@torch.no_grad()
def assert_same_tokens(model: Any, candidate: Any, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> None:
    """Greedy tokens of `candidate` equal those of the stock `model`.

    A difference counts when the stock model's top-1 margin at that place is above MARGIN. After an excused difference
    the candidate is continued from the stock tokens, so that every token is compared.
    """
    options = {"do_sample": False, "min_new_tokens": new_tokens, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
    prompt, excused = ids.shape[1], 0
    start = prompt
    while start < expected.shape[1]:
        here = expected[:, :start]
        full_mask = torch.cat([mask, mask.new_ones(mask.shape[0], start - prompt)], dim=1)
        left = expected.shape[1] - start
        got = candidate.generate(
            here, attention_mask=full_mask, max_new_tokens=left, **{**options, "min_new_tokens": left}
        )
        different = (got != expected).any(0).nonzero()
        if not len(different):
            break
        place = int(different[0])
        rows = (got[:, place] != expected[:, place]).nonzero().flatten()
        margin = _margin(model, expected[:, :place], mask)[rows].max()
        assert margin <= MARGIN, (
            f"token {place - prompt} of rows {rows.tolist()} differs: {got[rows, place].tolist()} instead of "
            f"{expected[rows, place].tolist()}, and the stock model was sure of it (margin {float(margin):.3g})"
        )
        excused += len(rows)
        start = place + 1
    assert excused <= EXCUSED * new_tokens * ids.shape[0], f"{excused} tokens had to be excused"


def _margin(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Stock top-1 minus top-2 logit after `ids`, per row."""
    full_mask = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], dim=1)
    positions = (full_mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=full_mask, position_ids=positions).logits[:, -1].double()
    top = logits.topk(2).values
    return top[:, 0] - top[:, 1]


@contextlib.contextmanager
def recorded_compiles() -> Iterator[list[CompileRow]]:
    """The graphs compiled inside the block."""
    rows: list[CompileRow] = []
    alisa_backend.compile_listeners.append(rows.append)
    try:
        yield rows
    finally:
        alisa_backend.compile_listeners.remove(rows.append)
