"""The backend function: options -> passes -> Inductor -> the step wrapper.

Registered through the `torch_dynamo_backends` entry point alone; a decorator would register the name twice.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import compat
from .config import AlisaConfig
from .errors import AlisaError
from .passes import rewrite_static_buffers
from .passes.base import example, is_op
from .passes.pipeline import PIPELINE, run_pipeline
from .passes.rewrite_static_buffers import BufferSite
from .passes.uuid import FingerprintPass
from .runtime.buffers import forget_scores, scores_of
from .runtime.report import CompileRow

logger = logging.getLogger(__name__)


def alisa(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_ignored: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph. `mode` is Inductor's; `options` are those of `AlisaConfig`."""
    config = AlisaConfig.from_options(options)
    started = time.perf_counter()
    gm = compat.copy_graph(gm)
    outcome = run_pipeline(gm, config)
    steps = _find_steps(gm)
    stage = _stage(gm)
    for announce in compile_start_listeners:
        announce(stage)
    logger.info(
        "compiling the %s graph: %d attention layers rewritten, %d left dense",
        stage,
        outcome.rewritten,
        len(outcome.skipped),
    )
    for skip in outcome.skipped:
        logger.info("attention %s (layer %s) stays dense: %s", skip.node, skip.layer, skip.reason)
    sites = rewrite_static_buffers.sites(gm)
    extra = [tensor for site in sites if site.scores_shape for tensor in _example_scores(site, example_inputs)]
    compiled = _compile(gm, [*example_inputs, *extra], config, mode)
    seconds = time.perf_counter() - started
    logger.info("compiled the %s graph in %.1f s", stage, seconds)
    row = CompileRow(stage, outcome.rewritten, outcome.skipped, seconds)
    for listener in compile_listeners:
        listener(row)
    return CompiledStep(compiled, steps, sites, row)


def _example_scores(site: BufferSite, example_inputs: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    assert site.scores_shape is not None
    device = example_inputs[site.buffer].device
    return torch.zeros(site.scores_shape, dtype=site.dtype, device=device), torch.zeros(
        1, dtype=torch.int64, device=device
    )


#: Called with the stage before each compilation and with a CompileRow after it; tools show progress so.
compile_start_listeners: list[Callable[[str], None]] = []
compile_listeners: list[Callable[[CompileRow], None]] = []


class CompiledStep:
    """What Dynamo calls: `begin_step` of each store, the compiled code, `end_step`.

    Python inside `Cache.update` runs only while tracing, so this is where the host side of a step happens. The store is
    found through the pool tensor among the arguments, so plain forward, `generate` and `model.compile` all get here.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        steps: list[tuple[int, int | None, int]],
        sites: list[BufferSite],
        row: CompileRow,
    ) -> None:
        self._compiled = compiled
        self._steps = steps
        self._sites = sites
        self._row = row

    def __call__(self, *args: Any) -> Any:
        if self._sites:
            args = (*args, *self._buffer_scores(args))
        if not self._steps:
            return self._compiled(*args)
        entered = []
        for pool, source, constant in self._steps:
            store = args[pool].alisa_store()
            new_tokens = constant if source is None else int(args[source])
            store.begin_step(new_tokens)
            entered.append((store, new_tokens))
        try:
            out = self._compiled(*args)
        except BaseException:
            for store, _ in entered:
                store.abort_step()
            raise
        for store, new_tokens in entered:
            store.end_step(new_tokens)
            store.statistics.graphs.setdefault(id(self._row), self._row)
        return out

    def _buffer_scores(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        scores: list[torch.Tensor] = []
        for site in self._sites:
            if site.scores_shape is None:
                forget_scores(args[site.buffer])
            else:
                scores.extend(scores_of(args[site.buffer], site.scores_shape, site.dtype))
        return scores


def _compile(
    gm: fx.GraphModule, example_inputs: list[Any], config: AlisaConfig, mode: str | None
) -> Callable[..., Any]:
    if config.inner_compiler != "inductor":
        return compat.compile_eager(gm, example_inputs, through_aot=config.inner_compiler == "aot_eager")
    patches = compat.post_grad_passes_with(_fingerprint())
    return compat.compile_inductor(gm, example_inputs, mode, patches)


@functools.lru_cache(maxsize=1)
def _fingerprint() -> FingerprintPass:
    return FingerprintPass(graph_pass.name for graph_pass in PIPELINE)


def _find_steps(gm: fx.GraphModule) -> list[tuple[int, int | None, int]]:
    """For each store in the graph: (argument index of its pool, index of the argument that is the number of new
    tokens or None, that number if it is a constant)."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    steps: dict[Any, tuple[int, int | None, int]] = {}
    for node in gm.graph.nodes:
        if not is_op(node, torch.ops.alisa.kv_append.default) or node.args[0] in steps:
            continue
        new_tokens = example(node.args[5]).shape[2]
        if not isinstance(new_tokens, torch.SymInt):
            steps[node.args[0]] = (placeholders.index(node.args[0]), None, int(new_tokens))
            continue
        wanted = compat.symbolic_expression(new_tokens)
        sources = [
            place
            for place, candidate in enumerate(placeholders)
            if isinstance(example(candidate), torch.SymInt) and compat.symbolic_expression(example(candidate)) == wanted
        ]
        if not sources:
            raise AlisaError(
                "cannot tell how many tokens a compiled step appends",
                got=f"size {wanted} of {node.name}, which is no input of the graph",
                fix="please report this with the model's class; meanwhile use eager mode",
            )
        steps[node.args[0]] = (placeholders.index(node.args[0]), sources[0], 0)
    return list(steps.values())


def _stage(gm: fx.GraphModule) -> str:
    """What the graph does: decode, prefill, extend, or other (no AlisaCache in it)."""
    by_op = {
        torch.ops.alisa.swa_attention.default: "decode",
        torch.ops.alisa.buffer_attention.default: "decode",
        torch.ops.alisa.prefill_attention.default: "prefill",
        torch.ops.alisa.extend_attention.default: "extend",
    }
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in by_op:
            return by_op[node.target]
        if is_op(node, torch.ops.alisa.kv_read.default):
            return str(node.args[11])
    return "other"
