"""The graphs of a store that deletes rows, and the rules that they have to keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from alisa_compile import compat
from alisa_compile.errors import GraphError
from alisa_compile.passes import spec
from tests.hf.test_recompute import LAYERS, budgets_of, model_of, run
from tests.passes.graphs import Capture, captures

ops = torch.ops.alisa
CHAIN = (
    ops.hidden_append.default,
    ops.kv_wait.default,
    ops.kv_append.default,
    ops.swa_attention.recomputing,
    ops.kv_select.default,
    ops.kv_offload.recomputing,
    ops.kv_prefetch.default,
    ops.kv_recompute.default,
)


@pytest.fixture(scope="module")
def graphs() -> list[Capture]:
    """The graphs of a Llama, the prefill's and the decode steps'."""
    model = model_of("llama")
    torch._dynamo.reset()
    with captures() as found:
        run(model, device_kv_budget=budgets_of(model)["device_kv_budget"], recompute="always")
    return found


def decode_of(graphs: list[Capture]) -> Capture:
    """The graph of a decode step."""
    (found,) = (capture for capture in graphs if capture.calls(ops.swa_attention.recomputing))
    return found


def test_every_layer(graphs: list[Capture]) -> None:
    """In order, once a layer: what was fetched in the step before is waited for, and rows are rebuilt meanwhile."""
    decode = decode_of(graphs).after
    calls = [n.target for n in decode.graph.nodes if str(n.target).startswith("alisa.")]
    assert calls == list(CHAIN) * LAYERS
    (prefill,) = (capture for capture in graphs if capture.calls(ops.prefill_attention.default))
    assert len(prefill.calls(ops.hidden_append.default)) == len(prefill.calls(ops.kv_recompute.default)) == LAYERS


def _remove(target: object) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        gm.graph.erase_node(next(n for n in gm.graph.nodes if n.target is target))

    return change


def _move_to_the_end(target: object) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        node = next(n for n in gm.graph.nodes if n.target is target)
        next(n for n in gm.graph.nodes if n.op == "output").prepend(node)

    return change


def _offload_unchecked(gm: fx.GraphModule) -> None:
    next(n for n in gm.graph.nodes if n.target is ops.kv_offload.recomputing).target = ops.kv_offload.default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove(ops.hidden_append.default), "whose inputs are not saved"),
        (_move_to_the_end(ops.hidden_append.default), "does not come once before an append"),
        (_remove(ops.kv_recompute.default), "does not come once for each layer"),
        (_move_to_the_end(ops.kv_prefetch.default), "rebuilt before others are fetched"),
        (_remove(ops.kv_wait.default), "does not come once for each layer that waits"),
        (_offload_unchecked, "without comparing the first"),
    ],
    ids=["nothing saved", "saved too late", "never rebuilt", "fetched too late", "never waits", "never compared"],
)
def test_broken_graphs(change: Callable[[fx.GraphModule], None], message: str, graphs: list[Capture]) -> None:
    """Each rule notices the graph that breaks it."""
    decode = decode_of(graphs)
    spec.check(decode.after, decode.outcome.skipped)
    broken = compat.copy_graph(decode.after)
    change(broken)
    with pytest.raises(GraphError, match=message):
        spec.check(broken, decode.outcome.skipped)
