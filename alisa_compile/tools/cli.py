"""The `alisa` command: parse, dispatch, and turn errors of ours into one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..config import POLICIES
from ..errors import AlisaError
from ..passes.record import STAGES
from ..runtime.plan import OBJECTIVES
from .bench import add_flags as add_bench_flags
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
        code = _run(argv)
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
    return code


def _run(argv: list[str]) -> int:
    parser, commands = _parsers()
    arguments, unknown = parser.parse_known_args(argv)
    arguments.command_line = shlex.join(["alisa", *argv])
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
    code: int | None = command.run(arguments)
    return code or 0


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="alisa", description="Sparse, tiered KV caching for LLM inference, as a torch.compile backend."
    )
    parser.add_argument("--version", action="version", version=f"alisa {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    text = "continue a prompt with a model of your own"
    generate = choices.add_parser("generate", help=text, description=text, allow_abbrev=False)
    _add_model_flags(generate)
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue (default: standard input)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file with what to continue")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--sample", action="store_true", help="draw tokens at random instead of the likeliest")
    generate.add_argument("--temperature", type=float, metavar="T", help="of the drawing; implies --sample")
    generate.add_argument("--seed", type=int, metavar="N", help="makes the drawing repeatable; implies --sample")
    generate.add_argument("--no-stream", action="store_true", help="print the text at the end, in one piece")
    generate.add_argument("--report", action="store_true", help="print what happened, on standard error")
    text = "JSON: when steps ran and rows moved; ui.perfetto.dev opens it"
    generate.add_argument("--trace", type=Path, metavar="FILE", help=text)

    text = "the embedded model writes, with sparse attention beside dense"
    demo = choices.add_parser("demo", help=text, description=text, allow_abbrev=False)
    demo.add_argument("--max-new-tokens", type=_positive, default=120, metavar="N", help="(default: %(default)s)")
    demo.add_argument(
        "--prompt-tokens",
        type=_positive,
        default=600,
        metavar="N",
        help="how much to read, at most (default: %(default)s)",
    )

    text = "what sparsity costs in perplexity and in recall, by policy"
    evaluate = choices.add_parser("eval", help=text, description=text, allow_abbrev=False)
    _add_model_flags(evaluate)
    _add_eval_flags(evaluate)

    text = "where the KV rows of a generation would be, and how long its steps would take; needs no weights"
    plan = choices.add_parser("plan", help=text, description=text, allow_abbrev=False)
    _add_model_flags(plan)
    _add_plan_flags(plan)

    text = "what is installed, how fast this machine is, and what will and will not work on it"
    ending = "Exit code: 0 = decoding will be fast, 1 = something is missing for that, 2 = the command line is wrong."
    doctor = choices.add_parser("doctor", help=text, description=text, epilog=ending, allow_abbrev=False)
    _add_doctor_flags(doctor)

    text = "what each pass changed in a model's graphs, and why it left something as it is"
    diff = choices.add_parser("diff", help=text, description=text, allow_abbrev=False)
    _add_model_flags(diff)
    _add_diff_flags(diff)

    text = "find the rewrite that makes a model's output wrong, by comparing with dense attention"
    ending = "Exit code: 0 = nothing is wrong, 1 = something is, 2 = the command line or the model is."
    bisect = choices.add_parser("bisect", help=text, description=text, epilog=ending, allow_abbrev=False)
    _add_model_flags(bisect)
    _add_bisect_flags(bisect)

    text = "how fast kernels, decode steps and whole generations are, beside transformers; needs a checkout"
    ending = "Exit code: 0 = every row has its numbers, 1 = some have none, 2 = the command line or a file is wrong."
    bench = choices.add_parser("bench", help=text, description=text, epilog=ending, allow_abbrev=False)
    add_bench_flags(bench)

    commands = {"generate": generate, "demo": demo, "eval": evaluate, "plan": plan, "doctor": doctor, "bench": bench}
    commands |= {"diff": diff, "bisect": bisect}
    for name, command in commands.items():
        command.add_argument("--quiet", action="store_true", help="show no progress")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name not in ("doctor", "bench"):
            # A table has many policies and sparsities.
            add_config_flags(command, without=("policy", "sparsity") if name == "eval" else ())
    return parser, commands


def _add_model_flags(parser: _Parser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="a folder, or a name on the Hugging Face Hub"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and computation (default: as the model was saved)",
    )
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: cuda where there is one)")


def _add_eval_flags(parser: _Parser) -> None:
    def flag(name: str, reader: Callable[[str], Any], default: Any, metavar: str, text: str) -> None:
        parser.add_argument(name, type=reader, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")

    parser.add_argument("--text", type=Path, metavar="FILE", help="to measure on: UTF-8, not in the training text")
    flag("--policies", _names, ",".join(p for p in POLICIES if p not in ("dense", "churn")), "A,B,...", "to compare")
    flag("--sparsities", _numbers, "0.2,0.4,0.6,0.8,0.9", "X,Y,...", "0 to below 1; dense comes by itself")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="one more line for each policy and sparsity, with these options of alisa; may be repeated",
    )
    flag("--samples", _count, 50, "N", "windows of text for perplexity; 0 = no perplexity")
    flag("--sample-tokens", _positive, 1024, "N", "length of a window")
    flag("--prompt-tokens", _positive, 256, "N", "of a window, prefilled densely; the others are decoded and scored")
    flag("--trials", _count, 20, "N", "secret-number trials of each length and depth; 0 = no recall")
    flag("--recall-sparsities", _numbers, "0.8", "X,Y,...", "of --sparsities")
    flag("--recall-lengths", _lengths, "300,600", "N,M,...", "tokens from the beginning to the answer")
    flag("--recall-depths", _numbers, "0,0.25,0.5,0.75,1", "X,Y,...", "where the number is told; 0 = at the beginning")
    flag("--seed", _count, 0, "N", "of the trials")
    flag("--batch-size", _positive, 8, "N", "windows at a time; memory grows with it")
    parser.add_argument(
        "--method",
        choices=("emulation", "recurrence"),
        default="emulation",
        help="emulation: layer by layer, fast; recurrence: a forward pass for each token (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; cells that are in it are not measured again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="such as accuracy.png; needs matplotlib")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    _add_suite_flags(parser)


def _add_suite_flags(parser: _Parser) -> None:
    group = parser.add_argument_group(
        "the paper's data sets, instead of --text",
        "Scored by EleutherAI's lm-evaluation-harness (pip install 'alisa-compile[eval]') with local files, nothing is "
        "downloaded. FOLDER/TASK/SPLIT.jsonl (or .parquet) has the fields of the data set that the harness's task of "
        "that name reads. wikitext, ptb, alpaca: split test, perplexity of a word (wikitext: field page; ptb: test.txt "
        "with one text; alpaca: instruction, input, output, text). piqa, copa, winogrande: validation and train; "
        "openbookqa: test and train: accuracy, with examples from train in the prompt. --policies, --sparsities, "
        "--variant, --batch-size, --method, --out and --markdown are as above.",
    )
    group.add_argument("--suite", choices=("paper",), help="the tasks of ALISA's evaluation")
    group.add_argument("--data", type=Path, metavar="FOLDER", help="with a folder for each task")
    text = "of the suite (default: %(default)s)"
    names = "wikitext,ptb,alpaca,piqa,copa,openbookqa,winogrande"
    group.add_argument("--tasks", type=_names, default=names, metavar="A,B,...", help=text)
    text = "examples in the prompt of a question (default: %(default)s, as in the paper)"
    group.add_argument("--shots", type=_count, default=4, metavar="N", help=text)
    text = "only the first N questions or texts of each task, to try it"
    group.add_argument("--limit", type=_positive, metavar="N", help=text)
    text = "of each input, read at once and densely; the others decode one by one (default: %(default)s)"
    group.add_argument("--dense-tokens", type=_positive, default=1, metavar="N", help=text)


def _add_plan_flags(parser: _Parser) -> None:
    text = "tokens to read"
    parser.add_argument("--prompt-length", type=_positive, required=True, metavar="N", help=text)
    text = "tokens to generate (default: %(default)s)"
    parser.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help=text)
    parser.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="sequences (default: %(default)s)")
    text = "overlapped: transfers hide behind compute; paper: times add up (default: %(default)s)"
    parser.add_argument("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help=text)
    text = "a saved profile, perhaps of another machine (default: this machine's, measured once and kept)"
    parser.add_argument("--profile", type=Path, metavar="FILE", help=text)
    parser.add_argument("--json", action="store_true", help="print everything, by step, as JSON")
    text = "such as plan.png: bytes by tier and step time over the steps; needs matplotlib"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=text)


def _add_doctor_flags(parser: _Parser) -> None:
    parser.add_argument("--device", help="to judge, such as cpu or cuda:0 (default: cuda where there is one)")
    dtypes = ("float32", "bfloat16", "float16")
    text = "of the models to run (default: %(default)s)"
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help=text)
    parser.add_argument("--profile", action="store_true", help="measure this machine's speed (anew) and keep it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _add_diff_flags(parser: _Parser) -> None:
    parser.add_argument("--stage", choices=STAGES, default="decode", help="which graph to show (default: %(default)s)")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="only what this pass did")
    parser.add_argument("--layer", type=_count, metavar="N", help="only this layer of the model; it fits a screen")
    parser.add_argument("--explain", action="store_true", help="what was left as it is, why, and what to do about it")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with all graphs, for a browser")
    parser.add_argument("--dot", type=Path, metavar="FILE", help="the changed nodes and their neighbours, for Graphviz")
    text = "length of the prompt that the graphs are made with (default: %(default)s)"
    parser.add_argument("--prompt-tokens", type=_positive, default=24, metavar="N", help=text)


def _add_bisect_flags(parser: _Parser) -> None:
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="what to compare on; the model continues it")
    text.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 file to compare on, from its beginning")
    explained = "tokens of the text to read first (default: %(default)s)"
    parser.add_argument("--prompt-tokens", type=_positive, default=64, metavar="N", help=explained)
    explained = "tokens to decode and compare (default: %(default)s)"
    parser.add_argument("--max-new-tokens", type=_positive, default=16, metavar="N", help=explained)
    explained = "largest KL divergence from dense, in nats, that counts as right (default: what rounding explains)"
    parser.add_argument("--tolerance", type=float, metavar="X", help=explained)
    parser.set_defaults(dtype="float32")  # with fewer digits rounding could hide a fault


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected: numbers with commas between") from error


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part.strip()) for part in text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected: an integer >= 0")
    return int(text)


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
