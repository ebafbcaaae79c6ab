"""`alisa eval --suite paper`: what it refuses, how answers are scored, and the harness itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from alisa_compile.config import AlisaConfig
from alisa_compile.errors import AlisaError, NotAvailableError
from alisa_compile.tools import cli, suite
from alisa_compile.tools.emulation import Decoder
from alisa_compile.tools.scoring import score
from tests.support import NOVEL, novel

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
DENSE = AlisaConfig(policy="dense", sparsity=0.0)
SPARSE = AlisaConfig(sparsity=0.7, paper=True)


@pytest.fixture(scope="module")
def loaded() -> Any:
    from alisa_compile.tools.loading import Loaded

    return Loaded(*novel())


def pairs(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Of different lengths, out of order."""
    texts = [
        ("The whale", " swam away"),
        ("It", " was"),
        ("Call me by my name, said the old captain of the ship", " ."),
    ]
    texts += [("It was a dark and stormy night at sea; the captain said", " nothing at all to his men")]
    return [(tokenizer(context)["input_ids"], tokenizer(rest)["input_ids"]) for context, rest in texts]


@torch.no_grad()
def test_dense_scores_are_the_models_own(loaded: Any) -> None:
    """One forward pass of the stock model for each pair."""
    asked = pairs(loaded.tokenizer)
    found = score(Decoder(loaded.model), asked, DENSE, dense_tokens=1, length=64, batch_size=3)
    for (context, rest), (logprob, greedy) in zip(asked, found, strict=True):
        logits = loaded.model(torch.tensor([context + rest])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(rest)[:, None]).sum()
        assert logprob == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(rest)).all())


@pytest.mark.parametrize("dense_tokens", [1, 4])
def test_sparse_scores_are_those_of_decoding(loaded: Any, dense_tokens: int) -> None:
    """Token by token over an AlisaCache, each pair alone: neither batches nor padding on the right have a say."""
    asked = pairs(loaded.tokenizer)
    found = score(Decoder(loaded.model), asked, SPARSE, dense_tokens=dense_tokens, length=64, batch_size=4)
    dense = score(Decoder(loaded.model), asked, DENSE, dense_tokens=dense_tokens, length=64, batch_size=4)
    for pair, (logprob, _) in zip(asked, found, strict=True):
        prompt = min(dense_tokens, len(pair[0]))
        alone = Decoder(loaded.model, "recurrence").predict(torch.tensor([pair[0] + pair[1]]), prompt, SPARSE)
        assert logprob == pytest.approx(-float(alone.loss[0, -len(pair[1]) :].sum()), abs=1e-3)
    assert abs(found[-1][0] - dense[-1][0]) > 0.05  # the policy does have one


