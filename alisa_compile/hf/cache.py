"""AlisaCache: a transformers `Cache` whose full-attention layers live in a token store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .. import compat
from ..config import AlisaConfig
from ..errors import CacheError, NotAvailableError
from ..kernels.quantize_row import quantize_row
from ..runtime.store import StoreShape, TokenStore

logger = logging.getLogger(__name__)

KVShapes = Sequence["tuple[int, int] | None"]

_INITIAL_CAPACITY = 256  # of a cache used without a known horizon; it doubles as it fills


class AlisaLayer(CacheLayerMixin):
    """One full-attention layer: an index into a token store.

    Under `torch.compile`, `update` only emits `alisa::` ops, so that all state reaches the graph as inputs; the host
    bookkeeping of a compiled step is done by the backend's step wrapper. In eager mode `update` does both.
    """

    is_compileable = False  # generate() must hand the 2-D mask to the model, not a prepared S x N one
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.owner: weakref.ref[AlisaCache] | None = None  # weak: a cache is freed as soon as nobody holds it
        self.store: TokenStore | None = None
        self.index = 0

    def attach(self, store: TokenStore, index: int) -> None:
        """Bind to layer `index` of a store."""
        self.store, self.index = store, index
        self.dtype, self.device = store.shape.dtype, store.shape.device
        self.batch_size = store.shape.batch_size
        self.is_initialized = True

    def _cache(self) -> AlisaCache | None:
        return None if self.owner is None else self.owner()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the whole cache from the first K it sees `[B, H, S, D]` (eager mode only)."""
        cache = None if torch.compiler.is_dynamo_compiling() else self._cache()
        if cache is None:
            raise CacheError(
                "an AlisaCache without storage reached a compiled model",
                fix="pass batch_size= to AlisaCache(...), call cache.allocate(...) before the first forward pass, or "
                "let torch.compile(model, backend='alisa').generate() make the cache",
            )
        cache.allocate(key_states.shape[0], dtype=key_states.dtype, device=key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, H, T, D]` rows and return the layer's dense K and V (see `alisa::kv_read`)."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        store = self.store
        assert store is not None
        self._check_rows(store, key_states, value_states)
        if torch.compiler.is_dynamo_compiling():
            new_tokens = key_states.shape[2]
            stage = "decode" if new_tokens == 1 else ("extend" if store.has_history else "prefill")
            append(store, self.index, key_states, value_states, None)
            read = torch.ops.alisa.kv_read.tiered if store.is_tiered else torch.ops.alisa.kv_read.default
            extra: tuple[Any, ...] = store.ticket_argument
            if store.hidden_size:
                read, extra = torch.ops.alisa.kv_read.recomputing, (*extra, store.hidden_size)
            keys, values = read(
                store.pool,
                store.scales,
                store.table,
                store.length,
                store.valid,
                store.scores,
                store.rows,
                store.counts,
                store.origin,
                key_states,
                value_states,
                self.index,
                stage,
                store.spec,
                store.padded,
                *extra,
            )
            return keys, values
        with torch.no_grad(), failures_of(store):
            keys, values = self._eager_update(store, key_states, value_states)
        if torch.is_grad_enabled() and key_states.requires_grad and keys is not key_states:
            keys, values = refuse_gradients(keys, key_states), refuse_gradients(values, value_states)
        return keys, values

    def _eager_update(
        self, store: TokenStore, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_tokens = key_states.shape[2]
        if store.hidden_size:
            raise NotAvailableError(
                "rows of this cache are deleted and rebuilt, which is not available in eager mode",
                got="an eager forward pass",
                fix="call the model compiled with torch.compile(model, backend='alisa'), or set recompute='off'",
            )
        if self.index == 0:
            store.reserve(store.host_length + new_tokens)
            store.begin_step(new_tokens)
        total = int(store.length[self.index]) + new_tokens
        if store.is_tiered:
            # What the layer started in the step before may still read the slot that this token takes.
            torch.ops.alisa.kv_wait.default(store.pool, *store.ticket_argument, key_states, self.index)
        append(store, self.index, key_states, value_states, None)
        cache = self._cache()
        if cache is not None and cache.attends_sparsely:
            # attention.py reads the store itself; it finds it through the tensors that the model hands on.
            key_states.alisa_layer = self  # type: ignore[attr-defined]
            return key_states, value_states
        if total == new_tokens:
            keys, values = key_states, value_states
        else:
            read = torch.ops.alisa.kv_read.tiered if store.is_tiered else torch.ops.alisa.kv_read.default
            table = store.table[..., :total]
            if store.is_tiered:
                table = table.contiguous()  # for the native kernels, which stage rows by it
            keys, values = read(
                store.pool, store.scales, table, store.length, store.valid, None, None, None, None,
                key_states, value_states, self.index, "extend", store.spec, store.padded, *store.ticket_argument,
            )  # fmt: skip
        keys.alisa_dense = store.spec  # type: ignore[attr-defined]  # attention.py refuses to take them for sparse
        self.finish_eager_step(new_tokens)
        return keys, values

    def finish_eager_step(self, new_tokens: int) -> None:
        """Host bookkeeping once the last layer of a forward pass has run."""
        assert self.store is not None
        if self.index == self.store.last_layer:
            self.store.end_step(new_tokens)

    def _check_rows(self, store: TokenStore, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = (store.shape.batch_size, store.shape.kv_heads, store.shape.head_dim)
        for name, states in (("K", key), ("V", value)):
            got = (states.shape[0], states.shape[1], states.shape[3])
            if got == expected:
                continue
            if got[0] != expected[0]:
                raise wrong_batch_size(got[0], expected[0])
            raise CacheError(
                f"{name} of this model does not fit this AlisaCache",
                got=f"{got[1]} heads of head_dim {got[2]}",
                expected=f"{expected[1]} heads of head_dim {expected[2]}",
                fix="build the cache from the config of the model that uses it",
            )

    def get_seq_length(self) -> Any:
        """Tokens seen: an int, or inside a traced graph a 0-d tensor, so that no length is baked into the graph."""
        if self.store is None:
            return 0
        if torch.compiler.is_dynamo_compiling():
            return self.store.length[self.index]
        return self.store.host_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the K that `update` will return in this forward pass."""
        store = self.store
        if store is None:
            return query_length, 0
        if not torch.compiler.is_dynamo_compiling():
            return store.host_length + query_length, 0
        if query_length > 1 and not store.has_history:
            return query_length, 0
        return store.table.shape[3], 0

    def get_max_length(self) -> int:
        """-1: the store grows."""
        return -1

    def reset(self) -> None:
        """Forget the tokens (of all layers of this store)."""
        if self.store is not None:
            self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """See `AlisaCache.crop`: the layers of a cache share one store."""
        _for_the_whole_cache("crop")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See `AlisaCache.reorder_cache`."""
        _for_the_whole_cache("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `AlisaCache.batch_repeat_interleave`."""
        _for_the_whole_cache("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `AlisaCache.batch_select_indices`."""
        _for_the_whole_cache("batch_select_indices")

    def offload(self) -> None:
        """transformers' own layer-wise offloading does not apply: rows move token by token."""
        _refuse_offloading()

    def prefetch(self) -> None:
        """See `offload`."""
        _refuse_offloading()


class AlisaCache(Cache):
    """KV cache for `generate(past_key_values=...)`.

    config: the model's config; layers of other kinds than full attention keep transformers' own classes.
    batch_size, dtype, device: given, storage is allocated at once, which a model compiled with
        `model.compile(backend="alisa")` needs; otherwise at first use.
    kv_shapes: KV heads and head_dim of each layer (`observe_kv_shapes(model)`), for models whose config does not tell.
    options: see `AlisaConfig`.

    A cache is for inference with one model and one batch size. `reset()` empties it and keeps its storage.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kv_shapes: KVShapes | None = None,
        **options: Any,
    ) -> None:
        self.options = AlisaConfig.from_options(options)
        self.decoder_config = config.get_text_config(decoder=True)
        self.stores: list[TokenStore] = []
        # Why rows cannot be rebuilt; None, as `generate` of a compiled model sets it: they can.
        self.no_recompute: str | None = "only generate() of a compiled model recomputes, in caches that it allocates"
        super().__init__(layers=[])
        self.fit(kv_shapes)
        reason = why_unmanaged(self.decoder_config, self.layers)
        if reason is not None:
            raise CacheError(
                "this model has no full-attention layer that AlisaCache could hold",
                got=reason,
                fix="use transformers' own cache for this model",
            )
        if batch_size is not None:
            self.allocate(batch_size, dtype=dtype, device=device)

    def fit(self, kv_shapes: KVShapes | None) -> None:
        """Set the layers' K and V shapes, before storage exists (None: those of the config)."""
        self.kv_shapes = kv_shapes
        self.layers = build_layers(self.decoder_config, kv_shapes)
        for layer in self.managed_layers:
            layer.owner = weakref.ref(self)

    @property
    def layer_shapes(self) -> list[tuple[int, int]]:
        """KV heads and head_dim of each managed layer."""
        return [(layer.kv_heads, layer.head_dim) for layer in self.managed_layers]

    @property
    def managed_layers(self) -> list[AlisaLayer]:
        """The layers whose rows live in a token store."""
        return [layer for layer in self.layers if isinstance(layer, AlisaLayer)]

    @property
    def attends_sparsely(self) -> bool:
        """Whether eager attention goes through `alisa` (`attn_implementation="alisa"`)."""
        return getattr(self.decoder_config, "_attn_implementation", None) == "alisa"

    @property
    def is_allocated(self) -> bool:
        """Whether storage exists."""
        return bool(self.stores)

    def allocate(
        self,
        batch_size: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the storage: `capacity` tokens per sequence (default `max_length`, else a small start that doubles)."""
        if self.is_allocated:
            raise CacheError("this AlisaCache already has storage", fix="call reset() to empty it, or build a new one")
        if batch_size < 1:
            raise CacheError("batch_size is out of range", got=batch_size, expected="an integer >= 1")
        dtype = dtype or getattr(self.decoder_config, "dtype", None) or torch.get_default_dtype()
        device = torch.device(device) if device is not None else torch.get_default_device()
        capacity = max(2, capacity or self.options.max_length or _INITIAL_CAPACITY)
        shapes = [
            StoreShape(len(layers), batch_size, kv_heads, head_dim, dtype, device)
            for (kv_heads, head_dim), layers in self._layers_by_shape().items()
        ]
        from .planning import budgets_of, placer  # which knows this module's layers

        budgets = budgets_of(self.decoder_config, shapes, self.options, capacity)
        places = placer(self.decoder_config, shapes, self.runnable_options(device), budgets)
        self.adopt([TokenStore(shape, self.options, capacity, p) for shape, p in zip(shapes, places, strict=True)])
        for store in self.stores:
            store.statistics.budget_bytes = budgets.by_tier

    def runnable_options(self, device: torch.device) -> AlisaConfig:
        """The options, without recomputation where rows cannot be rebuilt."""
        options, refusal = self.options, self.no_recompute
        if refusal is None and device.type != "cpu":
            refusal = f"its rows are on {device}, and recomputation runs on CPUs so far"
        if refusal is None:
            return options
        if options.recompute == "always":
            raise NotAvailableError(
                "option 'recompute' is not available yet with this value for this cache",
                got=f"'always', but {refusal}",
                fix="leave it at 'auto' or set 'off'",
            )
        return dataclasses.replace(options, recompute="off")

    def adopt(self, stores: list[TokenStore]) -> None:
        """Use these stores, one per K/V shape, in the order in which the shapes first appear."""
        self.stores = stores
        for store, layers in zip(stores, self._layers_by_shape().values(), strict=True):
            for index, layer in enumerate(layers):
                layer.attach(store, index)

    def _layers_by_shape(self) -> dict[tuple[int, int], list[AlisaLayer]]:
        groups: dict[tuple[int, int], list[AlisaLayer]] = {}
        for layer in self.managed_layers:
            groups.setdefault((layer.kv_heads, layer.head_dim), []).append(layer)
        return groups

    @property
    def is_whole(self) -> bool:
        """Whether all layers are alisa's, so that a step that fails in one of them leaves none with its tokens."""
        return not self._foreign_layers()

    def __deepcopy__(self, memo: dict[int, Any]) -> AlisaCache:
        """A copy with its own storage, for continuing one prompt in several ways."""
        copy = AlisaCache(self.decoder_config, kv_shapes=self.kv_shapes, **dataclasses.asdict(self.options))
        if self.is_allocated:
            copy.adopt([store.copy() for store in self.stores])
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, AlisaLayer):
                copy.layers[index] = deepcopy(layer, memo)
        return copy

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens per sequence in all; contents are kept."""
        for store in self.stores:
            store.reserve(tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers' `Cache.update`."""
        if layer_idx >= len(self.layers):
            raise CacheError(
                "this AlisaCache belongs to a model with fewer layers",
                got=f"layer {layer_idx}",
                expected=f"at most {len(self.layers) - 1}",
                fix="build the cache from the config of the model that uses it",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence, as assisted decoding does with rejected drafts.

        tokens_to_remove: negative, how many; a positive number is the length to keep, as in older transformers.
        """
        length = self.get_seq_length()
        kept = max(0, length + tokens_to_remove) if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        for layer in self._foreign_layers():
            layer.crop(kept - length)
        for store in self.stores:
            store.crop(kept)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let sequence b continue from what sequence `beam_idx[b]` was (beam search)."""
        for layer in self._foreign_layers():
            layer.reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, one after the other; the cache then holds the larger batch."""
        for layer in self._foreign_layers():
            layer.batch_repeat_interleave(repeats)
        if self.is_allocated:
            self._select([sequence for sequence in range(self._batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences (indices or a mask), in this order; the cache then holds the smaller batch."""
        for layer in self._foreign_layers():
            layer.batch_select_indices(indices)
        self._select((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def _foreign_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, AlisaLayer)]

    @property
    def _batch_size(self) -> int:
        return self.stores[0].shape.batch_size

    def _select(self, index: list[int]) -> None:
        if not self.is_allocated:
            return
        if any(not -self._batch_size <= sequence < self._batch_size for sequence in index):
            raise CacheError(
                "there is no such sequence in this AlisaCache",
                got=f"indices {index}",
                expected=f"each from 0 to {self._batch_size - 1}",
                fix="select sequences that the cache holds",
            )
        for store in self.stores:
            store.select_sequences([sequence % self._batch_size for sequence in index])
        self.adopt(self.stores)

    @property
    def nbytes(self) -> int:
        """Bytes of all stores."""
        return sum(store.nbytes for store in self.stores)


class _RefuseGradients(torch.autograd.Function):
    """Identity whose backward is an error: gradients of what is stored are gone, and zeros would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise CacheError(
            "gradients cannot flow through an AlisaCache",
            fix="train without a cache, or with transformers' DynamicCache; for inference use torch.no_grad()",
        )


def refuse_gradients(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`tensor`, which depends on `source` in a way that autograd has not seen."""
    result: torch.Tensor = _RefuseGradients.apply(tensor, source)  # type: ignore[no-untyped-call]
    return result


@contextlib.contextmanager
def failures_of(store: TokenStore) -> Iterator[None]:
    """An eager step that fails is undone, and says in a typed error if rows could not be moved."""
    try:
        yield
    except Exception as error:
        store.abort_step()
        if store.broken is not None and store.broken is not error:
            raise store.broken from error
        raise


def wrong_batch_size(got: int, expected: int) -> CacheError:
    """A cache that holds one batch size is used with another."""
    return CacheError(
        "this AlisaCache was filled with another batch size",
        got=f"batch size {got}",
        expected=f"batch size {expected}",
        fix="make a new AlisaCache for the new batch",
    )


def append(
    store: TokenStore,
    index: int,
    key: torch.Tensor,
    value: torch.Tensor,
    padding_mask: torch.Tensor | None,
) -> None:
    """Quantise if the store is int8, and emit `alisa::kv_append`."""
    key_scale = value_scale = None
    if store.is_int8:
        if torch.compiler.is_dynamo_compiling():
            key, key_scale = torch.ops.alisa.quantize_row.default(key)
            value, value_scale = torch.ops.alisa.quantize_row.default(value)
        else:
            key, key_scale = quantize_row(key)
            value, value_scale = quantize_row(value)
    arguments = (
        store.pool, store.scales, store.table, store.length, store.valid, key, value, key_scale, value_scale,
        padding_mask, index,
    )  # fmt: skip
    # A block may be longer than the device; a single token has its slot already.
    if store.is_tiered and key.shape[2] > 1:
        torch.ops.alisa.kv_append.tiered(*arguments, store.spec, *store.ticket_argument)
    else:
        torch.ops.alisa.kv_append.default(*arguments)


def build_layers(config: PreTrainedConfig, kv_shapes: KVShapes | None = None) -> list[Any]:
    """transformers' own layers for this config, with each plain full-attention layer replaced by ours."""
    layers: list[Any] = list(DynamicCache(config=config).layers)
    per_layer = getattr(config, "per_layer_config", None) or [config] * len(layers)
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            continue
        shape = _kv_shape(per_layer[index]) if kv_shapes is None else kv_shapes[index]
        if shape is not None:
            layers[index] = AlisaLayer(*shape)
    return layers


def observe_kv_shapes(model: Any) -> KVShapes | None:
    """KV heads and head_dim of each cache layer as the model really makes them; None if that cannot be found out.

    A config does not always tell: Falcon's multi-query heads are one head in some versions and already broadcast in
    others. Runs the model's forward on one token with fake tensors, which computes shapes only.
    """
    config = model.config.get_text_config(decoder=True)
    try:
        with torch.no_grad(), compat.fake_tensors():
            cache = DynamicCache(config=config)
            tokens = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
            model.forward(input_ids=tokens, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model does that fake tensors cannot: the config has to do
        logger.debug("could not observe K and V of %s: %r", type(model).__name__, error)
        return None
    return [_stored_shape(layer) for layer in cache.layers]


def _stored_shape(layer: Any) -> tuple[int, int] | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4 or keys.shape != values.shape:
        return None
    return int(keys.shape[1]), int(keys.shape[3])


def keep_kv(layers: list[Any]) -> list[bool]:
    """Which layers of a cache keep K and V: neither states of linear attention, nor nothing at all."""
    cache = Cache(layers=layers)
    dummies = getattr(cache, "is_dummy", [False] * len(layers))  # transformers 5.17 makes no layer that keeps nothing
    return [not linear and not dummy for linear, dummy in zip(cache.is_linear, dummies, strict=True)]


def why_unmanaged(config: PreTrainedConfig, layers: list[Any]) -> str | None:
    """Why an AlisaCache would hold no layer of a model that has attention; None if it holds one.

    A model without any attention is an error: there is nothing that this package could do for it.
    """
    if any(isinstance(layer, AlisaLayer) for layer in layers):
        return None
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
    if not any(keep_kv(layers)):
        raise CacheError(
            "this model has no attention layer, so there is no KV cache to manage",
            got=f"model type {config.model_type!r} with cache layers {kinds}",
            expected="a model with at least one full-attention layer",
            fix='compile it with another backend, such as torch.compile(model, backend="inductor")',
        )
    return f"no layer of {config.model_type!r} is plain full attention (its cache layers: {kinds})"


def _kv_shape(config: Any) -> tuple[int, int] | None:
    """KV heads and head_dim of a layer; None where K and V differ in width (MLA), which a row cannot hold."""
    if getattr(config, "qk_head_dim", None) is not None or getattr(config, "kv_lora_rank", None) is not None:
        return None
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(getattr(config, "num_key_value_heads", None) or heads), int(head_dim)


def _for_the_whole_cache(name: str) -> NoReturn:
    raise CacheError(
        f"{name} of a single layer: the layers of an AlisaCache share one store", fix=f"call {name} of the cache itself"
    )


def _refuse_offloading() -> NoReturn:
    raise NotAvailableError(
        "layer-wise offloading is not available yet with AlisaCache", fix="use transformers' own cache for this call"
    )
