"""`alisa bench`: the suite in the checkout's `benchmarks` folder. Its models, texts and gates are not in the wheel."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import AlisaError

_ROOT = Path(__file__).resolve().parents[2]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Of `alisa bench` and of `python -m benchmarks.run` alike."""
    text = "only rows whose name contains this; may be repeated"
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help=text)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, only to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the results file has already")
    text = "JSON; CSV and PNG files of the same name go beside it (default: benchmarks/results/bench.json)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)
    parser.add_argument("--list", action="store_true", help="print the rows and what is checked before each number")
    text = "print two results files side by side, measure nothing"
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help=text)


def run(arguments: argparse.Namespace) -> int:
    """In a process of its own, which finds `benchmarks` beside the package; the folder stays the user's."""
    if not (_ROOT / "benchmarks" / "run.py").is_file():
        raise AlisaError(
            "the benchmarks are not part of the installed package",
            got=f"no folder `benchmarks` beside {_ROOT / 'alisa_compile'}",
            expected="a checkout of the sources",
            fix="clone the repository, `pip install -e '.[test]'` there, and run `alisa bench` or `make bench`",
        )
    options = [f"--{name}" for name in ("quick", "fresh", "list", "quiet") if getattr(arguments, name)]
    options += [part for text in arguments.only for part in ("--only", text)]
    options += ["--out", str(arguments.out)] if arguments.out else []
    options += ["--compare", *map(str, arguments.compare)] if arguments.compare else []
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.run", *options]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()  # it goes on with the rows otherwise
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
