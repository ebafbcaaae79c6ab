"""The command line, in process, with the embedded model."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alisa_compile import backend
from alisa_compile.errors import AlisaError
from alisa_compile.runtime.report import CompileRow
from alisa_compile.tools import cli, demo
from alisa_compile.tools.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "benchmarks" / "assets" / "novel-7m"
PROMPT = "Call me Ishmael. Some years ago--never mind how long precisely--"
ON_MODEL = ["generate", "--model", str(MODEL)]
FAST = ["--inner-compiler", "aot_eager"]
DENSE = ["--max-new-tokens", "16", "--sparsity", "0", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No compiled code of another test, and no second thread to wait for: the model is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first two layers of the embedded model: compiled in a second, for tests that read no text."""
    folder = str(tmp_path_factory.mktemp("short"))
    config = AutoConfig.from_pretrained(MODEL, num_hidden_layers=2)
    AutoModelForCausalLM.from_pretrained(MODEL, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def generate(*flags: str, model: str = str(MODEL)) -> int:
    return cli.main(["generate", "--model", model, *FAST, *flags])


def stock(model_path: str) -> str:
    """16 greedy tokens of stock transformers in float32."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Screen:
    """One terminal behind stdout and stderr, which remembers who wrote what in which order."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, str]] = []

    def stream(self, name: str, terminal: bool = True) -> io.StringIO:
        writes = self.writes

        class Stream(io.StringIO):
            def isatty(self) -> bool:
                return terminal

            def write(self, text: str) -> int:
                writes.append((name, text))
                return len(text)

        return Stream()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """To be entered in the test itself: between setup and call pytest puts its own streams back."""
        with contextlib.redirect_stdout(self.stream("out")), contextlib.redirect_stderr(self.stream("err")):
            yield

    def text(self, name: str) -> str:
        return "".join(text for stream, text in self.writes if stream == name)


# generate


def test_dense_text_equals_stock(capsys: pytest.CaptureFixture[str]) -> None:
    code = generate("--prompt", PROMPT, *DENSE, "--report")
    out, err = capsys.readouterr()
    assert (code, out) == (0, stock(str(MODEL)) + "\n")
    for line in (
        "loading ",
        "compiling the prefill graph",
        "compiled the decode graph in",
        "generating: 16 tokens",
    ):
        assert f"alisa: {line}" in err
    assert "graphs compiled" in err and "0% asked" in err


def test_prompt_from_file_or_stdin(
    short: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    outputs = []
    for flags in (["--prompt", PROMPT], ["--prompt-file", str(file), "--no-stream"], ["--no-stream"]):
        assert generate(*flags, "--max-new-tokens", "8", "--quiet", model=short) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].out.strip() and outputs[0].err == ""


def test_options_reach_the_store(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--kv-dtype",
        "int8",
        "--sparsity",
        "0.5",
        "--max-rows",
        "none",
        "--max-new-tokens",
        "4",
        "--report",
    ]
    assert generate("--prompt", PROMPT, *flags, model=short) == 0
    err = capsys.readouterr().err
    # 4 KV heads of K and V, 32 values each: int8 plus one float32 scale a head.
    assert f"{2 * 4 * (32 + 4)} B" in err
    assert "50% asked" in err


def test_seed_repeats_the_drawing(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        flags = ["--sample", "--temperature", "1.0", "--seed", seed, "--max-new-tokens", "8", "--quiet"]
        assert generate("--prompt", PROMPT, *flags, model=short) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_stream_on_a_terminal(short: str) -> None:
    screen = Screen()
    with screen.attached():
        code = generate("--prompt", PROMPT, *DENSE, model=short)
    assert code == 0
    assert screen.text("out") == stock(short) + "\n"
    assert "compiling the prefill graph ... " in screen.text("err")
    assert "compiling the decode graph ... " in screen.text("err")
    kinds = [name for name, text in screen.writes if text]
    first = kinds.index("out")
    assert "err" not in kinds[first:], "the bar wrote into the text"
    assert len(kinds) - first > 5, "the text came in one piece"
    last_line = screen.text("err").rsplit("\r", 2)
    assert last_line[-2].strip() == "" and last_line[-1] == "", "the bar is still there"


def test_stream_comes_word_by_word(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe too: what is printed at each token is what is known by then."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen.stream("out", terminal=False))
    seen: list[int] = []
    original = Progress.token
    monkeypatch.setattr(Progress, "token", lambda self: (seen.append(len(screen.text("out"))), original(self))[1])
    assert generate("--prompt", PROMPT, "--max-new-tokens", "8", "--quiet", model=short) == 0
    assert len(seen) == 8
    assert seen == sorted(seen) and len(set(seen)) > 4


# errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([*ON_MODEL, "--prompt", "a", "--sparsity", "1.5"], r"'sparsity'.*1\.5.*\[0, 1\)"),
        ([*ON_MODEL, "--prompt", "a", "--sparsity", "much"], "'much'.*a number"),
        ([*ON_MODEL, "--prompt", "a", "--policy", "dens"], "did you mean 'dense'"),
        ([*ON_MODEL, "--prompt", "a", "--sparcity", "0.5"], "did you mean --sparsity"),
        ([*ON_MODEL, "--prompt", "a", "--max-new-tokens", "0"], "integer >= 1"),
        ([*ON_MODEL, "--prompt", "a", "--max-new-tokens", "5000"], "at most 4096"),
        ([*ON_MODEL, "--prompt", "a", "--temperature", "0"], "above 0"),
        ([*ON_MODEL, "--prompt", "a", "--device", "abacus"], "'?abacus'?.*cpu"),
        ([*ON_MODEL, "--prompt", ""], "prompt is empty"),
        ([*ON_MODEL, "--prompt-file", "/no/such/file"], "No such file"),
        ([*ON_MODEL, "--prompt-file", str(MODEL / "model.safetensors")], "cannot read"),
        (["generate", "--model", "/no/such/model", "--prompt", "a"], "no such model folder.*/no/such/model"),
        (["generate", "--model", str(MODEL / "config.json"), "--prompt", "a"], "not a folder"),
        (["generate", "--model", str(ROOT / "tests"), "--prompt", "a"], "cannot load the model"),
        (["generate", "--prompt", "a"], "required: --model"),
        (["demo", "--sparsity", "-1"], r"\[0, 1\)"),
        (["dem"], "invalid choice: 'dem'"),
        ([], "required: COMMAND"),
    ],
)
def test_error_is_one_line(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*flags, *(["--quiet"] if flags else [])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("alisa: error: ") and err.count("\n") == 1
    assert re.search(expected, err), err


def test_unknown_model_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["generate", "--model", "nobody/nothing", "--prompt", "a", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "cannot load the model" in err and "got: nobody/nothing" in err and err.count("\n") == 1


def test_no_prompt_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Screen().stream("in"))
    assert generate() == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(AlisaError):
        generate("--prompt", "a", "--sparsity", "1.5", "--debug")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == "\nalisa: interrupted\n"


# progress


def test_warnings_spare_the_bar() -> None:
    screen = Screen()
    with screen.attached(), Progress() as progress:
        progress.start_tokens("generating", 2)
        backend.logger.warning("beware of the %s", "whale")
        progress.token()
        progress.end_tokens()
    assert "\ralisa: warning: beware of the whale\n" in screen.text("err")


def test_progress_lets_go(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(backend.compile_listeners), list(backend.compile_start_listeners)
    with pytest.raises(KeyError), Progress() as progress:
        progress.stage("counting")
        raise KeyError
    assert (list(backend.compile_listeners), list(backend.compile_start_listeners)) == before
    for listener in backend.compile_listeners:
        listener(CompileRow("decode", 1, (), 0.0))
    assert capsys.readouterr().err == "alisa: counting\n"


# demo


def test_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["demo", *FAST, "--max-new-tokens", "12", "--prompt-tokens", "120"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("The passage: Moby-Dick, the first ")
    assert re.search(r"^alisa, 80 % sparsity +\| dense \(stock transformers\)$", out, re.MULTILINE)
    assert re.search(r"(\d+ of 12 tokens agree before the first difference|All 12 tokens agree)", out)
    assert "80% asked" in out and "graphs compiled" in out
    assert max(len(line) for line in out.partition("What happened")[0].splitlines()) <= 80
    assert "dense (stock transformers): 12 tokens in" in err
    assert "alisa, 80 % sparsity: 12 tokens in" in err


@pytest.mark.slow
def test_demo_without_sparsity_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sparsity", "0", "--max-new-tokens", "12", "--prompt-tokens", "120", "--quiet"]
    assert cli.main(["demo", *FAST, *flags]) == 0
    out, err = capsys.readouterr()
    assert "All 12 tokens agree." in out and "alisa, 0 % sparsity" in out
    assert err == ""


@pytest.mark.parametrize("width", [40, 80, 120])
def test_columns_fit(width: int) -> None:
    lines = demo._columns(("left", "a b " * 90 + "\nnew line"), ("right", "x" * 300), width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert {line.find("|") for line in lines} == {(width - 3) // 2 + 1}
    assert any(line.startswith("new line") for line in lines)


def test_demo_of_a_wheel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site" / "alisa_compile" / "tools" / "demo.py"))
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert "needs a source checkout" in err and "alisa generate --model" in err


# the process


def test_module_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alisa_compile", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: alisa" in done.stdout
    assert "generate" in done.stdout and "demo" in done.stdout


def test_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--host-kv-budget" in out and "--no-paper" in out
    assert "fraction of past tokens that a decode step leaves out" in out


@pytest.mark.parametrize("command", ("", *cli._parsers()[1]))
def test_help_is_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A stray % would print argparse's own tables."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: alisa" in shown
    assert "option_strings" not in shown and "%" not in shown.replace("80 %", "")
