"""`alisa bisect` finds a planted fault."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

pytest.importorskip("transformers")

from alisa_compile.config import AlisaConfig
from alisa_compile.passes import pipeline
from alisa_compile.passes.base import GraphPass, PassResult, Refusal, insert_call, is_op
from alisa_compile.tools import cli
from alisa_compile.tools.bisect import bisect
from tests.support import NOVEL, novel, passage

DECODE, PREFILL = torch.ops.alisa.swa_attention.default, torch.ops.alisa.prefill_attention.default
WRONG_LAYER = 3


def planted(op: Any) -> GraphPass:
    """A pass that 'rewrites' the output of every layer's attention, and spoils that of layer 3."""

    def scale(gm: fx.GraphModule, node: fx.Node, layer: int) -> None:
        output = next(user for user in node.users if user.args[1] == 0)
        with gm.graph.inserting_after(output):
            scaled = insert_call(gm.graph, torch.mul, (output, 1.5 if layer == WRONG_LAYER else 1.0), output)
        output.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
        result = PassResult("planted_scale")
        attentions = [node for node in gm.graph.nodes if is_op(node, op)]
        for layer, node in enumerate(attentions):
            try:
                with result.rewrite(gm.graph, "scale the output", layer):
                    scale(gm, node, layer)
            except Refusal:
                pass
        gm.recompile()
        return result

    return GraphPass("planted_scale", run)


@pytest.fixture(scope="module")
def model_and_text() -> tuple[Any, torch.Tensor]:
    """The first layers of the embedded model, for each run traces all of them anew."""
    model, tokenizer = novel()
    model.model.layers = model.model.layers[: WRONG_LAYER + 1]
    model.config.num_hidden_layers = WRONG_LAYER + 1
    return model, passage(tokenizer, 24)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def add(graph_pass: GraphPass) -> None:
        monkeypatch.setattr(pipeline, "PIPELINE", (*pipeline.PIPELINE, graph_pass))

    yield add


@pytest.mark.parametrize(
    ("op", "stage"), [(DECODE, "decode"), pytest.param(PREFILL, "prefill", marks=pytest.mark.slow)]
)
def test_it_names_the_pass_the_layer_and_the_graph(
    model_and_text: tuple[Any, torch.Tensor], plant: Any, op: Any, stage: str
) -> None:
    """One of twenty rewrites is wrong."""
    plant(planted(op))
    model, tokens = model_and_text
    lines: list[str] = []
    found = bisect(model, tokens, 4, {"sparsity": 0.0, "inner_compiler": "eager"}, say=lines.append)
    assert found.is_wrong and found.rewrite is not None and found.graph is not None
    assert (found.pass_name, found.rewrite.layer, found.graph.stage) == ("planted_scale", WRONG_LAYER, stage)
    assert Path(found.rewrite.source.file).name == "test_bisect.py"
    assert found.before < 1e-6 < found.after
    assert f"pass planted_scale, rule 'scale the output', layer 3, in the {stage} graph" in str(found)
    assert len(lines) <= 9  # log2 of the number of rewrites, not the number


@pytest.mark.slow
def test_rows_below_the_device(model_and_text: tuple[Any, torch.Tensor], plant: Any) -> None:
    """They are not deleted for it: a run without rewrites could not make them again."""
    plant(planted(torch.ops.alisa.swa_attention.tiered))
    model, tokens = model_and_text
    options = {"sparsity": 0.0, "inner_compiler": "eager", "device_kv_budget": 110_000, "recompute": "always"}
    found = bisect(model, tokens, 4, options)
    assert found.rewrite is not None and found.rewrite.layer == WRONG_LAYER


def test_nothing_is_blamed_where_nothing_is_wrong(model_and_text: tuple[Any, torch.Tensor]) -> None:
    """At sparsity 0 our own passes are exact."""
    model, tokens = model_and_text
    found = bisect(model, tokens, 4, {"sparsity": 0.0, "inner_compiler": "eager"})
    assert not found.is_wrong and found.rewrite is None


@pytest.mark.slow
def test_edits_outside_a_rewrite_are_found_by_pass(model_and_text: tuple[Any, torch.Tensor], plant: Any) -> None:
    """Fuel cannot stop them, so the pass as a whole is switched off."""

    def spoil(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
        for node in gm.graph.nodes:
            if is_op(node, torch.ops.alisa.kv_append.default):
                node.update_arg(5, node.args[6])  # stores V as K
        gm.recompile()
        return PassResult("planted_scale")

    plant(GraphPass("planted_scale", spoil))
    model, tokens = model_and_text
    found = bisect(model, tokens, 4, {"sparsity": 0.0, "inner_compiler": "eager"})
    assert (found.is_wrong, found.pass_name, found.rewrite) == (True, "planted_scale", None)


@pytest.mark.slow
def test_the_command(plant: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All eight layers. Its exit code says whether something is wrong; its last lines show the rewrite."""
    command = ["bisect", "--model", str(NOVEL), "--prompt", "Call me Ishmael.", "--max-new-tokens", "3"]
    command += ["--inner-compiler", "eager"]
    plant(planted(DECODE))
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "wrong: pass planted_scale, rule 'scale the output', layer 3, in the decode graph" in out
    assert "TORCHINDUCTOR_DISABLED_PASSES=planted_scale" in out


def test_sparsity_needs_a_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse run is never exactly dense."""
    command = ["bisect", "--model", str(NOVEL), "--prompt", "Call me Ishmael.", "--sparsity", "0.5"]
    assert cli.main(command) == 2
    assert "--tolerance" in capsys.readouterr().err


def test_a_missing_text_is_an_error_of_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Said before the model is loaded."""
    assert cli.main(["bisect", "--model", str(NOVEL), "--text", str(tmp_path / "none.txt")]) == 2
    assert "cannot read the text" in capsys.readouterr().err
