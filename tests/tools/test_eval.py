"""`alisa eval`, in process: tables, the results file, interruption, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alisa_compile.config import AlisaConfig
from alisa_compile.errors import AlisaError
from alisa_compile.tools import cli
from alisa_compile.tools.accuracy import Row, ratio_interval, summary
from alisa_compile.tools.emulation import Decoder
from alisa_compile.tools.options import read_options
from alisa_compile.tools.results import Results
from tests.support import ASSETS, NOVEL

TEXT = ASSETS / "moby-dick-excerpt.txt"
QUICK = ["--samples", "3", "--sample-tokens", "60", "--prompt-tokens", "20", "--trials", "1"]
QUICK += ["--recall-lengths", "60,80", "--recall-depths", "0,1", "--batch-size", "2"]
TWO = ["--policies", "swa,local", "--sparsities", "0.5,0.8"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first two layers of the embedded model, in float32."""
    folder = str(tmp_path_factory.mktemp("short"))
    config = AutoConfig.from_pretrained(NOVEL, num_hidden_layers=2)
    AutoModelForCausalLM.from_pretrained(NOVEL, config=config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NOVEL).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, AlisaConfig]]]:
    """Prompt length and configuration of every batch that is computed."""
    made: list[tuple[int, AlisaConfig]] = []
    original = Decoder.predict

    def predict(self: Decoder, tokens: torch.Tensor, prompt: int, config: AlisaConfig) -> Any:
        made.append((prompt, config))
        return original(self, tokens, prompt, config)

    monkeypatch.setattr(Decoder, "predict", predict)
    yield made


def evaluate(model: str, *flags: str, text: Path = TEXT) -> int:
    return cli.main(["eval", "--model", model, "--text", str(text), *QUICK, *flags])


def table_rows(out: str) -> list[list[str]]:
    """The cells of the first table's lines."""
    lines = out.split("\n\n")[0].splitlines()
    return [re.split(r"\s{2,}", line.strip()) for line in lines[3:]]


