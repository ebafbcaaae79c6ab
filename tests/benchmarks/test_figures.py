"""Figures: weights that are those of decoding, and rows for everybody; `test_reproducible.py` has the bits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from alisa_compile.config import AlisaConfig
from alisa_compile.tools.emulation import Decoder
from benchmarks.figures import throughput_by_batch
from benchmarks.figures.__main__ import main
from benchmarks.figures.weights import POLICIES, Novel, spearman
from benchmarks.results_file import ResultsFile
from benchmarks.rows import paper


@pytest.mark.parametrize("policy", ["dense", *POLICIES])
def test_weights_are_those_of_decoding(policy: str) -> None:
    """The model makes of them what it makes of an AlisaCache, token by token; each row sums to 1 and looks back."""
    config = AlisaConfig(**({"sparsity": 0.0} if policy == "dense" else {"sparsity": 0.8, **POLICIES[policy]}))
    novel, prompt = Novel(80), 24
    weights, logits = novel.run(prompt, config)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not weights.triu(1).any()
    expected = Decoder(novel.model, "recurrence").predict(novel.ids, prompt, config).loss[0]
    found = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], novel.ids[0, prompt:], reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_kernel_breakdown_runs(tmp_path: Path) -> None:
    """Its numbers differ from run to run; plain torch and the kernel agree first."""
    assert main(["11", "--small", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figure11.png").exists()
    assert main(["13", "--out", str(tmp_path)]) == 2


@pytest.mark.slow
def test_throughput_has_a_row_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is within the budget, who is over it, who cannot run; without results the command is named."""
    path = tmp_path / "bench.json"
    monkeypatch.setattr(throughput_by_batch, "RESULTS", path)
    assert main(["9", "--out", str(tmp_path)]) == 2
    shape = {"prompt": 200, "new": 6, "layers": 4, "hidden": 64, "heads": 4, "batch": 3, "device_share": 0.5}
    about = {"group": "paper", "name": "batch 3", "status": "ok", "definition": "", "host": "", "parameters": shape}
    measured = paper.workload(**shape, inner_compiler="eager").to_dict()
    ResultsFile(path).add("paper: batch 3", {**about, **measured})
    assert main(["9", "--out", str(tmp_path)]) == 0
    found = {row[0]: row[1:] for row in json.loads((tmp_path / "figure09.json").read_text())["rows"]}
    assert all(found[who][0] > 0 for who in ("alisa, 80 %", "alisa, 80 %, int8", "static split (FlexGen)"))
    assert "preempted" in found["blocks (vLLM)"][-1]
    kv = 2 * 64 * 4 * 4 * 3 * 206 / 2**20
    for who in ("alisa, 80 %", "static split (FlexGen)", "blocks (vLLM)"):
        assert 0.4 * kv < found[who][1] <= 0.5 * kv
    assert found["hf dynamic (default)"][1] == pytest.approx(kv, rel=0.01)
    assert "over the device budget" in found["hf dynamic (default)"][-1]
    if not torch.accelerator.is_available():
        assert found["hf offloaded"][0] is None and "GPU" in found["hf offloaded"][-1]


@pytest.mark.slow
def test_phases_have_their_parts(tmp_path: Path) -> None:
    """All three phases, a share of the step for each part, rows that are rebuilt; three panels."""
    assert main(["12", "--small", "--out", str(tmp_path)]) == 0
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"figure12{panel}.{suffix}" for panel in "abc" for suffix in ("json", "md", "png")]
    phases, recomputed, stages = (
        json.loads((tmp_path / f"figure12{panel}.json").read_text())["rows"] for panel in "abc"
    )
    ours = [row for row in phases if row[0] == "alisa, 80%"]
    assert [row[1] for row in ours] == ["phase I", "phase II", "phase III"] or ours[-1][1] == "phase III"
    assert ours[-1][6] > 0  # ms of a step in which rows are rebuilt
    for who in ("alisa, 80%", "static split, dense"):
        assert sum(row[2] for row in phases if row[0] == who) == 59
    for _, _, steps, whole, computing, waiting, rebuilding in phases:
        assert steps > 0 and computing > 0 and whole == pytest.approx(computing + waiting + rebuilding)
    ((_, on, off, ratio, host_on, host_off, rebuilt),) = recomputed
    assert ratio == pytest.approx(off / on) and host_on < host_off and rebuilt > 0
    assert [row[0] for row in stages] == ["static split, dense", "static split, SWA", "+ scheduling", "+ INT8"]
    assert all(row[1] > 0 for row in stages)


def test_rank_correlation() -> None:
    """By hand: ties share the mean of their ranks."""
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.8660254)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.0
