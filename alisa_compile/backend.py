"""The backend function: options -> passes -> Inductor -> the step wrapper.

Registered through the `torch_dynamo_backends` entry point alone; a decorator would register the name twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import channels, compat
from .config import AlisaConfig
from .errors import AlisaError
from .passes import pipeline, rewrite_static_buffers
from .passes.base import example, is_op
from .passes.kv_producer import Maker, compile_producers
from .passes.pipeline import run_pipeline, stage_of
from .passes.rewrite_attention import APPENDS, DECODES
from .passes.rewrite_static_buffers import BufferSite
from .passes.save_hidden import producer_cuts
from .passes.uuid import FingerprintPass
from .runtime.buffers import forget_scores, new_scores, scores_of
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
    with channels.published(gm, stage_of(gm), mode, options) as folder:
        return _compile_graph(gm, example_inputs, config, mode, folder)


def _compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], config: AlisaConfig, mode: str | None, folder: Path | None
) -> CompiledStep:
    started = time.perf_counter()
    gm = compat.copy_graph(gm)
    outcome = run_pipeline(gm, config)
    steps = _find_steps(gm, config)
    stage = stage_of(gm)
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
        if skip.layer is not None:
            _warn_once(f"attention over an AlisaCache stays dense: {skip.reason}")
    detached = bool(steps) and _wants_gradients(example_inputs)
    if detached:
        _warn_once(
            "gradients cannot flow through an AlisaCache, so what this compiled model returns has none; "
            "call it under torch.no_grad()"
        )
        _keep_gradients_off(gm)
    sites = rewrite_static_buffers.sites(gm)
    extra = [
        tensor
        for site in sites
        if site.scores_shape is not None
        for tensor in new_scores(site.scores_shape, site.dtype, example_inputs[site.buffer].device)
    ]
    with torch.no_grad() if detached else contextlib.nullcontext():
        compiled = _compile(gm, [*example_inputs, *extra], config, mode)
    if detached:
        compiled = torch.no_grad()(compiled)
    seconds = time.perf_counter() - started
    logger.info("compiled the %s graph in %.1f s", stage, seconds)
    row = CompileRow(stage, outcome.rewritten, outcome.skipped, seconds)
    for listener in compile_listeners:
        listener(row)
    return CompiledStep(compiled, steps, sites, row, folder)


def _wants_gradients(example_inputs: list[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )


def _keep_gradients_off(gm: fx.GraphModule) -> None:
    """Remove the model's own switches, such as a no_grad around its rotary embedding, which turn them on at its end."""
    for node in list(gm.graph.nodes):
        if node.target is compat.GRAD_MODE_SWITCH:
            gm.graph.erase_node(node)
    gm.recompile()


@functools.lru_cache(maxsize=256)
def _warn_once(text: str) -> None:
    logger.warning(text)


#: Called with the stage before each compilation and with a CompileRow after it; tools show progress so.
compile_start_listeners: list[Callable[[str], None]] = []
compile_listeners: list[Callable[[CompileRow], None]] = []


@dataclasses.dataclass(frozen=True)
class StepSite:
    """A store that a graph appends to.

    pool: argument index of its pool. layers: the layers appended to; Dynamo may have broken a forward pass into several
    graphs, and a step begins with the first layer and ends with the last. source: where the number of new tokens is
    among the arguments, as (index, None) or (index, dimension); None = it is `constant`. sparse_layers: layers that
    attend to their working set; the others stay dense. makers: by layer, what makes K and V again, of a store that
    deletes rows.
    """

    pool: int
    layers: frozenset[int]
    source: tuple[int, int | None] | None
    constant: int
    sparse_layers: int
    makers: Mapping[int, Maker] = dataclasses.field(default_factory=dict)

    def new_tokens(self, args: tuple[Any, ...]) -> int:
        """Tokens that this call appends."""
        if self.source is None:
            return self.constant
        index, dim = self.source
        return int(args[index] if dim is None else args[index].shape[dim])


