"""The `alisa` command: parse, dispatch, and turn errors of ours into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
from typing import NoReturn

from .. import __version__
from ..errors import AlisaError
from .options import add_config_flags

#: Of everything that is to blame on the input, as argparse does it.
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take the same way as all others."""

    def error(self, message: str) -> NoReturn:
        raise AlisaError(message, fix=f"see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nalisa: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left (`| head`); what is buffered must not fail again when Python exits.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        if "--debug" in argv or not isinstance(known, AlisaError):
            raise
        print(f"alisa: error: {' '.join(str(known).split())}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def _run(argv: list[str]) -> None:
    parser, commands = _parsers()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown_argument(unknown[0], commands[arguments.command])
    try:
        command = importlib.import_module(f".{arguments.command}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tqdm"):
            raise
        raise AlisaError(
            f"`alisa {arguments.command}` needs {error.name}", fix="pip install 'alisa-compile[hf]'"
        ) from error
    command.run(arguments)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="alisa", description="Sparse, tiered KV caching for LLM inference, as a torch.compile backend."
    )
    parser.add_argument("--version", action="version", version=f"alisa {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    text = "continue a prompt with a model of your own"
    generate = choices.add_parser("generate", help=text, description=text, allow_abbrev=False)
    generate.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the Hugging Face Hub"
    )
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue (default: standard input)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with what to continue")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="(default: %(default)s)")
    generate.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and computation (default: as the model was saved)",
    )
    generate.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")
    generate.add_argument("--sample", action="store_true", help="draw tokens at random instead of the likeliest")
    generate.add_argument("--temperature", type=float, metavar="T", help="of the drawing; implies --sample")
    generate.add_argument("--seed", type=int, metavar="N", help="makes the drawing repeatable; implies --sample")
    generate.add_argument("--no-stream", action="store_true", help="print the text at the end, in one piece")
    generate.add_argument("--report", action="store_true", help="print what happened, on standard error")

    text = "the embedded model at 80 % sparsity beside dense attention"
    demo = choices.add_parser("demo", help=text, description=text, allow_abbrev=False)
    demo.add_argument("--max-new-tokens", type=_positive, default=120, metavar="N", help="(default: %(default)s)")
    demo.add_argument(
        "--prompt-tokens",
        type=_positive,
        default=600,
        metavar="N",
        help="how much to read, at most (default: %(default)s)",
    )

    commands = {"generate": generate, "demo": demo}
    for command in commands.values():
        command.add_argument("--quiet", action="store_true", help="show no progress")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_config_flags(command)
    return parser, commands


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected: an integer >= 1")
    return int(text)


def _unknown_argument(argument: str, parser: _Parser) -> AlisaError:
    """argparse offers no nearest name for options."""
    name = argument.split("=")[0]
    options = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, options, n=2, cutoff=0.6) if name.startswith("-") else []
    hint = f"did you mean {' or '.join(near)}?" if near else f"see `{parser.prog} --help`"
    return AlisaError(f"unknown argument {name!r}", fix=hint)
