"""python -m benchmarks.figures [3 4 8 9 10 11] [--out FOLDER] [--small]

Each figure becomes `figureNN.json` (all numbers), `figureNN.md` (a table) and `figureNN.png`. Figures 3, 4 and 10 are
the same to the last bit on every run with the same versions of torch and matplotlib; 8 draws what `alisa eval` has
measured and 9 what `alisa bench` has; 11 is a measurement of its own.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures.drawing import save
from benchmarks.results_file import BadResults

RESULTS = Path(__file__).parent.parent / "results"
MODULES = {
    3: "attention_sparsity",
    4: "score_distribution",
    8: "accuracy_by_sparsity",
    9: "throughput_by_batch",
    10: "rank_correlation",
    11: "kernel_breakdown",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 where the command line is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description="the paper's figures, measured")
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help=f"of {', '.join(map(str, MODULES))} (all)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--small", action="store_true", help="a short text and small shapes, to see that it runs")
    options = parser.parse_args(argv)
    wanted = options.numbers or list(MODULES)
    missing = [number for number in wanted if number not in MODULES]
    if missing or not options.out.is_dir():
        why = f"there is no figure {missing[0]} here" if missing else f"there is no folder {options.out}"
        print(f"error: {why}; see --help", file=sys.stderr)
        return 2
    for number in tqdm(wanted, unit="figure", file=sys.stderr):
        try:
            figure = importlib.import_module(f"benchmarks.figures.{MODULES[number]}").make(small=options.small)
        except BadResults as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        save(figure, options.out / f"figure{number:02d}")
        tqdm.write(f"Figure {number}: {figure.title}\n{figure.table()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
