"""Models with random weights, and K and V as if a long prompt had been read: speed does not depend on what they say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import transformers as hf

#: Of random weights: as large as training leaves them, so that attention has a say in the logits.
_SCALE = 0.02
#: Of random keys: attention then has favourites, as in a trained model, and which rows are kept matters.
_KEY_SCALE = 2.0
_BLOCK = 1 << 20  # random numbers that are really drawn; larger tensors repeat them at shifted places

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    },
    "overhead": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    },
    "small": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class History:
    """K and V of `tokens` tokens of `batch` sequences, the same in each layer, and which of them seed the scores.

    The layers are alike so that all of them keep the same rows, which one mask can tell a stock model.
    """

    batch: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each `[B, H, S, D]`."""
        shape = (self.batch, self.kv_heads, self.tokens, self.head_dim)
        return _random(shape, self.dtype, 1, _KEY_SCALE), _random(shape, self.dtype, 2, 1.0)

    def mass(self, groups: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Attention mass of the last `rows` rows, `[B, G, R, S]`: random, each row summing to 1."""
        generator = torch.Generator().manual_seed(3)
        mass = torch.rand((self.batch, groups, rows, self.tokens), generator=generator, dtype=dtype) ** 8
        return mass / mass.sum(-1, keepdim=True)


def llama(shape: str, dtype: torch.dtype, max_length: int) -> Any:
    """A Llama of a shape in `SHAPES` in eval mode, quick to make at any size."""
    config = hf.LlamaConfig(
        **SHAPES[shape], max_position_embeddings=max_length, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its frequencies are no parameters, and to_empty lost them
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(_random(tuple(parameter.shape), dtype, number, _SCALE))
            assert parameter.device.type == "cpu", name
    return model.eval()


def history_of(model: Any, batch: int, tokens: int) -> History:
    """A history that fits a model."""
    config = model.config
    return History(batch, tokens, config.num_key_value_heads, config.head_dim, model.dtype)


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float) -> torch.Tensor:
    """Normal numbers. Drawing billions takes minutes: a block of an odd length, so that no row is another's copy."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for size in shape:
        count *= size
    drawn = min(count, _BLOCK - 17)
    block = (torch.randn(drawn, generator=generator) * scale).to(dtype)
    if drawn == count:
        return block.view(shape)
    result = torch.empty(count, dtype=dtype)
    for start, part in _pieces(count, drawn):
        result[start : start + part] = block[:part]
    return result.view(shape)


def _pieces(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(size, count - start)