class CompiledStep:
    """What Dynamo calls: `begin_step` of each store, the compiled code, `end_step`.

    Python inside `Cache.update` runs only while tracing, so this is where the host side of a step happens. The store is
    found through the pool tensor among the arguments, so plain forward, `generate` and `model.compile` all get here.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        steps: list[StepSite],
        sites: list[BufferSite],
        row: CompileRow,
        folder: Path | None,
    ) -> None:
        self._compiled = compiled
        self._steps = steps
        self._sites = sites
        self._row = row
        self._folder = folder
        self._is_new = True

    def __call__(self, *args: Any) -> Any:
        if self._sites:
            args = (*args, *self._buffer_scores(args))
        if not self._steps:
            return self._compiled(*args)
        entered = []
        for step in self._steps:
            store, new_tokens = args[step.pool].alisa_store(), step.new_tokens(args)
            if 0 in step.layers:
                store.begin_step(new_tokens)
            store.note_sparse_layers(step.sparse_layers)
            if step.makers and (new_tokens > 1 or store.lacks_producers):
                store.bind_producers({layer: make(args) for layer, make in step.makers.items()})
            entered.append((store, new_tokens, store.last_layer in step.layers))
        try:
            out = self._compiled(*args)
        except BaseException as error:
            for store, _, _ in entered:
                store.abort_step()
            lost = next((store.broken for store, _, _ in entered if store.broken is not None), None)
            if lost is not None and isinstance(error, Exception):
                raise lost from error
            raise
        for store, new_tokens, ends in entered:
            if ends:
                store.end_step(new_tokens)
            store.statistics.graphs.setdefault(id(self._row), self._row)
        if self._is_new:
            self._is_new = False
            channels.publish_plan([store.statistics.forecast for store, _, _ in entered], self._folder)
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
    patches = compat.post_grad_passes_with(_fingerprint(pipeline.identity()))
    return compat.compile_inductor(gm, example_inputs, mode, patches)


@functools.lru_cache(maxsize=64)
def _fingerprint(passes: tuple[str, ...]) -> FingerprintPass:
    return FingerprintPass(passes)


def _find_steps(gm: fx.GraphModule, config: AlisaConfig) -> list[StepSite]:
    """One site for each store that the graph appends to."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    appends: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_op(node, *APPENDS):
            appends.setdefault(node.all_input_nodes[0], []).append(node)
    sites = []
    for pool, nodes in appends.items():
        new_tokens = example(nodes[0].args[5]).shape[2]
        layers = frozenset(int(str(node.args[10])) for node in nodes)
        source = None if isinstance(new_tokens, int) else _input_of_size(placeholders, new_tokens, nodes[0])
        constant = new_tokens if isinstance(new_tokens, int) else 0
        sparse = sum(
            is_op(node, *DECODES) and node.args[1] is pool and node.args[6] is not None for node in gm.graph.nodes
        )
        makers = compile_producers(producer_cuts(gm).get(pool, {}), config.inner_compiler)
        sites.append(StepSite(placeholders.index(pool), layers, source, constant, sparse, makers))
    return sites


def _input_of_size(placeholders: list[fx.Node], size: torch.SymInt, append: fx.Node) -> tuple[int, int | None]:
    """Which argument holds a symbolic size: (its index, None) for an integer, (its index, dimension) for a tensor."""
    wanted = compat.symbolic_expression(size)
    for place, candidate in enumerate(placeholders):
        value = example(candidate)
        if isinstance(value, torch.SymInt) and compat.symbolic_expression(value) == wanted:
            return place, None
        if isinstance(value, torch.Tensor):
            for dim, length in enumerate(value.shape):
                if compat.symbolic_expression(length) == wanted:
                    return place, dim
    raise AlisaError(
        "cannot tell how many tokens a compiled step appends",
        got=f"size {wanted} of {append.name}, which is no input of the graph",
        fix="please report this with the model's class; meanwhile use eager mode",
    )
