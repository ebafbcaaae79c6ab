"""`alisa plan`: a table that fits, JSON, a plot, and one-line errors; from a config alone."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from alisa_compile.runtime.profile import FOLDER_VARIABLE, MachineProfile, Table
from alisa_compile.tools import cli

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "benchmarks" / "assets" / "novel-7m"
ASK = ["--prompt-length", "900", "--max-new-tokens", "100"]
TIERED = ["--device-kv-budget", "1MiB", "--host-kv-budget", "1GiB", "--policy", "churn"]
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """A file, so that nothing is measured."""
    rates = Table(((1024.0, 1e9),))
    times, products = Table(((1.0, 1e-9), (1e4, 1e-6)), grows=True), Table(((1.0, 1e-7),), grows=True)
    path = tmp_path / "profile.json"
    MachineProfile("test", "cpu", "float32", rates, rates, rates, rates, times, products, 1e-6).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def _no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))


def plan(profile: str, *flags: str, model: Any = MODEL) -> int:
    return cli.main(["plan", "--model", str(model), *ASK, "--profile", profile, *flags])


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(MODEL / "config.json", folder)
    return folder


def test_table(profile: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert plan(profile, *TIERED) == 0
    out, err = capsys.readouterr()
    assert out.startswith("batch 1, prompt 900, 100 new tokens")
    assert re.search(r"^II +0 +99 +\d+ KiB +[\d.]+ MiB +0 B +[\d.]+ ms +position 901", out, re.MULTILINE)
    assert "beta: 0, because recomputing cannot win" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "alisa: planning" in err


@pytest.mark.parametrize("columns", (76, 80, 132))
def test_table_fits(
    columns: int, profile: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three phases too: OPT has hidden states half of K and V."""
    monkeypatch.setenv("COLUMNS", str(columns))
    config = Path(profile).with_name("config.json")
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4, "ffn_dim": 1024, "vocab_size": 500}
    config.write_text(json.dumps({"model_type": "opt", "dtype": "float32", **shape}), encoding="utf-8")
    flags = ["--device-kv-budget", "15700000", "--host-kv-budget", "2.7MB"]
    assert plan(profile, *flags, "--quiet", model=config) == 0
    out, err = capsys.readouterr()
    phases = [line.split()[0] for line in out.splitlines() if re.match(r"I+ ", line)]
    assert phases == ["I", "II", "III"] and err == ""
    assert "form: hidden in all layers: 2048 B of a token's layer input instead of 4096 B" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= columns


def test_json_from_a_config_alone(profile: str, config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same from a folder, from its config.json, and from the whole model."""
    outputs = []
    for model in (config_only, config_only / "config.json", MODEL):
        assert plan(profile, *TIERED, "--json", "--quiet", model=model) == 0
        out, err = capsys.readouterr()
        assert err == ""
        outputs.append(json.loads(out))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0]["p1"] == 0 and outputs[0]["p2"] is None and outputs[0]["budget_bytes"]["device"] == 2**20
    assert len(outputs[0]["step_ms"]) == len(outputs[0]["bytes_by_tier"]["host"]) == 100


def test_flags_reach_the_plan(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*flags: str) -> Any:
        assert plan(profile, *flags, "--json", "--quiet") == 0
        return json.loads(capsys.readouterr().out)

    plain = answer("--device-kv-budget", "1GiB")
    assert plain["p1"] is None
    assert answer("--device-kv-budget", "1GiB", "--batch-size", "3")["position_bytes"] == 3 * plain["position_bytes"]
    # K and V of the saved bfloat16 config in float32 are twice as large, in int8 with float32 scales 36/64 of it.
    assert answer("--device-kv-budget", "1GiB", "--dtype", "float32")["position_bytes"] == 2 * plain["position_bytes"]
    quantised = answer("--device-kv-budget", "1GiB", "--kv-dtype", "int8")
    assert quantised["position_bytes"] * 64 == 36 * plain["position_bytes"]
    assert answer(*TIERED, "--objective", "paper")["total_ms"] > answer(*TIERED)["total_ms"]


@needs_matplotlib
def test_plot(profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "plan.png"
    assert plan(profile, *TIERED, "--plot", str(image), "--quiet") == 0
    assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 10_000
    assert capsys.readouterr().out.startswith("batch 1")


def test_plot_without_matplotlib(
    profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; the table is printed all the same."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    image = tmp_path / "plan.png"
    assert plan(profile, *TIERED, "--plot", str(image)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("batch 1") and not image.exists()
    assert err.count("matplotlib") == 1 and "alisa-compile[plot]" in err


@pytest.mark.parametrize(
    ("flags", "expected"),
    (
        (
            ["--device-kv-budget", "1KiB", "--disk-kv-budget", "1GiB"],
            r"do not fit the KV budgets.*device 1 KiB.*raise device_kv_budget to \d+ bytes.*no context at all fits",
        ),
        (["--device-kv-budget", "much"], "'device_kv_budget' is not a number of bytes; got: 'much'.*'6GiB'"),
        (["--device-kv-bugdet", "1GiB"], "did you mean --device-kv-budget"),
        (["--prompt-length", "0"], "integer >= 1"),
        (["--validate", "3"], "validate"),
        (["--objective", "sum"], "invalid choice: 'sum'"),
        (["--profile", "/no/such/profile.json"], "cannot read the machine profile: No such file"),
        (["--profile", str(MODEL / "config.json")], "this file is no machine profile.*KeyError: 'format'"),
        (["--plot", "/no/such/folder/plan.png"], "no such folder for --plot"),
        (["--plot", "plan.txt"], "no plot can be drawn"),
        (["--device", "abacus"], "cannot use this device; got: abacus"),
        (["--model", "/no/such/model"], "no such model folder; got: /no/such/model"),
        (["--model", str(ROOT / "tests")], "cannot read the config"),
        (["--model", str(ROOT / "README.md")], "cannot read the config"),
    ),
)
def test_error_is_one_line(flags: list[str], expected: str, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(profile, "--host-kv-budget", "0", "--quiet", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("alisa: error: ") and err.count("\n") == 1
    assert re.search(expected, err), err


def test_prompt_length_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(MODEL)]) == 2
    assert "required: --prompt-length" in capsys.readouterr().err
