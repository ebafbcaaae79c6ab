"""Plans for transformers models: shapes from a model or from a config alone, without weights."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import AlisaConfig
from ..errors import AlisaError, CacheError, ConfigError, InfeasibleError, NotAvailableError
from ..runtime.budgets import Budgets, resolve
from ..runtime.forecast import Forecast
from ..runtime.plan import ModelShape, Plan, make_plan, tier_sizes
from ..runtime.policies import selection_spec
from ..runtime.profile import MachineProfile, obtain, profile_path
from ..runtime.store import Place, StoreShape
from ..runtime.tiers import TierSizes
from .cache import AlisaLayer, KVShapes, build_layers, observe_kv_shapes, why_unmanaged

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # a longer prompt is read in pieces, so no more have activations at once


def plan(
    model_or_config: Any,
    *,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    objective: str,
    profile: MachineProfile | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> Plan:
    """See `alisa_compile.plan`."""
    options_given = AlisaConfig.from_options(options)
    if options_given.validate:
        raise NotAvailableError("a plan does not know the cost of validate", got=options_given.validate, fix="leave it")
    for name, value in (
        ("batch_size", batch_size),
        ("prompt_length", prompt_length),
        ("max_new_tokens", max_new_tokens),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is out of range", got=repr(value), expected="an integer >= 1")
    given = getattr(model_or_config, "_orig_mod", model_or_config)  # of torch.compile
    if isinstance(given, PreTrainedModel) and given.device.type == "meta":
        given = given.config
    has_weights = isinstance(given, PreTrainedModel)
    if not has_weights and not isinstance(given, PreTrainedConfig):
        raise ConfigError(
            "there is no plan for this object",
            got=type(given).__name__,
            expected="a transformers model, or its config",
        )
    model = given if has_weights else _skeleton(given)
    config: Any = (given.config if has_weights else given).get_text_config(decoder=True)
    place = _device_of(given) if device is None else _usable(device)
    if dtype is None:
        dtype = (given.dtype if has_weights else getattr(config, "dtype", None)) or torch.get_default_dtype()
    observed = None if model is None else observe_kv_shapes(model)
    shape = model_shape(config, model, observed, batch_size, dtype, place)
    # Weights that are there already are no longer in what is free.
    count = shape.parameters if model is None else sum(parameter.numel() for parameter in model.parameters())
    weights = 0 if has_weights else count * dtype.itemsize
    tokens = batch_size * min(prompt_length, PREFILL_TOKENS)
    budgets = resolve(options_given, place, weights, _activation_bytes(config, tokens, batch_size, dtype))
    return make_plan(
        shape,
        options_given,
        budgets,
        profile or obtain(place, dtype),
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        objective=objective,
    )


def budgets_of(model_config: Any, stores: list[StoreShape], config: AlisaConfig, capacity: int) -> Budgets:
    """The budgets in bytes for stores about to be made, of a model whose weights are loaded.

    model_config: of the model, or of its text decoder. stores: their shapes, one for each K/V shape, of so many tokens.
    """
    first, text = stores[0], model_config.get_text_config(decoder=True)
    # Where memory is short, longer prompts are read in chunks of so many tokens.
    tokens = min(first.batch_size * capacity, PREFILL_TOKENS)
    return resolve(config, first.device, 0, _activation_bytes(text, tokens, first.batch_size, first.dtype))


def placer(model_config: Any, stores: list[StoreShape], config: AlisaConfig, budgets: Budgets) -> list[Place]:
    """One `Place` for each store of a cache: together they keep the budgets, whatever the batch size and capacity.

    budgets: of `budgets_of`, before the storage is made, which must not count against itself. A place costs some
    arithmetic where everything fits, and raises `InfeasibleError` where nothing would, unless all budgets are `auto`.
    """
    any_given = any(value != "auto" for value in (config.device_kv_budget, config.host_kv_budget)) or bool(budgets.disk)
    hidden = int(model_config.get_text_config(decoder=True).hidden_size)

    def place(batch_size: int, capacity: int) -> TierSizes | None:
        shapes = tuple(dataclasses.replace(store, batch_size=batch_size) for store in stores)
        try:
            sizes = tier_sizes(ModelShape(shapes, hidden, 0), config, budgets, capacity)
        except InfeasibleError as error:
            if any_given:
                raise
            # Nobody asked for limits, and what is free is an estimate: the allocation itself will tell.
            logger.warning("everything goes to the device, although it may not fit: %s", error)
            return None
        # Transfers are written for CPUs and CUDA: elsewhere all rows go to the device unless a limit was asked for.
        return sizes if any_given or stores[0].device.type in ("cpu", "cuda") else None

    return [place] * len(stores)


def forecast(
    model: PreTrainedModel,
    kv_shapes: KVShapes | None,
    config: AlisaConfig,
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    budgets: Budgets,
) -> Forecast | None:
    """Of a `generate` that is about to run, for its report; None where this machine has no saved profile.

    kv_shapes: of the model's layers, as they were observed: the model itself must not run here, not even on fake
    tensors, because frequencies of its RoPE may be state that moves with every forward pass.
    Never an error: what goes wrong is logged. Nothing is measured here, because that takes seconds.
    """
    try:
        path = profile_path(model.device, model.dtype)
        if not path.exists():
            return None
        profile = MachineProfile.load(path)
        text = model.config.get_text_config(decoder=True)
        shape = model_shape(text, model, kv_shapes, batch_size, model.dtype, model.device)
    except _PLANNING_ERRORS as error:
        logger.warning("no step times are predicted for the report: %s", error)
        return None
    selection = selection_spec(config)

    def make(churn: float | None) -> Plan | None:
        given = profile
        if churn is not None and selection is not None:
            given = dataclasses.replace(profile, churn={**profile.churn, selection.rank: churn})
        try:
            return make_plan(shape, config, budgets, given, prompt_length=prompt_length, max_new_tokens=max_new_tokens)
        except _PLANNING_ERRORS as error:
            logger.warning("no step times are predicted for the report: %s", error)
            return None

    return Forecast(make)


_PLANNING_ERRORS = (AlisaError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


def _device_of(given: Any) -> torch.device:
    if isinstance(given, PreTrainedModel):
        return torch.device(given.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _usable(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        fix = "for a machine that is not this one, give its profile and budgets and leave the device out"
        raise ConfigError("cannot use this device", got=device, expected="such as cpu or cuda:0", fix=fix) from error
    return place


def _skeleton(config: PreTrainedConfig) -> Any:
    """The model without storage; None for one that transformers cannot build from its config alone."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model class that another library defines, or one that needs real tensors
        logger.warning("plan from the config alone, because the model cannot be built without weights: %r", error)
        return None


