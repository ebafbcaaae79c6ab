"""`torch.compile(model, backend="alisa").generate(...)` with no further user code.

PyTorch forwards `generate` of a compiled module to the original model, whose forward then runs eagerly: the backend is
never called. A descriptor on `OptimizedModule` changes that for our backend and for generative transformers models
only. For the duration of a call it routes the original model's forward through the compiled code, hands `generate` an
AlisaCache sized for the request, and marks the dimensions that grow as dynamic.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import gc
import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache

from .. import compat
from ..backend import alisa
from ..config import AlisaConfig
from ..errors import CacheError
from ..passes.causal_mask import PREPARED_OUTSIDE
from ..runtime.budgets import Budgets, format_bytes
from ..runtime.report import CompileRow, SkipRow
from ..runtime.store import TokenStore
from .cache import (
    AlisaCache,
    KVShapes,
    build_layers,
    keep_kv,
    observe_kv_shapes,
    why_unmanaged,
    wrong_batch_size,
)
from .planning import PREFILL_TOKENS, forecast
from .validate import Shadow

logger = logging.getLogger(__name__)

# What a prompt may come with that transformers can cut into chunks.
_TEXT_INPUTS = frozenset(
    ("attention_mask", "position_ids", "token_type_ids", "past_key_values", "use_cache", "logits_to_keep")
)
_SMALLEST_CHUNK = 64  # of a prompt, in tokens: shorter ones save next to nothing
_FUSED = ("sdpa", "alisa")  # attention implementations whose graph holds scaled_dot_product_attention


@dataclasses.dataclass
class Session:
    """What stays with a compiled model between calls of `generate`."""

    config: AlisaConfig
    forward: Callable[..., Any]
    kv_shapes: KVShapes | None  # of the model's layers, as observed
    graphs: dict[int, CompileRow] = dataclasses.field(default_factory=dict)
    stores: list[TokenStore] = dataclasses.field(default_factory=list)  # of the latest call, kept for the next
    holder: weakref.ref[AlisaCache] | None = None  # the cache that owns them, while anybody still has it
    swept_graphs: int = 0  # graphs there were when `_sweep` last ran
    announced: bool = False
    ropes: list[_Route] = dataclasses.field(default_factory=list)  # of rotary embeddings whose frequencies may change
    refused: tuple[SkipRow, ...] | None = None  # of a model that spells its attention out; None: not known yet
    left_out: tuple[SkipRow, ...] = ()  # why the latest call had no AlisaCache, for each attention layer
    warned: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class _Call:
    """One running `generate`."""

    model: Any  # a GenerationMixin
    session: Session
    in_chunks: bool = False  # its prompt is being prefilled in chunks
    in_pieces: bool = False  # memory is short, so a long prompt is to be prefilled in chunks
    prepared: bool = False  # its cache has been chosen; the next to ask for one is an eager generate inside it
    cache: AlisaCache | None = None
    shadow: Shadow | None = None  # of its first decode steps, with option `validate`


@dataclasses.dataclass
class _Installation:
    """The routes of one original model: how many calls run through them, and how to take them out."""

    undo: contextlib.ExitStack
    depth: int = 0


_sessions: weakref.WeakKeyDictionary[torch.nn.Module, Session] = weakref.WeakKeyDictionary()
_current: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("alisa_generate", default=None)
_lock = threading.RLock()
_session_numbers = itertools.count()
_tracing = threading.local()  # ropes_are_set: this thread is inside `_call_model_with_ropes_set`
_installed: weakref.WeakKeyDictionary[torch.nn.Module, _Installation] = weakref.WeakKeyDictionary()


class GenerateDescriptor:
    """Non-data descriptor `OptimizedModule.generate`; raises AttributeError wherever it is not wanted, so that Python
    falls through to `OptimizedModule.__getattr__` and nothing changes for other backends and modules."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None or not _is_ours(module):
            raise AttributeError("generate")
        # Taken now: somebody may wrap what they get here and assign it back, which lands on the original model.
        return functools.partial(generate, module, module._orig_mod.generate)


def _is_ours(module: torch.nn.Module) -> bool:
    backend, _ = compat.optimized_module_backend(module)
    return backend is alisa and isinstance(module._orig_mod, GenerationMixin)


