"""`alisa eval --suite paper`: the data sets of ALISA's evaluation, by lm-evaluation-harness, from local files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .. import __version__
from ..errors import AlisaError
from .emulation import Decoder
from .loading import Loaded
from .measure import Line, SampleProgress, model_fingerprint
from .results import Results

LENGTH = 2048  # tokens of input, as in the paper (section VI-A)
_LOADERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set. base: the harness's own task, where it has one. splits: of the data, that which is scored first; a
    second one gives the examples of the prompts. metric: what the table shows. text: template of a text without base.
    """

    base: str | None
    splits: tuple[str, ...]
    metric: str
    text: str = ""


_ALPACA = "{{text if text else instruction + '\\n' + input + '\\n' + output}}"
#: By the name of the folder that holds the data. PTB and Alpaca are no tasks of the harness.
TASKS: dict[str, Task] = {
    "wikitext": Task("wikitext", ("test",), "word_perplexity"),
    "ptb": Task(None, ("test",), "word_perplexity", "{{text}}"),
    "alpaca": Task(None, ("test",), "word_perplexity", _ALPACA),
    "piqa": Task("piqa", ("validation", "train"), "acc"),
    "copa": Task("copa", ("validation", "train"), "acc"),
    "openbookqa": Task("openbookqa", ("test", "train"), "acc"),
    "winogrande": Task("winogrande", ("validation", "train"), "acc"),
}


def check(arguments: argparse.Namespace) -> None:
    """Refuse what is missing, before a model is loaded: the package, the folder, a file of each split."""
    if arguments.data is None:
        raise AlisaError(
            "--suite needs the data",
            got="no --data",
            expected=f"--data FOLDER with a folder for each of {', '.join(arguments.tasks)}",
            fix="see `alisa eval --help` for the files",
        )
    for name in arguments.tasks:
        if name not in TASKS:
            raise AlisaError("unknown task of the suite", got=name, expected=f"some of {', '.join(TASKS)}")
        for split in TASKS[name].splits:
            _file_of(arguments.data, name, split)
    if importlib.util.find_spec("lm_eval") is None:
        raise AlisaError(
            "--suite runs in EleutherAI's lm-evaluation-harness, which is not installed",
            got="no package lm_eval",
            fix="pip install 'alisa-compile[eval]'",
        )


def _file_of(data: Path, name: str, split: str) -> Path:
    """The file of a split; the first of the formats that is there."""
    for suffix in _LOADERS:
        path = data / name / f"{split}.{suffix}"
        if path.is_file():
            return path
    raise AlisaError(
        "the data of a task are missing",
        got=f"no {split}.jsonl, .parquet or .txt in {data / name}",
        expected=f"a file for each of its splits: {', '.join(TASKS[name].splits)}",
        fix=f"put it there, or leave {name} out of --tasks",
    )


