"""`alisa generate`: continue a prompt with any causal language model of transformers."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from ..api import report, trace
from ..backend import alisa
from ..errors import AlisaError
from .loading import load
from .options import given_options
from .progress import Progress
from .streaming import CountingStreamer, PrintingStreamer


def run(arguments: argparse.Namespace) -> None:
    """Everything that can be refused is refused before the model is loaded."""
    options = given_options(arguments)
    choice = _choice(arguments)
    prompt = _prompt(arguments)
    with Progress(quiet=arguments.quiet) as progress:
        progress.stage(f"loading {arguments.model}")
        loaded = load(arguments.model, arguments.dtype, arguments.device)
        tokens = loaded.encode(prompt, arguments.max_new_tokens)
        model: Any = torch.compile(loaded.model, backend=alisa, options=options)
        streamer: Any = (
            CountingStreamer(progress) if arguments.no_stream else PrintingStreamer(loaded.tokenizer, progress)
        )
        progress.start_tokens("generating", arguments.max_new_tokens)
        with trace(arguments.trace) if arguments.trace else contextlib.nullcontext():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=arguments.max_new_tokens,
                streamer=streamer,
                **choice,
                **loaded.padding(),
            )
    if arguments.no_stream:
        print(loaded.decode(output[0, tokens.shape[1] :]))
    if arguments.report:
        print(report(model), file=sys.stderr)


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise AlisaError(f"cannot read the prompt: {reason}", got=arguments.prompt_file) from error
    if sys.stdin.isatty():
        raise AlisaError("there is no prompt", fix="give --prompt TEXT or --prompt-file FILE, or pipe text in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise AlisaError(f"cannot read the prompt: {error}", got="standard input") from error


def _choice(arguments: argparse.Namespace) -> dict[str, Any]:
    """How generate picks tokens. The likeliest unless asked otherwise, whatever the model's own file says."""
    temperature = arguments.temperature
    if not arguments.sample and temperature is None and arguments.seed is None:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is not None and not 0 < temperature < float("inf"):
        raise AlisaError(
            "the temperature is out of range",
            got=temperature,
            expected="a number above 0",
            fix="leave out --sample and --temperature for the likeliest token each time",
        )
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    return {"do_sample": True} if temperature is None else {"do_sample": True, "temperature": temperature}
