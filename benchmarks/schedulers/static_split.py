"""FlexGen's placement: a fixed share of each layer's K and V on the host from the first token on.

FlexGen (Sheng et al., ICML 2023, `--percent`) splits every KV tensor once and for all, by the share that fits when the
sequence is at its longest. The rest is written down as tokens come and read from the host in every step. Here the
share is of positions, the oldest ones, where FlexGen splits by batch and heads: the bytes are the same in each step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import alisa_compile
from alisa_compile import AlisaCache
from alisa_compile.backend import alisa
from alisa_compile.config import AlisaConfig
from alisa_compile.hf.planning import budgets_of, placer
from alisa_compile.kernels.tiers import drain
from alisa_compile.runtime.store import StoreShape, TokenStore


class StaticSplit:
    """A model compiled by alisa, over a store that keeps a fixed share of its positions on the host.

    options: those of alisa; `sparsity` is 0, as in FlexGen, unless it is given. With a sparse policy a step reads the
    rows of its working set, and each of them anew: none that was read stays on the device.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.options = AlisaConfig.from_options({"sparsity": 0.0, "recompute": "off", **options})
        self.model = torch.compile(model, backend=alisa, options={"sparsity": 0.0, "recompute": "off", **options})
        self.cache: AlisaCache | None = None

    @property
    def store(self) -> StaticSplitStore:
        """Of the latest call."""
        assert self.cache is not None and isinstance(self.cache.stores[0], StaticSplitStore)
        return self.cache.stores[0]

    def release(self) -> None:
        """Free the storage that is kept for the next call."""
        self.cache = None
        alisa_compile.release(self.model)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """As the model's own `generate`; prompts `[B, S]`. `InfeasibleError` where the budgets do not suffice."""
        capacity = ids.shape[1] + max_new_tokens + 2  # as `generate` asks for, and one that is never filled
        cache = self.cache
        if cache is None or cache.stores[0].shape.batch_size != len(ids) or cache.stores[0].capacity != capacity:
            self.cache = None  # freed before the new one is made
            cache = self.cache = self._new_cache(len(ids), capacity)
        cache.reset()
        for store in cache.stores:
            store.statistics.restart()
        out: torch.Tensor = self.model.generate(ids, past_key_values=cache, max_new_tokens=max_new_tokens, **options)
        return out

    def _new_cache(self, batch_size: int, capacity: int) -> AlisaCache:
        model = self.model._orig_mod
        cache = AlisaCache(model.config, **vars(self.options))
        (form,) = set(cache.layer_shapes)  # of all layers, in every model that is measured here
        shape = StoreShape(len(cache.layer_shapes), batch_size, *form, model.dtype, model.device)
        budgets = budgets_of(model.config, [shape], self.options, capacity)
        (place,) = placer(model.config, [shape], self.options, budgets)
        cache.adopt([StaticSplitStore(shape, self.options, capacity, place)])
        cache.stores[0].statistics.budget_bytes = budgets.by_tier
        return cache


class StaticSplitStore(TokenStore):
    """A token store whose first positions leave the device after each step, a fixed share of all there are.

    The share leaves room, when the store is full, for the rows that attention reads from the host and for the coming
    token. Slots beyond the share hold nothing: they are marked as if a position that is never reached had them.
    """

    @property
    def host_share(self) -> float:
        """Of all positions; 0 where everything fits the device."""
        if self.tiers is None:
            return 0.0
        dynamic = 0 if self.selection is None else int(self.selection.dynamic_rows(self.capacity))
        return 1 - max(0, self.tiers.quota - 1 - dynamic) / self.capacity

    @property
    def _unused(self) -> int:
        """The position that is never reached."""
        return self.capacity - 1

    def begin_step(self, new_tokens: int) -> None:
        """As of any store; a prompt in pieces passes through all the slots there are."""
        if self.tiers is not None and new_tokens > 1:
            self.tiers.owner.masked_fill_(self.tiers.owner == self._unused, -1)
        super().begin_step(new_tokens)

    def end_step(self, new_tokens: int) -> None:
        """As of any store; then the split."""
        super().end_step(new_tokens)
        if self.tiers is not None:
            self._split()

    def _split(self) -> None:
        tiers = self.tiers
        assert tiers is not None
        drain(tiers)
        end = min(self.host_length, math.ceil(self.host_share * (self.host_length + 1)))
        for layer in range(self.shape.num_layers):
            first = int(tiers.below[layer])
            if first < end:
                slots = self.table[layer, :, :, first:end].long()
                tiers.down(layer, self.pool[slots], None if self.scales is None else self.scales[slots])
        leaving = self.table[..., :end]
        tiers.owner[leaving[leaving >= 0].long()] = -1
        leaving.fill_(-1)
        owner = tiers.owner.view(-1, tiers.quota)
        owner.masked_fill_(owner == self._unused, -1)
        free = owner < 0
        later = free & (free.cumsum(1) > 1)  # all but one, which the coming token takes
        owner.masked_fill_(later, self._unused)
        if self.rows is not None and self.counts is not None:
            # Of the coming working sets, those that have just left are to be read as well.
            chosen = torch.arange(self.rows.shape[3]) < self.counts.unsqueeze(-1)
            chosen &= self.rows < self.host_length
            slots = self.table.gather(-1, torch.where(chosen, self.rows, 0).long())
            tiers.misses.copy_((chosen & (slots < 0)).sum((1, 2, 3)))
