"""`alisa demo`: the embedded model continues a passage of a real book, densely and sparsely."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..api import report
from ..backend import alisa
from ..config import AlisaConfig
from ..errors import AlisaError
from .loading import Loaded, load
from .options import given_options
from .progress import Progress
from .streaming import CountingStreamer

_MAX_WIDTH = 120
_PASSAGE_LINES = 5
_DENSE = "dense (stock transformers)"
#: Plain greedy text of so small a model runs in circles; with this rule there is something to compare.
_NO_REPEAT = 3


def run(arguments: argparse.Namespace) -> None:
    """Both texts are greedy, in float32: differences come from sparse attention, not from rounding."""
    options = given_options(arguments)
    config = AlisaConfig.from_options(options)
    model_path, text_path = _assets()
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH)
    label = f"alisa, {config.sparsity * 100:g} % sparsity"
    with _one_thread(), Progress(quiet=arguments.quiet) as progress:
        progress.stage("loading the embedded model")
        loaded = load(str(model_path), "float32", "cpu")
        passage = _passage(loaded, text_path.read_text(encoding="utf-8"), arguments.prompt_tokens)
        tokens = loaded.encode(passage, arguments.max_new_tokens)
        progress.hide()
        _print_passage(passage, tokens.shape[1], width)

        dense = _continue(loaded.model, loaded, tokens, arguments.max_new_tokens, _DENSE, progress)
        model: Any = torch.compile(loaded.model, backend=alisa, options=options)
        sparse = _continue(model, loaded, tokens, arguments.max_new_tokens, label, progress)

    print(_columns((label, loaded.decode(sparse)), (_DENSE, loaded.decode(dense)), width))
    print()
    print(textwrap.fill(_agreement(loaded, sparse, dense), width))
    print()
    print(f"What happened ({label}):")
    print(report(model))


def _assets() -> tuple[Path, Path]:
    """The model and the book, which are in the repository but not in the wheel."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "assets"
    paths = folder / "novel-7m", folder / "moby-dick-excerpt.txt"
    for path in paths:
        if not path.exists():
            raise AlisaError(
                "`alisa demo` needs a source checkout: its model and text are not in the installed package",
                expected=str(path),
                fix="run it from a clone of the repository (`make demo`), or try a model of your own: "
                "alisa generate --model PATH_OR_ID --prompt TEXT",
            )
    return paths


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A step of so small a model is over before a second thread has woken up. On a busy machine the wait for
    that thread was measured at forty times the step itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _passage(loaded: Loaded, text: str, max_tokens: int) -> str:
    """The beginning of the book, up to the last whole sentence that fits."""
    tokens = loaded.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
    cut = loaded.decode(tokens)
    end = max(cut.rfind(mark) for mark in (". ", "! ", "? ", ".\n", "!\n", "?\n"))
    return cut if end < 0 else cut[: end + 1]


def _continue(
    model: Any, loaded: Loaded, tokens: torch.Tensor, count: int, label: str, progress: Progress
) -> torch.Tensor:
    progress.start_tokens(label, count)
    output: torch.Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        no_repeat_ngram_size=_NO_REPEAT,
        streamer=CountingStreamer(progress),
        **loaded.padding(),
    )
    return output[0, tokens.shape[1] :]


def _print_passage(passage: str, count: int, width: int) -> None:
    lines = _wrap(passage, width)
    print(f"The passage: Moby-Dick, the first {count} tokens. It ends:")
    print("\n".join(lines[-_PASSAGE_LINES:]))
    print()
    note = (
        "The model has 7 million parameters and a byte-level BPE vocabulary: it is not good at writing. "
        f"Both texts are greedy; no {_NO_REPEAT} tokens in a row may come twice."
    )
    print(textwrap.fill(note, width), end="\n\n", flush=True)


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`; the text's own line breaks stay."""
    return [line for paragraph in text.strip().split("\n") for line in textwrap.wrap(paragraph, width) or [""]]


def _columns(left: tuple[str, str], right: tuple[str, str], width: int) -> str:
    """Two titled texts side by side."""
    each = max((width - 3) // 2, 8)
    sides = [[*textwrap.wrap(title, each), "-" * each, *_wrap(text, each)] for title, text in (left, right)]
    rows = itertools.zip_longest(*sides, fillvalue="")
    return "\n".join(f"{a:<{each}} | {b}".rstrip() for a, b in rows)


def _agreement(loaded: Loaded, sparse: torch.Tensor, dense: torch.Tensor) -> str:
    shorter = min(len(sparse), len(dense))
    same = int((sparse[:shorter] == dense[:shorter]).int().cumprod(0).sum())
    if same == shorter == max(len(sparse), len(dense)):
        return f"All {same} tokens agree."
    words = [repr(loaded.decode(side[same : same + 1])) if same < len(side) else "the end" for side in (sparse, dense)]
    return (
        f"{same} of {shorter} tokens agree before the first difference, where alisa writes {words[0]} and "
        f"dense {words[1]}. From there on each text follows its own beginning."
    )
