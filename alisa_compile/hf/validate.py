"""`validate=N`: the first N decode steps of a `generate` run a second time, dense, and the logits are compared.

The dense steps see what a dense model would have seen: the rows of the prompt, and rows that the shadow makes itself
from the same tokens. They run eagerly beside the sparse ones and write to a cache of their own, so neither the tokens
nor the store nor the compiled graphs know of them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from ..errors import NotAvailableError
from ..kernels.kv_read.reference import read_rows
from ..runtime import trace
from ..runtime.budgets import format_bytes
from ..runtime.report import ValidatedStep, Validation
from .cache import AlisaCache, AlisaLayer

logger = logging.getLogger(__name__)

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Shadow:
    """The dense steps beside one call of `generate`.

    mode: of the call; others than greedy search and sampling reorder or crop the cache between steps. tokens: the
    longest that the shadow will be, the prompt included. Raises `NotAvailableError` if the call cannot be validated.
    """

    def __init__(
        self, model: Any, cache: AlisaCache, mode: GenerationMode, tokens: int, generation_config: Any
    ) -> None:
        self._model, self._cache = model, cache
        self._dense: Any = None  # the shadow's cache, once the prompt has been read
        self._left = cache.options.validate
        self._steps: list[ValidatedStep] = []
        ends = generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)
        self._running: torch.Tensor | None = None  # `[B]` bool: sequences that have not ended
        if mode not in _MODES:
            raise NotAvailableError(
                "option 'validate' is not available with this way to generate",
                got=mode.value.replace("_", " "),
                expected=" or ".join(each.value.replace("_", " ") for each in _MODES),
                fix="validate with num_beams=1 and without an assistant, then set validate=0",
            )
        if any(store.is_tiered for store in cache.stores):
            raise NotAvailableError(
                "option 'validate' needs all K and V on the device, and the device budget does not hold them",
                got="a cache with rows below the device",
                fix="validate with a shorter prompt or a larger device_kv_budget, then set validate=0",
            )
        self._check_memory(tokens)
        for store in cache.stores:
            store.is_validated = True

    def _check_memory(self, tokens: int) -> None:
        """The shadow holds all K and V on the device, whatever the budget leaves to the store."""
        needed = sum(
            2 * layer.kv_heads * layer.head_dim * layer.store.shape.dtype.itemsize * layer.store.shape.batch_size
            for layer in self._cache.managed_layers
            if layer.store is not None
        )
        needed *= tokens
        held = sum(store.nbytes for store in self._cache.stores)
        budget = self._cache.stores[0].statistics.budget_bytes
        if budget is not None and held + needed > budget["device"]:
            raise NotAvailableError(
                "option 'validate' needs all K and V on the device once more, which the device budget does not allow",
                got=f"{format_bytes(budget['device'])}, of which the store takes {format_bytes(held)}",
                expected=f"{format_bytes(held + needed)} or more",
                fix="validate with a shorter prompt or a larger device_kv_budget, then set validate=0",
            )
        logger.info("validating %d steps takes about %s on the device", self._left, format_bytes(needed))

    def beside(self, step: Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        """Run a forward pass, and its dense twin if it is one of the decode steps to validate."""
        tokens = kwargs.get("input_ids")
        if self._left == 0 or tokens is None or tokens.shape[1] != 1 or self._cache.get_seq_length() == 0:
            return step()
        if self._dense is None:
            self._dense = _dense_copy(self._cache)
        out = step()
        began = time.perf_counter_ns()
        dense = self._model._call_impl(**{**kwargs, "past_key_values": self._dense})
        self._compare(tokens, dense.logits[:, -1], out.logits[:, -1])
        if trace.active is not None:
            trace.active.span("validate", "dense shadow step", began, time.perf_counter_ns())
        self._left -= 1
        if self._left == 0:
            self.end()
        return out

    def _compare(self, tokens: torch.Tensor, dense: torch.Tensor, sparse: torch.Tensor) -> None:
        """tokens: `[B, 1]`, those that went in. dense, sparse: logits `[B, V]`."""
        ended = torch.isin(tokens[:, 0].cpu(), self._ends)
        self._running = ~ended if self._running is None else self._running & ~ended
        expected, got = (logits.double().log_softmax(-1).cpu() for logits in (dense, sparse))
        # What the dense model excludes weighs nothing, although 0 * inf is not a number.
        terms = torch.where(expected == -math.inf, 0.0, expected.exp() * (expected - got))
        divergence, same = terms.sum(-1).clamp_min(0), expected.argmax(-1) == got.argmax(-1)
        running = self._running
        step = ValidatedStep(int(running.sum()), int(same[running].sum()), float(divergence[running].sum()))
        self._steps.append(step)
        self._cache.stores[0].statistics.validated.append(step)

    def end(self) -> None:
        """Free the shadow, and say what it has shown: once N steps have run, or the call is over."""
        self._dense, self._left = None, 0
        result, self._steps = Validation.of(self._steps), []
        if result is None:
            return
        if result.is_unsafe:
            logger.warning(
                "these options are unsafe for this model: beside dense attention, %s. Lower the sparsity, or refresh "
                "more often; `alisa eval` compares settings",
                result,
            )
        else:
            logger.info("validated against dense attention: %s", result)


def _dense_copy(cache: AlisaCache) -> DynamicCache:
    """transformers' own cache with the rows of an AlisaCache, as they were stored; other layers as they are."""
    dense = DynamicCache(config=cache.decoder_config)
    dense.layers = [_dense_layer(layer) if isinstance(layer, AlisaLayer) else deepcopy(layer) for layer in cache.layers]
    return dense


def _dense_layer(layer: AlisaLayer) -> DynamicLayer:
    store = layer.store
    assert store is not None
    slots = store.table[layer.index, :, :, : store.host_length]
    dense = DynamicLayer()
    dense.update(*read_rows(store.pool, store.scales, slots, store.shape.dtype))
    return dense