def model_shape(
    config: Any,
    model: Any,
    observed: KVShapes | None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelShape:
    """config: of the text decoder. model: with or without weights, or None. observed: K/V shapes of its layers."""
    layers = build_layers(config, observed)
    reason = why_unmanaged(config, layers)
    if reason is not None:
        raise CacheError("this model has no full-attention layer to plan for", got=reason)
    counts: dict[tuple[int, int], int] = {}
    for layer in layers:
        if isinstance(layer, AlisaLayer):
            shape = (layer.kv_heads, layer.head_dim)
            counts[shape] = counts.get(shape, 0) + 1
    stores = tuple(
        StoreShape(count, batch_size, heads, width, dtype, device) for (heads, width), count in counts.items()
    )
    hidden = int(config.hidden_size)
    unmanaged = len(layers) - sum(counts.values())
    parameters, matrix = _parameters(config, model, len(layers))
    return ModelShape(stores, hidden, parameters, matrix, unmanaged)


def _parameters(config: Any, model: Any, layers: int) -> tuple[int, int]:
    """Those that each token is multiplied with, and the size of the matrix that one is in: the geometric mean of all.

    Without the table of input embeddings, unless it is the output too.
    """
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    if model is None:  # the usual proportions: four hidden x hidden matrices, and an MLP of eight
        sizes = [hidden**2] * 12 * layers + [hidden * vocabulary]
    else:
        sizes = [int(parameter.numel()) for parameter in model.parameters()]
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        if inputs is not None and outputs is not None and inputs.weight is not outputs.weight:
            sizes.remove(int(inputs.weight.numel()))
    total = sum(sizes)
    return total, round(math.exp(sum(size * math.log(size) for size in sizes if size) / max(1, total)))


def _activation_bytes(config: Any, tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """A rough bound for a prefill: a layer's residual, projections and MLP, and the last tokens' logits in float32."""
    hidden = int(config.hidden_size)
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    inner = int(max(width) if isinstance(width, (list, tuple)) else width)  # some models have one for each layer
    return tokens * (6 * hidden + 3 * inner) * dtype.itemsize + 2 * batch_size * int(config.vocab_size) * 4
