"""Teacher-forced decoding of whole windows of text, in two ways that agree: step by step, and layer by layer.

Which rows layer l attends to at step t depends on that layer's own attention before t, on nothing else of step t. So
when all tokens are known beforehand, a layer may run through all its steps before the next layer begins. Its
projections and MLPs then see all tokens of all windows at once, which is what makes tables of accuracy affordable.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..config import AlisaConfig
from ..errors import AlisaError
from ..hf.attention import NAME as EAGER
from ..hf.attention import attend
from ..hf.cache import AlisaCache, AlisaLayer, append, observe_kv_shapes

NAME = "alisa_layer_by_layer"
METHODS = ("emulation", "recurrence")


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the model made of each token after the prompt, `[B, T - prompt]`.

    loss: negative log likelihood in nats, float32. hit: whether the token was the likeliest.
    """

    loss: torch.Tensor
    hit: torch.Tensor


class Decoder:
    """Decodes known tokens with one model under any configuration.

    method: `emulation` (layer by layer) or `recurrence` (an AlisaCache in eager mode, one forward pass a token).
    """

    def __init__(self, model: Any, method: str = "emulation") -> None:
        self.model = model
        self._kv_shapes = observe_kv_shapes(model)
        self._logits = self._emulate if method == "emulation" else self._recur

    @torch.no_grad()
    def predict(self, tokens: torch.Tensor, prompt: int, config: AlisaConfig) -> Predictions:
        """tokens `[B, T]` int64: the first `prompt` in one dense block, each of the others in a step of its own.

        The first prediction is the prompt's own, as in `generate`; all later ones come from decode steps.
        """
        tokens = tokens.to(self.model.device)
        logits, wanted = self._logits(tokens, prompt, config), tokens[:, prompt:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        return Predictions(loss.cpu(), (logits.argmax(-1) == wanted).cpu())

    def _emulate(self, tokens: torch.Tensor, prompt: int, config: AlisaConfig) -> torch.Tensor:
        """Logits `[B, T - prompt, V]`."""
        cache = self._cache(tokens, config)
        with _attention(self.model, NAME), _running(_Run(cache, prompt)):
            out = self.model(tokens[:, :-1], use_cache=False, logits_to_keep=tokens.shape[1] - prompt)
        if any(bool((store.length == 0).any()) for store in cache.stores):
            raise _fixed_attention(self.model)
        logits: torch.Tensor = out.logits
        return logits

    def _recur(self, tokens: torch.Tensor, prompt: int, config: AlisaConfig) -> torch.Tensor:
        """The same, token by token."""
        with _attention(self.model, EAGER):
            cache = self._cache(tokens, config)
            logits = [self.model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
            for step in range(prompt, tokens.shape[1] - 1):
                logits.append(self.model(tokens[:, step : step + 1], past_key_values=cache).logits)
        return torch.cat(logits, dim=1)

    def _cache(self, tokens: torch.Tensor, config: AlisaConfig) -> AlisaCache:
        cache = AlisaCache(self.model.config, kv_shapes=self._kv_shapes, **dataclasses.asdict(config))
        batch_size, length = tokens.shape
        cache.allocate(batch_size, capacity=length + 1, dtype=self.model.dtype, device=self.model.device)
        return cache


@dataclasses.dataclass(frozen=True)
class _Run:
    """A forward pass over whole windows in progress."""

    cache: AlisaCache
    prompt: int

    def attend(
        self, layer: AlisaLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """All steps of one layer: query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]`; returns `[B, Hq, T, D]`."""
        store = layer.store
        assert store is not None
        # The store counts tokens for all its layers at once; here each layer counts from the beginning.
        store.host_length, store.has_history = 0, False
        outputs = []
        for start, end in self._blocks(query.shape[2], bool(store.spec)):
            block = [states[:, :, start:end] for states in (query, key, value)]
            append(store, layer.index, block[1], block[2], None)
            outputs.append(attend(layer, block[0], block[1], block[2], None, scale))
            if layer.index != store.last_layer:  # the last one has done so
                store.end_step(end - start)
        return torch.cat(outputs, dim=2)

    def _blocks(self, tokens: int, sparse: bool) -> Iterator[tuple[int, int]]:
        """The prompt, then what follows: token by token, or at once where each attends to all before it anyway."""
        yield 0, self.prompt
        if sparse:
            yield from ((step, step + 1) for step in range(self.prompt, tokens))
        elif tokens > self.prompt:
            yield self.prompt, tokens


_run: _Run | None = None


@contextlib.contextmanager
def _running(run: _Run) -> Iterator[None]:
    """transformers hands an attention function nothing but the module and its tensors, hence a global."""
    global _run
    _run = run
    try:
        yield
    finally:
        _run = None


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise _fixed_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _fixed_attention(model: Any) -> AlisaError:
    """Such a model would be measured dense, under whatever name."""
    return AlisaError(
        "the attention of this model cannot be replaced, so there is nothing to measure",
        got=type(model).__name__,
        expected="a model that takes its attention from transformers' AttentionInterface",
    )


def _layer_by_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Layers that alisa does not manage (sliding windows) keep their dense attention and its mask."""
    assert _run is not None
    layer = _run.cache.layers[module.layer_idx]  # type: ignore[index]  # every attention module of transformers has it
    if not isinstance(layer, AlisaLayer):
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _run.attend(layer, query, key, value, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _layer_by_layer)
AttentionMaskInterface.register(NAME, sdpa_mask)
