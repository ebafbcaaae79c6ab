"""`report`, `release`, `disable`: what a user calls besides torch.compile and generate."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .errors import AlisaError
from .passes.record import GraphRecord, Stage, recording
from .runtime.forecast import CHURN_STEPS, Forecast
from .runtime.plan import Plan
from .runtime.profile import MachineProfile
from .runtime.report import COUNTERS, Report, Validation, merged
from .runtime.store import TokenStore
from .runtime.tiers import Tier

if TYPE_CHECKING:  # the tools import this package
    from .tools.graph_diff import GraphDiff


def report(model_or_cache: Any) -> Report:
    """What happened in the latest `generate` of a compiled model, or so far in an AlisaCache."""
    stores: list[TokenStore]
    if isinstance(model_or_cache, torch.nn.Module):
        hook = _hook()
        session = None if hook is None else hook.session_of(model_or_cache)
        if session is not None and session.left_out:
            return Report.without_cache(session.left_out)
        if session is None or not session.stores:
            raise AlisaError(
                "there is nothing to report for this model",
                got=type(model_or_cache).__name__,
                expected='a torch.compile(model, backend="alisa") whose generate() has run with an AlisaCache',
                fix="call generate() first, or pass the AlisaCache itself",
            )
        stores = session.stores
    else:
        stores = getattr(model_or_cache, "stores", [])
        if not stores:
            raise AlisaError("there is nothing to report", got=repr(model_or_cache), expected="an AlisaCache in use")
    first = stores[0]
    statistics = first.statistics
    peaks = {tier.value: sum(store.statistics.peak_bytes.get(tier.value, 0) for store in stores) for tier in Tier}
    row_bytes = max(store.row.bytes_per_row * store.groups for store in stores)
    since_start = [
        tuple(now - before for now, before in zip(store.counters(), store.statistics.counters_before, strict=True))
        for store in stores
    ]
    phases = tuple(map(max, zip(*(store.statistics.phases for store in stores), strict=True)))
    forecast = statistics.forecast
    planned = None if forecast is None else forecast.plan
    churn = None if forecast is None else _measured_churn(forecast, stores)
    corrected = None if forecast is None or churn is None else forecast.corrected(churn)
    by_store = [store.sparsity_of_decode_steps() for store in stores]
    return Report(
        steps=statistics.steps,
        tokens=first.host_length,
        batch_size=first.shape.batch_size,
        capacity=first.capacity,
        sparsity=first.config.sparsity if first.selection else 0.0,
        sparsity_by_step=tuple(sum(steps) / len(stores) for steps in zip(*by_store, strict=True)),
        phase_by_step=phases,
        peak_bytes=peaks,
        budget_bytes=statistics.budget_bytes,
        bytes_per_row={tier: row_bytes for tier, peak in peaks.items() if peak},
        moved=merged(since_start),
        graphs=tuple(statistics.graphs.values()),
        decode_ms=tuple(statistics.decode_ms),
        prefill_ms=tuple(statistics.prefill_ms),
        predicted_ms=() if planned is None else planned.step_ms,
        corrected_ms=() if corrected is None else corrected.step_ms,
        churn=(None if planned is None or churn is None else planned.churn, churn),
        validation=Validation.of(statistics.validated),
        bytes_saved=sum(store.bytes_saved for store in stores),
    )


def _measured_churn(forecast: Forecast, stores: list[TokenStore]) -> float | None:
    """Of the decode steps so far; None where too few of them had rows below the device."""
    first = stores[0].statistics
    decode_phases = first.phases[len(first.prefill_ms) :]
    if len(decode_phases) - decode_phases.count("I") < CHURN_STEPS:
        return None
    place, up_bytes = COUNTERS.index("host_to_device"), 0
    for store in stores:
        before = store.statistics.counters_after_prefill
        if before is None:
            return None
        up_bytes += store.counters()[place] - before[place]
    return forecast.measured_churn(up_bytes, len(decode_phases))


def plan(
    model_or_config: Any,
    *,
    batch_size: int = 1,
    prompt_length: int,
    max_new_tokens: int,
    objective: str = "overlapped",
    profile: MachineProfile | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """Where KV rows would be, what would move and how long steps would take; needs no weights.

    model_or_config: a transformers model or its config. prompt_length, max_new_tokens: tokens of each sequence.
    objective: `overlapped` (transfers hide behind compute) or `paper` (times add up). profile: of another machine;
    default: this one's, measured at the first call in some seconds and kept. device, dtype: default: the model's, or
    cuda where there is one and the dtype of the config. options: those of `AlisaConfig`, budgets included.
    Raises `InfeasibleError`, with the smallest budgets and the longest context that would work.
    """
    if importlib.util.find_spec("transformers") is None:
        raise AlisaError("plan needs transformers", fix="pip install 'alisa-compile[hf]'")
    from .hf import planning

    return planning.plan(
        model_or_config,
        batch_size=batch_size,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        objective=objective,
        profile=profile,
        device=device,
        dtype=dtype,
        options=options,
    )


def trace(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Record what runs inside `with`, and write it to a file that ui.perfetto.dev and chrome://tracing open.

    Lanes: forward passes, waits for transfers, rows on their way between device, host and disk, compilations, phases;
    and the bytes of rows in each tier after each step. One trace at a time; all models of the process are in it.
    """
    from .tools import timeline

    return timeline.record(path)


def record() -> AbstractContextManager[list[GraphRecord]]:
    """`with record() as graphs:` collects what the passes do to every graph compiled inside the block, for `diff`."""
    return recording()


def diff(
    first: fx.GraphModule | Stage | GraphRecord,
    second: fx.GraphModule | Stage | None = None,
    *,
    pass_name: str | None = None,
    layer: int | None = None,
) -> GraphDiff:
    """How two graphs differ, node by node: print it, or take its `.to_dict()`, `.to_html()` or `.to_dot()`.

    first, second: two `torch.fx.GraphModule`s, or two recorded stages; or a GraphRecord of `record()` alone, whose
    state before all passes is compared with that after them. pass_name: only this pass of the record. layer: only what
    was traced in this layer of the model.
    """
    from .tools import graph_diff

    return graph_diff.diff(first, second, pass_name=pass_name, layer=layer)


def release(model: torch.nn.Module) -> None:
    """Free the KV storage that a compiled model keeps between calls of `generate`."""
    hook = _hook()
    if hook is not None:
        hook.release(model)


def disable() -> None:
    """Undo the `generate` hook; `alisa_compile.enable()` brings it back."""
    hook = _hook()
    if hook is not None:
        hook.disable()


def enable() -> None:
    """Install the `generate` hook (done when the backend is first used)."""
    hook = _hook()
    if hook is not None:
        hook.enable()


def _hook() -> ModuleType | None:
    """The module of the `generate` hook; None without transformers, where there is nothing to hook."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from .hf import generate

    return generate
