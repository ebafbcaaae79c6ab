"""Who decodes: alisa and transformers' caches, eager and compiled by Inductor, each behind the same three calls.

`fill` puts a `History` into the cache, `step` decodes one token, `logits` are the last step's. What a user would get
from `generate` is done outside the model too: masks for the static cache are built as transformers builds them.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import transformers as hf
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache, StaticCache

from alisa_compile import AlisaCache
from alisa_compile.backend import alisa
from alisa_compile.hf.cache import append
from alisa_compile.kernels.quantize_row import dequantize_row, quantize_row
from benchmarks.models import History


class Unavailable(Exception):
    """A contender that cannot run here; its text is what its line says instead of a number."""


class Contender(Protocol):
    """What the rows measure."""

    def fill(self) -> None:
        """Make the cache and put the history there."""

    def step(self) -> torch.Tensor:
        """Decode one token of each sequence; its logits `[B, V]`."""


class Alisa:
    """A model compiled by alisa, over an AlisaCache with room for `room` tokens beyond the history."""

    def __init__(self, model: Any, history: History, room: int, **options: Any) -> None:
        self.model, self.history, self.room, self.options = model, history, room, options
        self.token = torch.full((history.batch, 1), 5)
        self._forward = torch.compile(_entry(), backend=alisa, options=options)

    def over(self, history: History) -> Alisa:
        """The same compiled model over another history, with a cache of its own."""
        other = copy.copy(self)
        other.history = history
        return other

    def fill(self) -> None:
        """Through the ops of a compiled prefill, with the history's K, V and attention mass for each layer."""
        history, capacity = self.history, self.history.tokens + self.room
        self.cache = AlisaCache(
            self.model.config, batch_size=history.batch, dtype=self.model.dtype, max_length=capacity, **self.options
        )
        (self.store,) = self.cache.stores
        self.store.padded = False
        if not history.tokens:
            return
        store, selection = self.store, self.store.selection
        key, value = history.states()
        store.begin_step(history.tokens)
        for layer in range(store.shape.num_layers):
            append(store, layer, key, value, None)
            if selection is not None:
                assert store.scores is not None
                mass = history.mass(store.groups, int(selection.seed_rows(history.tokens)), store.scores.dtype)
                torch.ops.alisa.kv_seed.default(
                    store.scores, store.rows, store.counts, mass, store.length, store.origin, None, history.tokens,
                    layer, store.spec,
                )  # fmt: skip
        store.end_step(history.tokens)

    def step(self) -> torch.Tensor:
        """Positions and a 2-D mask come from outside, as `generate` passes them."""
        length = self.cache.get_seq_length()
        mask = torch.ones((self.history.batch, length + 1), dtype=torch.int64)
        positions = torch.full((self.history.batch, 1), length)
        logits: torch.Tensor = self._forward(
            self.model, input_ids=self.token, position_ids=positions, attention_mask=mask, past_key_values=self.cache
        ).logits[:, -1]
        return logits

    def kept(self) -> torch.Tensor:
        """Which positions the coming step attends to in each layer, `[L, B, S + 1]` bool (one head group)."""
        store = self.store
        length = store.host_length + 1
        kept = torch.ones((store.shape.num_layers, store.shape.batch_size, length), dtype=torch.bool)
        if store.rows is None or store.counts is None:
            return kept
        for layer in range(kept.shape[0]):
            for sequence in range(kept.shape[1]):
                count = int(store.counts[layer, sequence, 0])
                if count >= 0:
                    kept[layer, sequence] = False
                    kept[layer, sequence, store.rows[layer, sequence, 0, :count].long()] = True
        return kept

    @property
    def kv_bytes(self) -> int:
        """Bytes that the coming step's attention has to read: K, V and scales of the rows it attends to."""
        return int(self.kept().sum()) * self.store.row.bytes_per_row * self.store.groups


class Transformers:
    """One of transformers' caches: dynamic, static, offloaded, or quantized by fp8, quanto or hqq.

    chosen: those of the history's sequences that it has; all by default.
    """

    def __init__(
        self,
        model: Any,
        history: History,
        room: int,
        kind: str,
        compiled: bool = False,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self.model, self.history, self.room, self.kind = model, history, room, kind
        self.chosen = list(range(history.batch) if chosen is None else chosen)
        self.token = torch.full((len(self.chosen), 1), 5)
        entry = _entry()
        # A static cache has static shapes; the others grow, which torch finds out at the second length.
        options: dict[str, Any] = {"dynamic": False} if kind == "static" else {}
        self._forward: Callable[..., Any] = torch.compile(entry, **options) if compiled else entry

    def _cache(self) -> Cache:
        config, capacity = self.model.config, self.history.tokens + self.room
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "static":
            return StaticCache(config=config, max_cache_len=capacity)
        if self.kind == "offloaded":
            if not torch.accelerator.is_available():
                raise Unavailable("offloads from a GPU, and there is none")
            return DynamicCache(config=config, offloading=True)
        package = {"quanto": "optimum", "hqq": "hqq"}.get(self.kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise Unavailable(f"needs the package {'optimum-quanto' if package == 'optimum' else package}")
        return QuantizedCache(self.kind, config)

    def fill(self, *, as_int8: bool = False) -> None:
        """Through `Cache.update`, as a prefill would. as_int8: what is left of K and V after alisa's int8 rows."""
        self.cache = self._cache()
        self.length = self.history.tokens
        if self.length:
            key, value = self.history.states()
            if len(self.chosen) < self.history.batch:
                key, value = key[self.chosen], value[self.chosen]
            if as_int8:
                key, value = (dequantize_row(*quantize_row(states), states.dtype) for states in (key, value))
            for layer in range(self.model.config.num_hidden_layers):
                self.cache.update(key.clone(), value.clone(), layer)

    def step(self, kept: torch.Tensor | None = None) -> torch.Tensor:
        """kept `[B, S + 1]` bool: attend to these positions alone (the reference of sparse attention)."""
        inputs: dict[str, Any] = {}
        if kept is not None:
            # Added to the scores, which every attention implementation of transformers understands.
            hidden = torch.finfo(self.model.dtype).min
            inputs["attention_mask"] = torch.zeros_like(kept, dtype=self.model.dtype).masked_fill(~kept, hidden)[
                :, None, None
            ]
        elif self.kind == "static":
            capacity = self.history.tokens + self.room
            mask = torch.arange(capacity) <= self.length
            inputs["attention_mask"] = mask.expand(len(self.chosen), 1, 1, -1)
        positions = torch.full((len(self.chosen), 1), self.length)
        logits: torch.Tensor = self._forward(
            self.model, input_ids=self.token, position_ids=positions, past_key_values=self.cache, use_cache=True,
            **inputs,
        ).logits[:, -1]  # fmt: skip
        self.length += 1
        return logits


def _entry() -> Callable[..., Any]:
    """A function of its own for each contender: torch counts recompilations by code object."""
    source: dict[str, Any] = {}
    exec("def forward(model, **inputs):\n    return model(**inputs)\n", source)
    entry: Callable[..., Any] = source["forward"]
    return entry


def quiet_transformers() -> None:
    """Without advice on generation flags, and without bars of its own, between the tables."""
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