class Suite:
    """One model and the tasks that were asked for; measures lines cell by cell."""

    def __init__(self, arguments: argparse.Namespace, loaded: Loaded, results: Results) -> None:
        self._arguments, self._loaded, self._results = arguments, loaded, results
        self._decoder = Decoder(loaded.model, arguments.method)
        room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        self._length = min(LENGTH, LENGTH if room is None else int(room) - 1)
        self._shared = {
            "alisa": __version__,
            "model": model_fingerprint(loaded.model),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": loaded.model.device.type,
            "method": arguments.method,
            "length": self._length,
            "dense_tokens": arguments.dense_tokens,
            "limit": arguments.limit,
        }
        self._digests = {name: _digest(arguments.data, name) for name in arguments.tasks}

    def _settings(self, name: str, line: Line) -> dict[str, Any]:
        own: dict[str, Any] = {"measure": f"suite paper, {name}", "data": self._digests[name]}
        if len(TASKS[name].splits) > 1:
            own["shots"] = self._arguments.shots
        return {**own, **line.selection, **self._shared}

    def measure(self, line: Line, progress: SampleProgress) -> None:
        """All tasks of a line that are not finished."""
        for name in self._arguments.tasks:
            settings = self._settings(name, line)
            if self._results.find(settings) is None:
                progress.stage(f"{line.policy} {line.sparsity * 100:g} %{' ' * bool(line.label)}{line.label}: {name}")
                began = time.perf_counter()
                self._results.add(settings, self._run(name, line), time.perf_counter() - began)

    def _run(self, name: str, line: Line) -> dict[str, Any]:
        """The harness's numbers for one task: each metric, and its standard error under `<metric>_stderr`."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from .harness import HarnessModel

        model = HarnessModel(
            self._loaded, self._decoder, line.config, dense_tokens=self._arguments.dense_tokens,
            length=self._length, batch_size=self._arguments.batch_size,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = write_task(Path(folder), self._arguments.data, name, self._arguments.shots)
            found = simple_evaluate(
                model=model,
                tasks=[str(path)],
                limit=self._arguments.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),
            )
        (numbers,) = found["results"].values()
        return {key.split(",")[0]: value for key, value in sorted(numbers.items()) if isinstance(value, float)}

    def has_numbers(self, lines: Sequence[Line]) -> bool:
        """Whether any cell of these lines is measured."""
        names = self._arguments.tasks
        return any(self._results.find(self._settings(name, line)) is not None for line in lines for name in names)

    def table(self, lines: Sequence[Line], *, markdown: bool = False) -> str:
        """A row a line, a column a task; empty where a cell is not measured."""
        names = self._arguments.tasks
        rows = []
        for line in lines:
            found = [self._results.find(self._settings(name, line)) for name in names]
            if any(result is not None for result in found):
                label = f"{line.policy} {line.label}".strip()
                cells = [
                    "" if result is None else _shown(name, result) for name, result in zip(names, found, strict=True)
                ]
                rows.append([label, f"{line.sparsity * 100:g} %", *cells])
        layout = "github" if markdown else "simple"
        return str(tabulate(rows, ["policy", "sparsity", *names], tablefmt=layout, disable_numparse=True))

    def note(self) -> str:
        """What the numbers are."""
        limit = "" if self._arguments.limit is None else f", the first {self._arguments.limit} of each"
        return (
            f"wikitext, ptb, alpaca: perplexity of a word; the others: accuracy, {self._arguments.shots} examples in "
            f"the prompt{limit}. At most {self._length} tokens of context; the first {self._arguments.dense_tokens} "
            "read densely, all others decoded one by one under the policy."
        )


def _shown(name: str, result: dict[str, Any]) -> str:
    value = result[TASKS[name].metric]
    return f"{value:.1%}" if TASKS[name].metric == "acc" else f"{value:.4g}"


def write_task(folder: Path, data: Path, name: str, shots: int) -> Path:
    """A task file for the harness: its own task of that name, or a plain text's perplexity, over local files."""
    import yaml

    task = TASKS[name]
    files = {split: str(_file_of(data, name, split).resolve()) for split in task.splits}
    loader = _LOADERS[Path(files[task.splits[0]]).suffix[1:]]
    options: dict[str, Any] = {"data_files": files}
    if loader == "text":
        options["sample_by"] = "document"
    content: dict[str, Any] = {"task": name, "dataset_path": loader, "dataset_name": None, "dataset_kwargs": options}
    if task.base is None:
        metrics = [{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
        content |= {
            "output_type": "loglikelihood_rolling", "test_split": task.splits[0], "doc_to_text": "",
            "doc_to_target": task.text, "metric_list": metrics, "metadata": {"version": 1.0},
        }  # fmt: skip
    else:
        content["include"] = _task_files()[task.base]
        for split in ("training", "validation", "test"):
            content[f"{split}_split"] = None
        content["validation_split" if task.splits[0] == "validation" else "test_split"] = task.splits[0]
        if len(task.splits) > 1:
            content |= {"training_split": task.splits[1], "num_fewshot": shots}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@functools.lru_cache(maxsize=1)
def _task_files() -> dict[str, str]:
    """The harness's own task files; it reads thousands of them to know their names, which takes seconds."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    return {task.base: str(index[task.base].yaml_path) for task in TASKS.values() if task.base is not None}


def _digest(data: Path, name: str) -> str:
    digest = hashlib.sha256()
    for split in TASKS[name].splits:
        digest.update(_file_of(data, name, split).read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's and the data library's own bars and advice, which would garble the progress line."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
