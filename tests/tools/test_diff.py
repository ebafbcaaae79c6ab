"""`alisa_compile.diff` and `alisa diff`: text, JSON, DOT and advice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

import alisa_compile
from alisa_compile.errors import AlisaError
from alisa_compile.passes.record import GraphRecord
from alisa_compile.tools import cli
from tests.passes.graphs import dynamo_graph
from tests.support import NOVEL
from tests.tools import recorded

LAYERS = 8


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphRecord]:
    """Of the embedded model with rows on the host, by stage."""
    return recorded.graphs()


def test_all_rewrites_of_a_decode_graph_are_listed(graphs: dict[str, GraphRecord]) -> None:
    """One line of the table for each layer, with what it became."""
    text = alisa_compile.diff(graphs["decode"]).text(whole_graph=False)
    rows = re.findall(
        r"^ +\d+ +rewrite_attention +(\d+) +scaled_dot_product_attention +(.*(?:\n {60,}.*)?)", text, re.M
    )
    assert [int(layer) for layer, _ in rows] == list(range(LAYERS))
    for _, became in rows:
        ops = re.split(r",\s+", became.strip())
        assert ops == ["kv_wait", "swa_attention", "kv_select", "kv_offload", "kv_prefetch"]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_one_layer_fits_a_screen(graphs: dict[str, GraphRecord], stage: str) -> None:
    """40 lines of 100 columns, and nothing of it is about another layer."""
    found = alisa_compile.diff(graphs[stage], layer=3)
    lines = found.text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert re.search(r"^- attn_output_15 = scaled_dot_product_attention\(.* float32\[1, 8, ", text, re.M)
    assert re.search(r"^~ attn_output_15: key_3 -> keys_3, value_3 -> values_3, \+ enable_gqa=True$", text, re.M)
    assert re.search(r"^\+ kv_prefetch_default_3 = ", text, re.M)
    assert re.search(r"^- keys_3 = getitem\(kv_read_tiered_3, 0\) .* KiB$", text, re.M)
    assert re.search(r"modeling_llama.py:\d+  attn_output, attn_weights = attention_interface", text)
    assert re.search(r"\(rewrite_attention.py:\d+\)$", text, re.M)
    assert {change.node.layer for change in found.changes} == {3}


def test_the_whole_graph_is_a_unified_diff(graphs: dict[str, GraphRecord], tmp_path: Path) -> None:
    """Which turns the one text into the other: checked by `patch`, which knows nothing of us."""
    if shutil.which("patch") is None:
        pytest.skip("there is no `patch` on this machine")
    decode = graphs["decode"]
    text = alisa_compile.diff(decode).text()
    (tmp_path / "graph.txt").write_text(decode.before.text())
    (tmp_path / "graph.diff").write_text(text[text.index("--- ") :])
    subprocess.run(["patch", "--quiet", "graph.txt", "graph.diff"], cwd=tmp_path, check=True)
    assert (tmp_path / "graph.txt").read_text() == decode.after.text()


def test_changes_are_the_difference_of_the_two_graphs(graphs: dict[str, GraphRecord]) -> None:
    """Applied to the nodes before, they give the nodes after."""
    for graph in graphs.values():
        found = alisa_compile.diff(graph)
        lines = {node.name: node.line for node in graph.before.nodes}
        for change in found.changes:
            if change.kind == "removed":
                assert lines.pop(change.node.name) == change.node.line
            else:
                assert (change.node.name in lines) == (change.kind == "changed")
                lines[change.node.name] = change.node.line
        assert lines == {node.name: node.line for node in graph.after.nodes}
        assert {change.pass_name for change in found.changes} <= {each.name for each in graph.passes}


def test_one_pass(graphs: dict[str, GraphRecord]) -> None:
    """The states before and after it; its short name does as well; a wrong one offers the nearest."""
    found = alisa_compile.diff(graphs["decode"], pass_name="fold_repeated_heads")
    assert [change.kind for change in found.changes] == ["changed"] * LAYERS
    with pytest.raises(AlisaError, match="did you mean alisa_rewrite_attention"):
        alisa_compile.diff(graphs["decode"], pass_name="rewrite_atention")
    with pytest.raises(AlisaError, match="0 to 7"):
        alisa_compile.diff(graphs["decode"], layer=8)


def test_two_stages_of_a_record(graphs: dict[str, GraphRecord]) -> None:
    """Any two."""
    passes = graphs["decode"].passes
    assert alisa_compile.diff(passes[0].after, passes[-1].after).changes
    assert not alisa_compile.diff(passes[-1].after, passes[-1].after).changes


class Block(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        if self.twice:
            x = F.relu(x + 1)
        return F.relu(self.second(x))


def test_two_graphs_with_one_node_more_differ_in_it_alone() -> None:
    """Dynamo would number the nodes behind it anew; the diff is of what they compute."""
    with torch.no_grad():
        graphs = [dynamo_graph(Block(twice), torch.randn(2, 4)) for twice in (False, True)]
    found = alisa_compile.diff(*graphs)
    kinds = [(change.kind, change.node.target) for change in found.changes]
    assert sorted(kinds)[:2] == [("added", "add"), ("added", "relu")]
    assert all(kind == "changed" for kind, _ in sorted(kinds)[2:]) and len(kinds) <= 3
    assert not alisa_compile.diff(graphs[1], graphs[1]).changes


def test_what_is_no_graph_is_refused(graphs: dict[str, GraphRecord]) -> None:
    """With what would do."""
    anything: Any = 3
    with pytest.raises(AlisaError, match="this is no graph"):
        alisa_compile.diff(anything, anything)
    with pytest.raises(AlisaError, match="both sides"):
        alisa_compile.diff(graphs["decode"], graphs["decode"].after)


def test_colour_changes_no_text(graphs: dict[str, GraphRecord]) -> None:
    """Without the escape codes a terminal gets what a file gets."""
    found = alisa_compile.diff(graphs["decode"], layer=0)
    painted = found.text(color=True)
    assert "\x1b[31m- " in painted and "\x1b[32m+ " in painted
    assert re.sub(r"\x1b\[\d+m", "", painted) == found.text()


def test_dot_is_a_graph(graphs: dict[str, GraphRecord]) -> None:
    """Every change of the layer is a node in its colour, joined to its inputs; Graphviz reads it where it is."""
    found = alisa_compile.diff(graphs["decode"], layer=2)
    dot = found.to_dot()
    assert dot.startswith("digraph ") and dot.count("{") - dot.count("}") == 0
    for change in found.changes:
        color = {"removed": "#c62828", "added": "#2e7d32", "changed": "#b26a00"}[change.kind]
        assert re.search(rf'^ +"{change.node.name}" \[label=.*, color="{color}"', dot, re.M)
    assert '"swa_attention_tiered_2" -> ' in dot
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot, text=True, check=True, capture_output=True)


def run(*flags: str) -> int:
    return cli.main(["diff", "--model", str(NOVEL), "--quiet", *flags])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All files of one call, and the JSON of one layer."""
    assert run("--json", "--html", str(tmp_path / "a.html"), "--dot", str(tmp_path / "a.dot"), "--layer", "1") == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in data["rewrites"]] == [1, 1]
    assert data["rewrites"][1]["source"]["file"] == "alisa_compile/passes/rewrite_attention.py"
    assert data["skipped"] == []
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "a.dot").read_text().startswith("digraph")


@pytest.mark.slow
def test_the_command_explains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left as it is, why, and what to do; no colour where nobody sees it."""
    monkeypatch.setenv("ALISA_FUEL", "0")
    assert run("--explain", "--stage", "prefill") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "out of fuel" in out and "unset ALISA_FUEL" in out


def test_a_wrong_folder_is_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is loaded."""
    assert run("--html", "/no/such/folder/a.html") == 2
    assert "there is no such folder" in capsys.readouterr().err