def test_a_long_context_loses_its_beginning(loaded: Any) -> None:
    """And a continuation that does not fit, or nothing to go by, is refused."""
    decoder = Decoder(loaded.model)
    context, rest = list(range(10, 60)), [7, 8]
    options: dict[str, Any] = {"dense_tokens": 1, "length": 20, "batch_size": 1}
    (long,) = score(decoder, [(context, rest)], DENSE, **options)
    (short,) = score(decoder, [(context[-19:], rest)], DENSE, **options)
    assert long == short
    for context, rest in (([], [1]), ([1], []), ([1], list(range(21)))):
        with pytest.raises(AlisaError, match="cannot be scored"):
            score(decoder, [(context, rest)], DENSE, **options)


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions of each kind."""
    folder = tmp_path_factory.mktemp("data")
    text = "The captain looked at the sea. The sea was calm, and the ship lay still under a white sky. " * 6
    write(folder / "wikitext" / "test.jsonl", {"page": text}, {"page": text[::-1]})
    (folder / "ptb").mkdir()
    (folder / "ptb" / "test.txt").write_text(text)
    alpaca = {"instruction": "Name a whale.", "input": "", "output": "Moby Dick is a whale."}
    write(folder / "alpaca" / "test.jsonl", {**alpaca, "text": text[:200]}, {**alpaca, "text": ""})
    for split in ("validation", "train"):
        goal = {"goal": "To sail", "sol1": "take a ship", "sol2": "take a stone"}
        write(
            folder / "piqa" / f"{split}.jsonl",
            *({**goal, "goal": f"To sail {n} miles", "label": n % 2} for n in range(6)),
        )
        copa = {
            "premise": "The ship sank.",
            "choice1": "It had a leak.",
            "choice2": "It was blue.",
            "question": "cause",
        }
        write(folder / "copa" / f"{split}.jsonl", *({**copa, "idx": n, "label": n % 2} for n in range(6)))
        sentence = {"sentence": "The whale hit the ship and the _ sank.", "option1": "ship", "option2": "whale"}
        write(folder / "winogrande" / f"{split}.jsonl", *({**sentence, "answer": str(1 + n % 2)} for n in range(6)))
    for split in ("test", "train"):
        choices = {"text": ["fish", "stones", "sand", "tar"], "label": ["A", "B", "C", "D"]}
        question = {"question_stem": "Seals eat", "choices": choices}
        write(folder / "openbookqa" / f"{split}.jsonl", *({**question, "answerKey": "ABCD"[n % 4]} for n in range(6)))
    return folder


def evaluate(data: Path, *flags: str) -> int:
    lines = ["--policies", "swa", "--sparsities", "0.7", "--quiet"]
    return cli.main(["eval", "--model", str(NOVEL), "--suite", "paper", "--data", str(data), *lines, *flags])


def test_what_is_missing_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded: the data, a split, the package; and a text beside the suite."""

    def refused(*flags: str) -> str:
        assert cli.main(["eval", "--model", "nowhere", *flags]) == 2
        return capsys.readouterr().err

    assert "neither --text nor --suite" in refused()
    assert "both --text and --suite" in refused("--text", "x", "--suite", "paper")
    assert "--data FOLDER" in refused("--suite", "paper")
    assert "no test.jsonl" in refused("--suite", "paper", "--data", str(tmp_path))
    only = ["--suite", "paper", "--data", str(data), "--tasks"]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("{}")
    error = refused("--suite", "paper", "--data", str(tmp_path), "--tasks", "piqa,copa")
    assert "no train.jsonl" in error and str(tmp_path / "piqa") in error and "leave piqa out" in error
    assert "unknown task of the suite; got: mmlu" in refused(*only, "mmlu")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert "pip install 'alisa-compile[eval]'" in refused(*only, "ptb")


def test_help_says_where_the_data_go(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task and its splits."""
    monkeypatch.setenv("COLUMNS", "2000")  # a narrower help breaks names
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, task in suite.TASKS.items():
        assert name in text and all(split in text for split in task.splits)
    assert "FOLDER/TASK/SPLIT.jsonl" in text and "alisa-compile[eval]" in text


@harness
@pytest.mark.slow
def test_the_suite_runs_in_the_harness(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All seven tasks, dense and sparse; the second call takes everything from the file."""
    out = tmp_path / "suite.json"
    flags = ["--out", str(out), "--limit", "4", "--shots", "2", "--batch-size", "16"]
    assert evaluate(data, *flags) == 0
    printed = capsys.readouterr().out
    header, _, dense, sparse = printed.split("\n\n")[0].splitlines()
    assert header.split() == ["policy", "sparsity", *suite.TASKS]
    assert len(dense.split()) == len(sparse.split()) == 3 + len(suite.TASKS) and dense.split()[3:] != sparse.split()[3:]
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 2 * len(suite.TASKS)
    before = out.read_bytes()
    assert evaluate(data, *flags) == 0
    assert capsys.readouterr().out == printed and out.read_bytes() == before


@harness
def test_the_harness_gets_what_its_own_model_gives(data: Path, loaded: Any, tmp_path: Path) -> None:
    """At sparsity 0, beside the harness's adapter of transformers models, on the same task files."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from alisa_compile.tools.harness import HarnessModel

    paths = [str(suite.write_task(tmp_path, data, name, 2)) for name in ("piqa", "winogrande", "ptb", "alpaca")]
    ours = HarnessModel(loaded, Decoder(loaded.model), DENSE, dense_tokens=1, length=100, batch_size=8)
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=100, batch_size=1)
    found, expected = (
        simple_evaluate(
            model=model, tasks=paths, bootstrap_iters=0, log_samples=False,
            task_manager=TaskManager(include_defaults=False),
        )["results"]
        for model in (ours, theirs)
    )  # fmt: skip
    for name, numbers in expected.items():
        for key, value in numbers.items():
            if isinstance(value, float):
                assert found[name][key] == pytest.approx(value, rel=1e-3), (name, key)
    with pytest.raises(NotAvailableError):
        ours.generate_until([])