def enable() -> None:
    """Install the hook; importing `alisa_compile.hf` does it."""
    setattr(compat.OptimizedModule, "generate", GenerateDescriptor())  # noqa: B010  (not declared on the class)


def disable() -> None:
    """Remove the hook: `generate` of compiled models is PyTorch's again (eager)."""
    if "generate" in vars(compat.OptimizedModule):
        delattr(compat.OptimizedModule, "generate")


def session_of(module: torch.nn.Module) -> Session | None:
    """The session of a compiled model, if `generate` has run."""
    return _sessions.get(module)


def release(module: torch.nn.Module) -> None:
    """Free the storage that a compiled model keeps between calls."""
    session = _sessions.get(module)
    if session is not None:
        with _lock:
            _sweep(session)
            session.stores, session.holder = [], None


def generate(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The original model's `generate`, compiled."""
    model = module._orig_mod
    with _lock:
        session = _sessions.get(module)
        if session is None:
            session = _new_session(module)
            _sessions[module] = session
    call = _Call(model, session)
    token = _current.set(call)
    try:
        with _routed(model, session.ropes), compat.generous_recompile_limit():
            out = original(*args, **kwargs)
        if call.shadow is not None:
            call.shadow.end()
        return out
    finally:
        _current.reset(token)


def _new_session(module: Any) -> Session:
    _, kwargs = compat.optimized_module_backend(module)
    config = AlisaConfig.from_options(kwargs.get("options"))
    # Dynamo counts recompilations per code object, and remembers sizes and scales by its name to make those that vary
    # unknowns: with a code object and name of its own, a model is compiled as if it were the first of the process.
    model = module._orig_mod
    ropes = [_rope_route(m) for m in model.modules() if _has_moving_rope(m)]
    traced = _call_model_with_ropes_set if ropes else _call_model
    code = traced.__code__.replace(co_name=f"alisa_forward_{next(_session_numbers)}")
    entry = types.FunctionType(code, globals(), "alisa_forward")
    compiled = torch.compile(entry, backend=alisa, **kwargs)
    return Session(config, compiled, _observe(model, ropes), ropes=ropes)


def _observe(model: Any, ropes: list[_Route]) -> KVShapes | None:
    """The K and V shapes that a model makes; without rope updates, which would leave fake frequencies behind."""
    with contextlib.ExitStack() as undo:
        for route in ropes:
            _replace(undo, route.module, "forward", route)
        _tracing.ropes_are_set = True
        try:
            return observe_kv_shapes(model)
        finally:
            _tracing.ropes_are_set = False


def _call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _call_model_with_ropes_set(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for a model whose rotary embeddings have been updated before the call (`_update_ropes`)."""
    _tracing.ropes_are_set = True  # Dynamo keeps this to itself unless the model breaks its graph
    out = model._call_impl(*args, **kwargs)
    _tracing.ropes_are_set = False
    return out


def _has_moving_rope(module: torch.nn.Module) -> bool:
    decorated = compat.without_rope_update(type(module).forward) is not None and "forward" not in vars(module)
    return decorated and bool(compat.layer_types_with_moving_rope(module))


def _rope_route(rope: Any) -> _Route:
    """The rotary embedding's forward, without its update where that has been done. One for all calls: it is guarded."""
    decorated = types.MethodType(type(rope).forward, rope)
    undecorated = compat.without_rope_update(type(rope).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if getattr(_tracing, "ropes_are_set", False):
            return undecorated(rope, *args, **kwargs)
        return decorated(*args, **kwargs)

    return _Route(rope, "forward", forward)


def _update_ropes(model: Any, ropes: list[_Route], position_ids: torch.Tensor) -> None:
    """Let each rotary embedding set its frequencies for these positions, as its forward would do first."""
    like = torch.empty(0, dtype=model.dtype, device=position_ids.device)  # only its dtype and device are read
    with torch.no_grad():
        for route in ropes:
            for layer_type in compat.layer_types_with_moving_rope(route.module):
                named = {} if layer_type is None else {"layer_type": layer_type}
                route(like, position_ids, **named)


@contextlib.contextmanager
def _routed(model: Any, ropes: list[_Route]) -> Iterator[None]:
    """Route the model's forward, cache preparation and input preparation through us; nested calls count.

    The routes look at a context variable, so a thread that runs the original model meanwhile is not affected.
    """
    with _lock:
        installation = _installed.get(model)
        if installation is None:
            installation = _Installation(contextlib.ExitStack())
            for name, route in (
                ("_compiled_call_impl", _forward_route(model, model._compiled_call_impl)),
                ("_prepare_cache_for_generation", _cache_route(model)),
                ("prepare_inputs_for_generation", _inputs_route(model)),
                (compat.PREFILL, _prefill_route(model)),
            ):
                _replace(installation.undo, model, name, route)
            for route in ropes:
                _replace(installation.undo, route.module, "forward", route)
            _installed[model] = installation
        installation.depth += 1
    try:
        yield
    finally:
        with _lock:
            installation.depth -= 1
            if installation.depth == 0:
                del _installed[model]
                installation.undo.close()


def _replace(undo: contextlib.ExitStack, module: Any, name: str, route: Any) -> None:
    """Set an attribute of one object, and register how to set it back."""
    if name in vars(module):
        undo.callback(setattr, module, name, vars(module)[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, route)


class _Route:
    """What stands for a method of a module while `generate` runs; a copy of the module gets the method itself."""

    def __init__(self, module: Any, name: str, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(module, name))  # transformers reads the signature
        self.module, self._name, self._run = module, name, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self._name)


def _active(model: Any) -> _Call | None:
    call = _current.get()
    return call if call is not None and call.model is model else None


def _forward_route(model: Any, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    plain = model._call_impl if previous is None else previous

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Dynamo comes here too, where the user calls the compiled model itself during a generate; what it reads of the
        # context now must not end up in its graph.
        if torch.compiler.is_dynamo_compiling():
            return plain(*args, **kwargs)
        call = _active(model)
        # A logits processor may run the original model with a cache of its own: that stays eager.
        if call is None or (call.cache is not None and kwargs.get("past_key_values") is not call.cache):
            return plain(*args, **kwargs)
        if call.cache is None:
            return _compiled_forward(call, plain, args, kwargs)
        step = functools.partial(_cached_forward, call, call.cache, plain, args, kwargs)
        if call.in_chunks:
            # A chunk is a part of one dense block, however few tokens it has.
            for store in call.cache.stores:
                store.attend_to_all()
        elif call.shadow is not None:
            return call.shadow.beside(step, kwargs)
        return step()

    return forward


def _cached_forward(
    call: _Call, cache: AlisaCache, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A forward pass over an AlisaCache."""
    if not _may_be_compiled(call, cache, kwargs):
        return plain(*args, **kwargs)
    out = _compiled_forward(call, plain, args, kwargs)
    if call.session.refused is None:
        _learn(call, cache)
    return out


def _compiled_forward(call: _Call, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    session = call.session
    if session.ropes:
        positions = kwargs.get("position_ids")
        if positions is None:  # then only the model knows for which positions it sets its frequencies
            return plain(*args, **kwargs)
        _update_ropes(call.model, session.ropes, positions)
    try:
        return session.forward(call.model, *args, **kwargs)
    finally:
        _tracing.ropes_are_set = False  # after an exception


def _spells_attention_out(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "_attn_implementation", None) not in _FUSED


def _may_be_compiled(call: _Call, cache: AlisaCache, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass over an AlisaCache is known to be right when it is compiled.

    A compiled step sees K and V of the whole capacity. Attention that is not rewritten may count on their number (for a
    bias by position, a window), so the first prompt, with its own K and V, tells whether all of it is rewritten.
    """
    refused = call.session.refused
    if refused is not None or not _spells_attention_out(call.model):
        return not refused
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    return tokens is not None and tokens.shape[1] > 1 and not any(store.has_history for store in cache.stores)


def _learn(call: _Call, cache: AlisaCache) -> None:
    """Remember whether the passes left attention dense in the graph of a prompt.

    Fused attention may be refused in some layers and stay right, since its mask has to fit K and V; not so in all.
    """
    rows = {id(row): row for store in cache.stores for row in store.statistics.graphs.values()}
    prompts = [row for row in rows.values() if row.stage == "prefill"]
    skipped = [skip for row in prompts for skip in row.skipped]
    if not prompts or any(skip.reason == PREPARED_OUTSIDE for skip in skipped):
        return  # nothing seen yet, or the user's mask and not the model
    some = any(row.rewritten for row in prompts)
    clean = all(skip.layer is None for skip in skipped)
    if (some and clean) if _spells_attention_out(call.model) else (some or clean):
        call.session.refused = ()
        return
    call.session.refused = tuple(dict.fromkeys(skipped)) or _rows_of(call.model, "the passes found no attention")
    logger.warning(
        "alisa goes on in eager mode, and leaves further calls to transformers' own cache: %s",
        _why_refused(call.session.refused),
    )


def _why_refused(rows: tuple[SkipRow, ...]) -> str:
    reasons = dict.fromkeys(row.reason for row in rows if row.layer is not None) or dict.fromkeys(
        r.reason for r in rows
    )
    return f"the model's attention cannot be rewritten ({'; '.join(reasons)})"


def _prefill_route(model: Any) -> _Route:
    original = getattr(model, compat.PREFILL)

    def prefill(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        call = _active(model)
        if call is None:
            return original(input_ids, generation_config, *args, **kwargs)
        inputs: dict[str, Any] = args[0] if args else kwargs.get("model_kwargs", {})
        given, is_text = dict(inputs), _TEXT_INPUTS.issuperset(inputs)
        length = 0 if call.cache is None else call.cache.get_seq_length()
        chunk = generation_config.prefill_chunk_size
        most = max(1, PREFILL_TOKENS // input_ids.shape[0])
        if call.in_pieces and is_text and chunk is None and input_ids.shape[1] > most:
            chunk = most  # activations of the whole prompt could take more memory than the budgets save
        while True:
            try:
                return _prefill_by(chunk, call, original, input_ids, generation_config, *args, **kwargs)
            except torch.OutOfMemoryError:
                before = chunk or input_ids.shape[1] - length
                if call.cache is None or not call.cache.is_whole or not is_text or before <= _SMALLEST_CHUNK:
                    raise
                chunk = max(_SMALLEST_CHUNK, before // 2)
            text = "the activations of %d tokens do not fit the memory; reading the prompt %d tokens at a time"
            logger.warning(text, before, chunk)
            call.cache.crop(length - call.cache.get_seq_length())
            inputs.clear()  # transformers takes some out while it works
            inputs.update(given)

    return _Route(model, compat.PREFILL, prefill)


def _prefill_by(
    chunk: int | None, call: _Call, original: Any, input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """transformers' prefill, so many tokens at a time; None = all at once."""
    if chunk is not None:
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = chunk
    call.in_chunks = chunk is not None
    try:
        return original(input_ids, generation_config, *args, **kwargs)
    finally:
        call.in_chunks = False


def _cache_route(model: Any) -> _Route:
    original = model._prepare_cache_for_generation

    def prepare(
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        call = _active(model)
        if call is not None and not call.prepared:
            call.prepared = True
            _provide_cache(call, generation_config, model_kwargs, batch_size, max_cache_length)
            if call.cache is not None and call.cache.options.validate:
                prompt = _tokens_of(model_kwargs, generation_config, max_cache_length)
                tokens = min(max_cache_length + 1, prompt + call.cache.options.validate)
                call.shadow = Shadow(model, call.cache, mode, tokens, generation_config)
        return original(generation_config, model_kwargs, mode, batch_size, max_cache_length)

    return _Route(model, "_prepare_cache_for_generation", prepare)


def _provide_cache(
    call: _Call,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Put an AlisaCache for this request into `model_kwargs`, unless the request asks for something else."""
    given = model_kwargs.get("past_key_values")
    reason = _reason_to_stay_out(call, given, generation_config)
    if reason is not None:
        if reason not in call.session.warned:
            call.session.warned.add(reason)
            logger.warning("alisa leaves attention dense and uses transformers' own cache: %s", reason)
        if call.session.refused:
            call.session.stores, call.session.holder = [], None  # never needed again
        call.session.left_out = call.session.refused or _rows_of(call.model, reason)
        return
    call.session.left_out = ()
    sequences = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
    # One slot more spares the growth at the very end. Drafts of assisted decoding may reach one further, and a mask as
    # long as the capacity would be compiled apart.
    capacity = max(max_cache_length + 2, call.session.config.max_length or 0)
    mask = model_kwargs.get("attention_mask")
    padded = mask is not None and not bool((mask != 0).all())
    if given is None:
        given = _fresh_cache(call, sequences, capacity)
        model_kwargs["past_key_values"] = given
        history_padded = False
    else:
        history_padded = _check_given(call, given, sequences, capacity)
    for store in given.stores:
        store.padded = padded or history_padded
    call.cache = given
    with _lock:
        call.session.stores, call.session.holder = given.stores, weakref.ref(given)
    call.in_pieces = any(store.is_tiered for store in given.stores)
    prompt = _tokens_of(model_kwargs, generation_config, max_cache_length)
    _predict(call, given, sequences, prompt, max_cache_length + 1 - prompt)
    if not call.session.announced:
        call.session.announced = True
        _announce(given, sequences, prompt)


def _tokens_of(model_kwargs: dict[str, Any], generation_config: Any, max_cache_length: int) -> int:
    """Length of the prompt, its history included."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[1])
    new = generation_config.max_new_tokens
    return max(1, max_cache_length + 1 - new) if new else 1


def _predict(call: _Call, cache: AlisaCache, sequences: int, prompt: int, new_tokens: int) -> None:
    """Plan the call, so that its report can show what was expected beside what happened."""
    limits = cache.stores[0].statistics.budget_bytes
    if limits is None or new_tokens < 1:
        return
    budgets = Budgets(**limits, origin=dict.fromkeys(limits, "of the cache"))
    options = cache.runnable_options(call.model.device)
    expected = forecast(call.model, cache.kv_shapes, options, sequences, prompt, new_tokens, budgets)
    for store in cache.stores:
        store.statistics.forecast = expected


def _announce(cache: AlisaCache, sequences: int, prompt: int) -> None:
    store = cache.stores[0]
    where = "phase I: everything on the device"
    if store.tiers is not None:
        phase = "II" if prompt + 1 > store.tiers.quota else "I"
        where = f"phase {phase} at the start: {store.tiers.quota} of {store.capacity} positions on the device"
    sizes: dict[str, int] = {}
    for each in cache.stores:
        for tier, nbytes in each.bytes_by_tier().items():
            sizes[tier] = sizes.get(tier, 0) + nbytes
    limits = store.statistics.budget_bytes or {}
    held = ", ".join(
        f"{tier} {format_bytes(nbytes)}" + (f" of {format_bytes(limits[tier])}" if tier in limits else "")
        for tier, nbytes in sizes.items()
    )
    logger.info(
        "alisa: %d of %d layers in the KV store, %s; %s for %d x %d tokens",
        len(cache.managed_layers),
        len(cache.layers),
        where,
        held,
        sequences,
        store.capacity,
    )


def _reason_to_stay_out(call: _Call, given: Any, generation_config: Any) -> str | None:
    model = call.model
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if given is not None and not isinstance(given, AlisaCache):
        return f"past_key_values is a {type(given).__name__}, not an AlisaCache"
    if generation_config.cache_implementation is not None:
        return f"cache_implementation={generation_config.cache_implementation!r} was asked for"
    if generation_config.output_attentions:
        return "output_attentions=True needs attention weights, which fused attention does not return"
    if given is not None:
        return None
    if not model._supports_default_dynamic_cache():
        return "this model keeps its state in a cache class of its own"
    config = model.config.get_text_config(decoder=True)
    if call.session.refused:
        return _why_refused(call.session.refused)
    return why_unmanaged(config, build_layers(config, call.session.kv_shapes))


def _rows_of(model: Any, reason: str) -> tuple[SkipRow, ...]:
    """The same reason for each attention layer of a model, by the names of its modules."""
    if model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return (SkipRow(type(model).__name__, None, reason),)
    kept = keep_kv(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            names.setdefault(number, name)
    return tuple(
        SkipRow(names.get(number, f"layer {number}"), number, reason) for number, keeps in enumerate(kept) if keeps
    )


def _fresh_cache(call: _Call, sequences: int, capacity: int) -> AlisaCache:
    """A new cache, on the storage of the previous call if nobody holds that any more and it fits."""
    model, session = call.model, call.session
    cache = AlisaCache(model.config, kv_shapes=session.kv_shapes, **dataclasses.asdict(session.config))
    cache.no_recompute = _why_no_recompute(session)
    with _lock:  # two threads must not take the same storage
        _sweep(session)
        stores, session.stores = session.stores, []
        free = session.holder is None or session.holder() is None
    # The latest cache may have been the user's, with other options.
    usable = free and bool(stores) and stores[0].config == session.config
    if usable and stores[0].shape.fits(sequences, model.dtype, model.device) and stores[0].suits(capacity):
        for store in stores:
            store.reset()
            store.statistics.restart()
        cache.adopt(stores)
        return cache
    del stores  # freed before the new ones are made
    cache.allocate(sequences, capacity=capacity, dtype=model.dtype, device=model.device)
    for store in cache.stores:
        store.statistics.graphs = session.graphs
    return cache


def _why_no_recompute(session: Session) -> str | None:
    """Why K and V of this model's old tokens cannot be rebuilt; None = they can, as far as its graphs allow."""
    return "its rotary frequencies change with the length of the context" if session.ropes else None


def _sweep(session: Session) -> None:
    """What Dynamo leaves of a compilation holds the cache in a cycle, so nobody would seem to have let go of it."""
    graphs = len(session.stores[0].statistics.graphs) if session.stores else 0
    if graphs > session.swept_graphs and session.holder is not None and session.holder() is not None:
        session.swept_graphs = graphs
        gc.collect()


def _check_given(call: _Call, cache: AlisaCache, sequences: int, capacity: int) -> bool:
    """A user's own cache: it must fit the model and the batch. Returns whether its history has padding."""
    model, observed = call.model, call.session.kv_shapes
    by_config, by_model = (
        AlisaCache(model.config).layer_shapes,
        AlisaCache(model.config, kv_shapes=observed).layer_shapes,
    )
    if not cache.is_allocated and cache.layer_shapes == by_config != by_model:
        cache.fit(observed)
    if cache.layer_shapes != by_model:
        raise CacheError(
            "this AlisaCache was built from another config",
            got=f"{len(cache.layer_shapes)} layers, first of (KV heads, head_dim) = {cache.layer_shapes[0]}",
            expected=f"{len(by_model)} layers, first of {by_model[0]}",
            fix="build it as AlisaCache(model.config, ...) from this model",
        )
    if not cache.is_allocated:
        cache.no_recompute = _why_no_recompute(call.session)
        cache.allocate(sequences, capacity=capacity, dtype=model.dtype, device=model.device)
        return False
    held = cache.stores[0].shape.batch_size
    if held != sequences:
        raise wrong_batch_size(sequences, held)
    cache.reserve(capacity)
    return any(store.has_history and not bool(store.valid.all()) for store in cache.stores)


def _inputs_route(model: Any) -> _Route:
    original = model.prepare_inputs_for_generation

    def prepare(*args: Any, **kwargs: Any) -> Any:
        inputs = original(*args, **kwargs)
        call = _active(model)
        if call is None or call.cache is None or inputs.get("past_key_values") is not call.cache:
            return inputs
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        if inputs.get("attention_mask") is None:
            # Some models derive positions from a missing mask and the cache length, which breaks their graph.
            total = call.cache.get_seq_length() + tokens.shape[1]
            inputs["attention_mask"] = torch.ones((tokens.shape[0], total), dtype=torch.int64, device=tokens.device)
        for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "token_type_ids"):
            tensor = inputs.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
                inputs[name] = tensor = tensor.contiguous()  # strides are guarded too
                # Else a second batch size would be compiled as unknown sizes, about which the passes prove nothing.
                compat.mark_static(tensor, *(dim for dim in range(tensor.dim()) if dim != 1))
                if tensor.shape[1] > 1:
                    compat.mark_dynamic(tensor, 1)
        return inputs

    return _Route(model, "prepare_inputs_for_generation", prepare)