def test_table_and_file(short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_file = tmp_path / "accuracy.json"
    assert evaluate(short, *TWO, "--out", str(out_file)) == 0
    out, err = capsys.readouterr()
    rows = table_rows(out)
    assert [row[:2] for row in rows] == [
        ["dense", "0 %"],
        ["swa", "50 %"],
        ["swa", "80 %"],
        ["local", "50 %"],
        ["local", "80 %"],
    ]
    # Recall is measured at 80 % and in the reference.
    assert [len(row) for row in rows] == [6, 4, 6, 4, 6]
    assert max(len(line) for line in out.split("Measured by")[0].splitlines()) <= 80
    assert "alisa: local 80 %: recall (later)" in err

    content = json.loads(out_file.read_text())
    assert content["command"].startswith("alisa eval --model") and "torch" in content["machine"]
    assert not list(tmp_path.glob("*.partial"))
    # The perplexities printed follow from the losses kept, and those are the model's.
    losses = {
        (cell["settings"]["policy"], cell["settings"]["sparsity"]): cell["result"]["loss"]
        for cell in content["cells"]
        if cell["settings"]["measure"] == "perplexity"
    }
    assert len(losses) == 5 and all(len(loss) == 3 for loss in losses.values())
    for row in rows:
        loss = losses[row[0], float(row[1].removesuffix(" %")) / 100]
        assert row[2] == f"{math.exp(sum(loss) / 3):.2f}"
    assert len({tuple(loss) for loss in losses.values()}) == 5
    model = AutoModelForCausalLM.from_pretrained(short).eval()
    ids = AutoTokenizer.from_pretrained(short)(TEXT.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
    first = ids[:60][None]
    with torch.no_grad():
        logits = model(first).logits[0, 19:-1]
    expected = torch.nn.functional.cross_entropy(logits, first[0, 20:])
    assert losses["dense", 0.0][0] == pytest.approx(float(expected), abs=1e-4)


def test_finished_cells_are_not_measured_again(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[tuple[int, AlisaConfig]]
) -> None:
    out = ["--out", str(tmp_path / "accuracy.json"), "--quiet"]
    assert evaluate(short, *TWO, *out) == 0
    first = capsys.readouterr().out
    count = len(calls)
    moved = tmp_path / "copy"
    shutil.copytree(short, moved)
    assert evaluate(short, *TWO, *out) == 0
    assert capsys.readouterr().out == first
    assert evaluate(str(moved), *TWO, *out) == 0, "the same model at another place"
    assert len(calls) == count > 0

    def measured(*flags: str, text: Path = TEXT, model: str = short) -> set[tuple[str, float]]:
        before = len(calls)
        assert evaluate(model, *TWO, *out, *flags, text=text) == 0
        return {(config.policy, config.sparsity) for _, config in calls[before:]}

    everything = {("dense", 0.0), ("swa", 0.5), ("swa", 0.8), ("local", 0.5), ("local", 0.8)}
    assert measured("--sparsities", "0.5,0.8,0.9") == {("swa", 0.9), ("local", 0.9)}
    assert measured("--window", "16") == {("swa", 0.5), ("swa", 0.8)}, "local has no such parameter"
    assert measured("--window", "16") == set()
    assert measured("--prompt-tokens", "21") == everything
    assert measured("--seed", "1") == {("dense", 0.0), ("swa", 0.8), ("local", 0.8)}, "the seed is of the trials alone"
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text()[5000:])
    assert measured(text=other) == everything
    weights = AutoModelForCausalLM.from_pretrained(short)
    with torch.no_grad():
        weights.model.norm.weight.mul_(1.1)
    weights.save_pretrained(moved)
    assert measured(model=str(moved)) == everything
    assert measured() == set(), "the cells of all those runs are still in the file"


def test_sparsity_0_and_equal_options_are_one_line(
    short: str, capsys: pytest.CaptureFixture[str], calls: list[tuple[int, AlisaConfig]]
) -> None:
    flags = ["--policies", "swa,dense", "--sparsities", "0,0.8", "--variant", "window=8", "--trials", "0", "--quiet"]
    assert evaluate(short, *flags, "--recall-sparsities", "0") == 0
    assert [row[0] for row in table_rows(capsys.readouterr().out)] == ["dense", "swa"]
    assert len(calls) == 2 * 2  # two lines, three windows in batches of two


def test_variants(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--policies",
        "swa",
        "--sparsities",
        "0.8",
        "--variant",
        "window=8,refresh=0",
        "--variant",
        "kv-dtype=int8",
    ]
    assert evaluate(short, *flags, "--samples", "0", "--quiet", "--markdown") == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| swa")]
    assert sum("window=8, refresh=0" in line for line in lines) == 1 + 4  # once, and by two forms and two lengths
    assert sum("kv-dtype=int8" in line for line in lines) == 1 + 4
    assert "perplexity" not in out.lower()


def test_variant_of_one_policy(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant that names its policy and sparsity is one line, whatever else is compared."""
    flags = [*TWO, "--variant", "policy=swa,sparsity=0.9,window=8", "--variant", "policy=dense,kv_dtype=int8"]
    assert evaluate(short, *flags, "--trials", "0", "--quiet", "--markdown") == 0
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in capsys.readouterr().out.splitlines()[2:9]]
    assert lines[5:] == [["swa window=8", "90 %"], ["dense kv_dtype=int8", "0 %"]]


def test_recurrence_gives_the_same_table(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for method in ("emulation", "recurrence"):
        flags = ["--policies", "local", "--sparsities", "0.8", "--trials", "0", "--quiet"]
        assert evaluate(short, *flags, "--method", method) == 0
        tables.append(table_rows(capsys.readouterr().out))
    assert tables[0] == tables[1]


def test_interruption_keeps_what_is_finished(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    assert evaluate(short, *TWO, "--quiet", "--out", str(reference)) == 0
    whole = capsys.readouterr().out
    original, left = Decoder.predict, [13]

    def predict(self: Decoder, *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Decoder, "predict", predict)
    assert evaluate(short, *TWO, "--quiet", "--out", str(resumed)) == 130
    out, err = capsys.readouterr()
    assert err == "\nalisa: interrupted\n"
    assert [row[:2] for row in table_rows(out)] == [["dense", "0 %"], ["swa", "50 %"]]
    finished = json.loads(resumed.read_text())["cells"]
    assert 0 < len(finished) < len(json.loads(reference.read_text())["cells"])
    assert evaluate(short, *TWO, "--quiet", "--out", str(resumed)) == 0
    assert capsys.readouterr().out.split("Measured by")[0] == whole.split("Measured by")[0]
    for mine, theirs in zip(*(json.loads(f.read_text())["cells"] for f in (resumed, reference)), strict=True):
        assert (mine["settings"], mine["result"]) == (theirs["settings"], theirs["result"])


def test_two_runs_may_fill_one_file(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    one, other = Results(path, "machine", "one"), Results(path, "machine", "other")
    one.add({"policy": "swa"}, {"loss": [1.0]}, 1.0)
    other.add({"policy": "local"}, {"loss": [2.0]}, 1.0)
    assert Results(path, "", "").find({"policy": "swa"}) == {"loss": [1.0]}
    assert Results(path, "", "").find({"policy": "local"}) == {"loss": [2.0]}
    assert Results(path, "", "").find({"policy": "h2o"}) is None


def test_plot(short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "accuracy.png"
    assert evaluate(short, *TWO, "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert "matplotlib" not in capsys.readouterr().err


def test_no_matplotlib_is_one_line(
    short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    flags = ["--policies", "local", "--sparsities", "0.8", "--trials", "0"]
    assert evaluate(short, *flags, "--plot", str(tmp_path / "a.png")) == 0
    out, err = capsys.readouterr()
    assert len(table_rows(out)) == 2 and not (tmp_path / "a.png").exists()
    assert err.count("matplotlib is missing") == 1 and "alisa-compile[plot]" in err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--policies", "swa,h3o"], r"'h3o'.*did you mean 'h2o'"),
        (["--sparsities", "0.5,1"], r"'sparsity' is out of range.*1\.0.*\[0, 1\)"),
        (["--sparsities", "half"], "'half'.*numbers"),
        (["--recall-sparsities", "0.3"], r"0\.3.*some of --sparsities"),
        (["--recall-depths", "2"], r"2\.0.*0 \(told first\)"),
        (["--recall-lengths", "0"], "integer >= 1"),
        (["--recall-lengths", "20"], "does not fit the recall test"),
        (["--samples", "0", "--trials", "0"], "nothing to measure"),
        (["--samples", "500"], r"too short; got: 17449 tokens; expected: at least 30000 \(500 windows of 60\)"),
        (["--samples", "2", "--sample-tokens", "5000"], "at most 4096"),
        (["--prompt-tokens", "60"], r"fewer than --sample-tokens \(60\)"),
        (["--text", "/no/such/file"], "No such file"),
        (["--text", str(NOVEL / "model.safetensors")], "cannot read the text"),
        (["--variant", "windw=8"], "did you mean 'window'"),
        (["--variant", "window"], "no value.*NAME=VALUE"),
        (["--variant", "window=few"], "'window'.*'few'.*integer"),
        (["--variant", "paper=1"], "true or false"),
        (["--window", "1"], "'window' is out of range"),
        (["--out", "/no/such/folder/a.json"], "no such folder"),
        (["--out", str(NOVEL / "config.json")], "no results of `alisa eval`"),
        (["--plot", "/no/such/folder/a.png"], "no such folder"),
        (["--plot", "a.doc"], r"\.png"),
        (["--policy", "swa"], "did you mean --policies"),
        (["--model", "/no/such/model"], "no such model folder"),
    ],
)
def test_error_is_one_line(
    flags: list[str],
    expected: str,
    short: str,
    capsys: pytest.CaptureFixture[str],
    calls: list[tuple[int, AlisaConfig]],
) -> None:
    assert evaluate(short, *flags, "--quiet") == 2
    out, err = capsys.readouterr()
    assert out == "" and not calls
    assert err.startswith("alisa: error: ") and err.count("\n") == 1
    assert re.search(expected, err), err


# statistics


def test_ratio_interval() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(4, 1, size=60)  # windows differ far more than the policies do
    difference = rng.normal(0.05, 0.02, size=60)
    ratio, low, high = ratio_interval(list(dense + difference), list(dense))
    assert ratio == pytest.approx(math.exp(difference.mean()))
    # The normal approximation of the same interval.
    half = 1.96 * difference.std() / math.sqrt(60)
    assert low == pytest.approx(math.exp(difference.mean() - half), abs=0.002)
    assert high == pytest.approx(math.exp(difference.mean() + half), abs=0.002)
    assert ratio_interval([1.0, 2.0] * 4, [1.0, 2.0] * 4) == (1, 1, 1)
    ratio, low, high = ratio_interval([2.1] * 7, [2.0] * 7)
    assert ratio == pytest.approx(math.exp(0.1)) and math.isnan(low) and math.isnan(high)
    same = ratio_interval(list(dense + 0.1), list(dense))
    assert same == pytest.approx((math.exp(0.1),) * 3)


def test_rows_may_lack_measures() -> None:
    dense = Row("dense", 0.0, "", [4.0, 5.0], {})
    other = Row("swa", 0.8, "", None, {"prompt": [[{"exact": [1, 0], "digits": [1.0, 0.5]}]]})
    lines = summary([dense, other], dense).splitlines()
    assert lines[-2].split() == ["dense", "0", "%", "90.02", "1"]
    assert lines[-1].split() == ["swa", "80", "%", "0.75", "/", "0.50"]


def test_read_options() -> None:
    read = read_options("window=8, head-mode=per_kv_head,local_fraction=0.75,paper=false,max_rows=none")
    assert read == {
        "window": 8,
        "head_mode": "per_kv_head",
        "local_fraction": 0.75,
        "paper": False,
        "max_rows": None,
    }
    with pytest.raises(AlisaError, match="sinks"):
        read_options("sinks=-1")
