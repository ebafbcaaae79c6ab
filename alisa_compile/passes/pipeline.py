"""The ordered list of passes, and how they run."""

from __future__ import annotations

import dataclasses
import os
import time

from torch import fx

from .. import compat
from ..config import AlisaConfig
from ..runtime.report import SkipRow
from . import fold_eager_attention, fold_repeated_heads, rewrite_attention, rewrite_static_buffers, spec
from .base import GraphPass, PassResult, attention_nodes

PIPELINE: tuple[GraphPass, ...] = (
    GraphPass(fold_eager_attention.NAME, fold_eager_attention.run),
    GraphPass("alisa_fold_repeated_heads", fold_repeated_heads.run),
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
        return sum(result.rewritten for result in self.passes if "_fold_" not in result.name)

    @property
    def skipped(self) -> tuple[SkipRow, ...]:
        """The skip list."""
        return tuple(row for result in self.passes for row in result.skipped)


def run_pipeline(gm: fx.GraphModule, config: AlisaConfig) -> PipelineResult:
    """Run every pass in place. A pass named in TORCHINDUCTOR_DISABLED_PASSES is left out."""
    results: list[PassResult] = []
    off: list[str] = []
    check = os.environ.get("ALISA_CHECK") == "1"
    for graph_pass in PIPELINE:
        started = time.perf_counter()
        result = compat.apply_graph_pass(gm, graph_pass.name, lambda m, p=graph_pass: p.run(m, config))  # type: ignore[misc]
        if result is None:
            off.append(graph_pass.name)
            continue
        result.seconds = time.perf_counter() - started
        results.append(result)
        if check:
            gm.graph.lint()
    if off:
        results.append(_left_by(off, gm, results))
    outcome = PipelineResult(tuple(results))
    if check:
        spec.check(gm, outcome.skipped)
    return outcome


def _left_by(off: list[str], gm: fx.GraphModule, results: list[PassResult]) -> PassResult:
    """A reason for each attention that is dense because passes were switched off."""
    explained = {row.node for result in results for row in result.skipped}
    reason = f"switched off: {', '.join(off)}"
    rows = [SkipRow(node.name, None, reason) for node in attention_nodes(gm) if node.name not in explained]
    return PassResult("switched_off", skipped=rows)
