"""Figures: the same bits on a second run, and weights that are those of decoding."""

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


@pytest.mark.parametrize("number", [3, 4, 8, 10])
def test_a_second_run_gives_the_same_files(number: int, tmp_path: Path) -> None:
    """Table, numbers and plot."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert main([str(number), "--small", "--out", str(tmp_path / name)]) == 0
    files = sorted((tmp_path / "first").iterdir())
    assert [file.suffix for file in files] == [".json", ".md", ".png"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


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
    assert main(["12", "--out", str(tmp_path)]) == 2


def test_throughput_is_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By batch, and without results the command that makes them is named."""
    path = tmp_path / "bench.json"
    monkeypatch.setattr(throughput_by_batch, "RESULTS", path)
    assert main(["9", "--out", str(tmp_path)]) == 2
    results = ResultsFile(path)
    for batch, speed in ((16, 300.0), (4, 100.0)):
        measures = [{"who": "alisa", "tokens_per_s": speed}, {"who": "static split, 50 % on device", "tokens_per_s": 9}]
        about = {"group": "paper", "name": f"batch {batch}", "status": "ok", "definition": "", "host": ""}
        parameters = {"batch": batch, "layers": 1, "hidden": 64, "prompt": 16, "new": 8}
        results.add(f"paper: batch {batch}", {**about, "parameters": parameters, "measures": measures})
    assert main(["9", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "figure09.json").read_text())["rows"]
    assert rows == [["alisa", 100.0, 300.0], ["static split, 50 % on device", 9, 9]]


def test_rank_correlation() -> None:
    """By hand: ties share the mean of their ranks."""
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(0.8660254)
    assert spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.0
