"""The checker of legal graphs reports each broken rule; the pipeline runs and leaves out passes as it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import fx

from alisa_compile import AlisaConfig
from alisa_compile.errors import GraphError
from alisa_compile.passes import spec
from alisa_compile.passes.base import attention_nodes
from alisa_compile.passes.pipeline import PIPELINE, run_pipeline
from alisa_compile.runtime.report import SkipRow
from tests.passes.graphs import captures, ops
from tests.support import assert_same_tokens, compiled, left_padded, tiny_model

SPEC = "local=1/10,dynamic=1/10,rank=decay,window=8,sinks=4,refresh=32,max_rows=0"


class Builder:
    """A graph of alisa ops by hand, one call a line."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        names = (
            "pool", "table", "length", "valid", "scores", "rows", "counts", "origin", "query", "key", "value", "ticket",
        )  # fmt: skip
        self.inputs = {name: self._placeholder(name) for name in names}
        self.other = self._placeholder("length_of_the_other_store")

    def _placeholder(self, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = torch.empty(1)
        return node

    def _call(self, op: Any, args: tuple[Any, ...], returns: bool = True) -> fx.Node:
        node = self.graph.call_function(op, args)
        if returns:
            node.meta["example_value"] = torch.empty(1)
        return node

    def append(self, layer: int, length: fx.Node | None = None) -> None:
        """kv_append."""
        i = self.inputs
        store = (i["pool"], None, i["table"], length or i["length"], i["valid"])
        self._call(ops.kv_append.default, (*store, i["key"], i["value"], None, None, None, layer), returns=False)

    def attend(self, layer: int, length: fx.Node | None = None) -> fx.Node:
        """swa_attention; returns its mass."""
        i = self.inputs
        store = (i["pool"], None, i["table"], length or i["length"], None, i["rows"], i["counts"])
        both = self._call(ops.swa_attention.default, (i["query"], *store, layer, 0.5))
        return self._call(getitem, (both, 1))

    def select(self, layer: int, mass: fx.Node, length: fx.Node | None = None) -> None:
        """kv_select."""
        i = self.inputs
        state = (i["scores"], i["rows"], i["counts"], mass, length or i["length"], i["origin"], None)
        self._call(ops.kv_select.default, (*state, layer, SPEC), returns=False)

    def wait(self, layer: int) -> None:
        """kv_wait."""
        i = self.inputs
        self._call(ops.kv_wait.default, (i["pool"], i["ticket"], i["key"], layer), returns=False)

    def offload(self, layer: int) -> None:
        """kv_offload."""
        i = self.inputs
        rows = (i["pool"], None, i["table"], i["length"])
        self._call(ops.kv_offload.default, (*rows, i["ticket"], layer, SPEC), returns=False)

    def prefetch(self, layer: int) -> None:
        """kv_prefetch."""
        i = self.inputs
        rows = (i["pool"], None, i["table"], i["length"], i["rows"], i["counts"])
        self._call(ops.kv_prefetch.default, (*rows, i["ticket"], layer), returns=False)

    def read(self, layer: int) -> tuple[fx.Node, fx.Node]:
        """kv_read; returns K and V."""
        i = self.inputs
        store = (i["pool"], None, i["table"], i["length"], i["valid"], None, None, None, None, i["key"], i["value"])
        both = self._call(ops.kv_read.default, (*store, layer, "decode", "", False))
        return self._call(getitem, (both, 0)), self._call(getitem, (both, 1))

    def dense(self, key: fx.Node, value: fx.Node) -> fx.Node:
        """scaled_dot_product_attention."""
        return self._call(torch.nn.functional.scaled_dot_product_attention, (self.inputs["query"], key, value))

    def module(self) -> fx.GraphModule:
        """The finished graph; every value without users stays, as the checker looks at all of them."""
        self.graph.output(())
        return fx.GraphModule({}, self.graph)


def _layers(b: Builder, *, sparse: bool = True, length: fx.Node | None = None) -> None:
    for layer in range(2):
        b.append(layer, length)
        mass = b.attend(layer, length)
        if sparse:
            b.select(layer, mass, length)


def _tiered(b: Builder, order: str = "wait append attend select offload prefetch") -> None:
    """Two layers over a store with tiers; `order` is that of the last layer."""
    for layer, steps in enumerate(("wait append attend select offload prefetch", order)):
        mass = None
        for step in steps.split():
            if step == "attend":
                mass = b.attend(layer)
            elif step == "select":
                assert mass is not None
                b.select(layer, mass)
            else:
                getattr(b, step)(layer)


_BAD_ORDERS = {
    "append wait attend select offload prefetch": "out of order",
    "wait append offload attend select prefetch": "out of order",
    "wait append attend select prefetch offload": "out of order",
    "wait append attend offload prefetch select": "out of order",
    "wait append attend select prefetch": "does not come once",
    "wait append attend select offload": "does not come once",
    "append attend select offload prefetch": "does not come once",
    "wait append attend select offload prefetch prefetch": "does not come once",
    "wait wait append attend select offload prefetch": "more than once",
}


@pytest.mark.parametrize("order", _BAD_ORDERS)
def test_movement_out_of_order_is_reported(order: str) -> None:
    """A store with tiers: wait, append, attention, selection, offload, prefetch, each once."""
    legal = Builder()
    _tiered(legal)
    spec.check(legal.module(), ())
    b = Builder()
    _tiered(b, order)
    with pytest.raises(GraphError, match=_BAD_ORDERS[order]):
        spec.check(b.module(), ())


def test_legal_graphs_pass() -> None:
    """Sparse and dense decode; two stores whose layers have the same numbers; a skipped layer that stays dense."""
    for sparse in (False, True):
        b = Builder()
        _layers(b, sparse=sparse)
        spec.check(b.module(), ())
    b = Builder()
    _layers(b)
    _layers(b, length=b.other)
    spec.check(b.module(), ())
    b = Builder()
    b.append(0)
    row = SkipRow(b.dense(*b.read(0)).name, 0, "a reason")
    spec.check(b.module(), (row,))


def _no_value(b: Builder) -> None:
    b.append(0)
    b.attend(0).args[0].meta.clear()


def _no_append(b: Builder) -> None:
    b.attend(0)


def _append_too_late(b: Builder) -> None:
    b.attend(0)
    b.append(0)


def _append_of_the_other_store(b: Builder) -> None:
    b.append(0, b.other)
    b.attend(0)


def _appended_twice(b: Builder) -> None:
    b.append(0)
    b.append(0)
    b.attend(0)


def _dense_without_reason(b: Builder) -> None:
    b.append(0)
    b.dense(*b.read(0))


def _read_without_skip(b: Builder) -> None:
    b.append(0)
    b._call(torch.neg, (b.read(0)[0],))


def _one_selection_missing(b: Builder) -> None:
    _layers(b)
    b.append(2)
    b.attend(2)


def _selection_of_another_layer(b: Builder) -> None:
    for layer in range(2):
        b.append(layer)
    masses = [b.attend(layer) for layer in range(2)]
    for layer in range(2):
        b.select(layer, masses[1 - layer])


def _selection_of_another_store(b: Builder) -> None:
    b.append(0)
    b.append(0, b.other)
    b.select(0, b.attend(0), b.other)


def _selection_from_nothing(b: Builder) -> None:
    b.append(0)
    b.attend(0)
    b.select(0, b.inputs["scores"])


def _selection_before_append(b: Builder) -> None:
    b.append(0)
    b.select(1, b.attend(0))


BROKEN: tuple[tuple[Callable[[Builder], None], str], ...] = (
    (_no_value, "has no recorded value"),
    (_no_append, "reads layer 0 before its append"),
    (_append_too_late, "reads layer 0 before its append"),
    (_append_of_the_other_store, "reads layer 0 before its append"),
    (_appended_twice, "appended to 2 times"),
    (_dense_without_reason, "is dense without a reason"),
    (_read_without_skip, "is used although no attention was skipped"),
    (_one_selection_missing, "not every attention is followed by its selection"),
    (_selection_of_another_layer, "attention mass of another layer"),
    (_selection_of_another_store, "attention mass of another layer"),
    (_selection_from_nothing, "does not take the attention mass"),
    (_selection_before_append, "reads layer 1 before its append"),
)


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_broken_rules_are_reported(broken: Callable[[Builder], None], message: str) -> None:
    """Each rule of `spec.check`, violated by the smallest graph that does."""
    builder = Builder()
    broken(builder)
    with pytest.raises(GraphError, match=message):
        spec.check(builder.module(), ())


# The pipeline


def test_names_do_not_contain_each_other() -> None:
    """torch's off switch matches by substring: switching one pass off must not switch another off."""
    names = [graph_pass.name for graph_pass in PIPELINE]
    assert not any(a != b and a in b for a in names for b in names)
    assert len(set(names)) == len(names)


def test_the_checker_runs_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALISA_CHECK=1 runs the checker after the passes; without it an illegal graph goes through."""
    monkeypatch.delenv("ALISA_CHECK", raising=False)
    for switch in (False, True):
        builder = Builder()
        builder.append(0)  # writes, so it stays although nothing reads it
        builder.append(0)
        if switch:
            monkeypatch.setenv("ALISA_CHECK", "1")
            with pytest.raises(GraphError, match="appended to 2 times"):
                run_pipeline(builder.module(), AlisaConfig())
        else:
            run_pipeline(builder.module(), AlisaConfig())


@pytest.mark.parametrize(
    ("off", "batch_size"),
    (("alisa_rewrite_attention", 1), ("alisa_rewrite_attention", 3), ("alisa_fold_repeated_heads", 3)),
)
def test_without_a_pass_the_graph_is_still_right(off: str, batch_size: int) -> None:
    """A pass that is switched off leaves attention dense with that reason, and tokens equal to stock's."""
    model = tiny_model("llama")
    ids, mask = left_padded(batch_size, 14)
    with inductor_config.patch(disabled_passes=off), captures() as found:
        assert_same_tokens(model, compiled(model, sparsity=0.0), ids, mask, 48)
    assert [capture.stage for capture in found] == ["prefill", "decode"]
    for capture in found:
        assert off not in [result.name for result in capture.outcome.passes]
        dense = attention_nodes(capture.after)
        assert capture.outcome.rewritten == 0 and len(dense) == 2
        assert [row.node for row in capture.outcome.skipped] == [node.name for node in dense]
        assert all(row.reason for row in capture.outcome.skipped)


def test_the_environment_variable_is_torchs() -> None:
    """TORCHINDUCTOR_DISABLED_PASSES is what fills `disabled_passes`, in this version of torch too."""
    script = "import torch._inductor.config as c; print(c.disabled_passes)"
    environment = {**os.environ, "TORCHINDUCTOR_DISABLED_PASSES": "ALISA_rewrite_attention"}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "ALISA_rewrite_attention" in out.stdout
