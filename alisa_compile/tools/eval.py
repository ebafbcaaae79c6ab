"""`alisa eval`: what sparsity costs in perplexity and in recall, on a model and a text of your own."""

from __future__ import annotations

import argparse
import platform
import textwrap
from pathlib import Path

import torch
import transformers

from .. import __version__
from ..config import AlisaConfig
from ..errors import AlisaError
from ..runtime.profile import processor_name
from . import suite
from .accuracy import Row, plot, recall_by_place, summary
from .loading import Loaded, load
from .measure import Bench, Line, SampleProgress
from .options import given_options, read_options
from .plotting import can_plot, check_plot
from .recall import Plan
from .results import Results

#: What everything is compared with.
_REFERENCE = AlisaConfig(policy="dense", sparsity=0.0)


def run(arguments: argparse.Namespace) -> None:
    """Everything that can be refused is refused before the model is loaded."""
    lines = _lines(arguments)
    if (arguments.suite is None) == (arguments.text is None):
        raise AlisaError(
            "there is nothing to measure on, or twice",
            got="neither --text nor --suite" if arguments.text is None else "both --text and --suite",
            expected="--text FILE for perplexity and recall on a text of your own, or --suite paper --data FOLDER",
        )
    if arguments.suite is not None:
        _run_suite(arguments, lines)
        return
    plan = Plan(arguments.recall_lengths, arguments.recall_depths, arguments.trials, arguments.seed)
    _check(arguments)
    text = _read(arguments.text)
    results = Results(arguments.out, _machine(), arguments.command_line)
    progress = SampleProgress(quiet=arguments.quiet)
    with progress:
        drawn = can_plot(arguments.plot, progress)
        progress.stage(f"loading {arguments.model}")
        loaded = load(arguments.model, arguments.dtype, arguments.device)
        bench = Bench(arguments, plan, loaded, text, results)
        try:
            progress.count_samples(bench.samples_left(lines))
            for line in lines:
                bench.measure(line, progress)
        finally:
            # An interruption keeps what is finished, on the screen as well as in the file.
            progress.hide()
            rows = bench.rows(lines)
            if rows:
                _show(rows, arguments, bench)
                if drawn:
                    plot(rows, rows[0], _title(arguments, loaded), arguments.plot)


def _run_suite(arguments: argparse.Namespace, lines: list[Line]) -> None:
    """The same lines on the paper's data sets."""
    suite.check(arguments)
    results = Results(arguments.out, _machine(), arguments.command_line)
    progress = SampleProgress(quiet=arguments.quiet)
    with progress:
        progress.stage(f"loading {arguments.model}")
        tasks = suite.Suite(arguments, load(arguments.model, arguments.dtype, arguments.device), results)
        try:
            for line in lines:
                tasks.measure(line, progress)
        finally:
            # An interruption keeps what is finished, as below.
            progress.hide()
            if tasks.has_numbers(lines):
                print(tasks.table(lines, markdown=arguments.markdown))
    note = tasks.note()
    print("\n" + (note if arguments.markdown else textwrap.fill(note, 79)))
    print(f"\nMeasured by `{arguments.command_line}`\non {_machine()}.")


def _lines(arguments: argparse.Namespace) -> list[Line]:
    """The reference first, then every policy at every sparsity under every set of options, each once."""
    base = given_options(arguments)
    variants = [("", {}), *((_label(text), read_options(text)) for text in arguments.variant)]
    # Rows are never quantised in the reference.
    lines = [Line("unquantised" if base.get("kv_dtype") == "int8" else "", _REFERENCE, True)]
    for label, options in variants:
        for policy in arguments.policies:
            for sparsity in arguments.sparsities:
                config = AlisaConfig.from_options({**base, "policy": policy, "sparsity": sparsity, **options})
                asks_recall = not config.is_sparse or config.sparsity in arguments.recall_sparsities
                lines.append(Line(label, config, asks_recall))
    unique: dict[str, Line] = {}
    for line in lines:
        unique.setdefault(str(line.selection), line)
    return list(unique.values())


def _label(variant: str) -> str:
    """A variant may name a policy or a sparsity, which have columns of their own."""
    parts = [part.strip() for part in variant.split(",")]
    return ",".join(part for part in parts if part.partition("=")[0] not in ("policy", "sparsity"))


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.samples and not arguments.trials:
        raise AlisaError("there is nothing to measure", got="--samples 0 --trials 0", fix="raise one of them")
    if arguments.samples and arguments.prompt_tokens >= arguments.sample_tokens:
        raise AlisaError(
            "the prompt fills the window",
            got=f"--prompt-tokens {arguments.prompt_tokens}",
            expected=f"fewer than --sample-tokens ({arguments.sample_tokens})",
        )
    extra = set(arguments.recall_sparsities) - set(arguments.sparsities)
    if extra and arguments.trials:
        raise AlisaError(
            "recall is asked for at a sparsity that is not in the table",
            got=", ".join(map(str, sorted(extra))),
            expected=f"some of --sparsities {','.join(map(str, arguments.sparsities))}",
            fix="change --recall-sparsities, or --trials 0 for no recall",
        )
    for depth in arguments.recall_depths:
        if not 0 <= depth <= 1:
            raise AlisaError("a recall depth is out of range", got=depth, expected="0 (told first) to 1 (told last)")
    check_plot(arguments.plot)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AlisaError(f"cannot read the text: {reason}", got=path) from error


def _machine() -> str:
    return (
        f"{processor_name()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"alisa {__version__}"
    )


def _title(arguments: argparse.Namespace, loaded: Loaded) -> str:
    return f"{Path(arguments.model).name}, {arguments.text.name}, {str(loaded.model.dtype).removeprefix('torch.')}"


def _show(rows: list[Row], arguments: argparse.Namespace, bench: Bench) -> None:
    markdown = arguments.markdown
    print(summary(rows, rows[0], markdown=markdown))
    notes = []
    if arguments.samples:
        notes.append(
            f"Perplexity: {arguments.samples} windows of {arguments.sample_tokens} tokens, spread over the "
            f"{bench.tokens} of the text; the first {arguments.prompt_tokens} are prefilled densely, the others "
            "decoded one by one. After the ratio: its paired bootstrap 95 % interval over the windows."
        )
    asked = [row for row in rows if row.recall]
    if asked:
        trials = len(arguments.recall_lengths) * len(arguments.recall_depths) * arguments.trials
        notes.append(
            f"Recall: share of single digits / of whole numbers, {trials} trials a cell, so half of the numbers would "
            f"be known to about +-{1.96 * (0.25 / trials) ** 0.5:.2f}; chance is 0.10. In prompt: the dense prefill "
            "sees the question. Asked later: the question arrives token by token, in decode."
        )
    for note in notes:
        print("\n" + (note if markdown else textwrap.fill(note, 79)))
    if asked:
        print("\nDigits recalled, by length of the text and how deep in it the number was told:\n")
        print(recall_by_place(asked, arguments.recall_lengths, arguments.recall_depths, markdown=markdown))
    print(f"\nMeasured by `{arguments.command_line}`\non {_machine()}.")
