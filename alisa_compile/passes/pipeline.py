"""The ordered list of passes, and how they run."""

from __future__ import annotations

import dataclasses
import os
import time

import torch
from torch import fx

from .. import compat
from ..config import AlisaConfig
from ..runtime.report import SkipRow
from . import (
    fold_eager_attention,
    fold_repeated_heads,
    fuel,
    record,
    rewrite_attention,
    rewrite_static_buffers,
    save_hidden,
    spec,
)
from .base import GraphPass, PassResult, attention_nodes, is_op
from .rewrite_attention import DECODES, EXTENDS, READS, site_of
from .uuid import source_digest

PIPELINE: tuple[GraphPass, ...] = (
    GraphPass(fold_eager_attention.NAME, fold_eager_attention.run),
    GraphPass("alisa_fold_repeated_heads", fold_repeated_heads.run),
    GraphPass(save_hidden.NAME, save_hidden.run),
    GraphPass("alisa_rewrite_attention", rewrite_attention.run),
    GraphPass("alisa_static_buffers", rewrite_static_buffers.run),
)


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """What all passes did to one graph."""

    passes: tuple[PassResult, ...]

    @property
    def rewritten(self) -> int:
        """Attention nodes that became `alisa::` ops."""
        others = ("_fold_", save_hidden.NAME)
        return sum(result.rewritten for result in self.passes if not any(name in result.name for name in others))

    @property
    def skipped(self) -> tuple[SkipRow, ...]:
        """The skip list: the first reason for each attention."""
        rows: dict[str, SkipRow] = {}
        for result in self.passes:
            for row in result.skipped:
                rows.setdefault(row.node, row)
        return tuple(rows.values())


def identity() -> tuple[str, ...]:
    """What decides how the passes rewrite a graph besides the package's sources: the list itself, and the fuel.

    A pass from outside the package counts with the source of its module.
    """
    limit = fuel.limit()
    passes = (f"{graph_pass.name} {source_digest(graph_pass.run)}" for graph_pass in PIPELINE)
    return *passes, f"fuel {'unlimited' if limit is None else f'{limit} from {fuel.used()}'}"


def run_pipeline(gm: fx.GraphModule, config: AlisaConfig) -> PipelineResult:
    """Run every pass in place. A pass named in TORCHINDUCTOR_DISABLED_PASSES is left out.

    What they did goes to `record.listeners`, also when one of them fails.
    """
    results: list[PassResult] = []
    recorder = record.Recorder(gm) if record.is_wanted() else None
    failed: Exception | None = None
    try:
        return _run_passes(gm, config, results, recorder)
    except Exception as error:
        failed = error
        raise
    finally:
        if recorder is not None:
            finished = recorder.finish(stage_of(gm), PipelineResult(tuple(results)).skipped, failed)
            for listener in record.listeners:
                listener(finished)


def _run_passes(
    gm: fx.GraphModule, config: AlisaConfig, results: list[PassResult], recorder: record.Recorder | None
) -> PipelineResult:
    off: list[str] = []
    check = os.environ.get("ALISA_CHECK") == "1"
    for graph_pass in PIPELINE:
        started = time.perf_counter()
        result = compat.apply_graph_pass(gm, graph_pass.name, lambda m, p=graph_pass: p.run(m, config))  # type: ignore[misc]
        if result is None:
            off.append(graph_pass.name)
            if recorder is not None:
                recorder.passed(graph_pass.name, [], [], 0.0, off=True)
            continue
        result.seconds = time.perf_counter() - started
        results.append(result)
        if recorder is not None:
            recorder.passed(result.name, result.rewrites, result.skipped, result.seconds)
        if check:
            gm.graph.lint()
    if off:
        results.append(_left_by(off, gm, results))
    outcome = PipelineResult(tuple(results))
    if check:
        spec.check(gm, outcome.skipped)
    return outcome


def stage_of(gm: fx.GraphModule) -> str:
    """What a graph does, before or after the passes: decode, prefill, extend, or other (no AlisaCache in it)."""
    by_op = {
        **dict.fromkeys(DECODES, "decode"),
        torch.ops.alisa.buffer_attention.default: "decode",
        torch.ops.alisa.prefill_attention.default: "prefill",
        **dict.fromkeys(EXTENDS, "extend"),
    }
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in by_op:
            return by_op[node.target]
        if is_op(node, *READS):
            return site_of(node).stage
    return "other"


def _left_by(off: list[str], gm: fx.GraphModule, results: list[PassResult]) -> PassResult:
    """A reason for each attention that is dense because passes were switched off."""
    explained = {row.node for result in results for row in result.skipped}
    reason = f"switched off: {', '.join(off)}"
    rows = [SkipRow(node.name, None, reason) for node in attention_nodes(gm) if node.name not in explained]
    return PassResult("switched_off", skipped=rows)
