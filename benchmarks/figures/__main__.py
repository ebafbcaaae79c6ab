"""python -m benchmarks.figures [3 4 8 9 10 11 12] [--out FOLDER] [--small]

Each figure becomes `figureNN.json` (all numbers), `figureNN.md` (a table) and `figureNN.png`; one with several panels
has a letter after its number. Figures 3, 4 and 10 are the same to the last bit on every run with the same versions of
torch and matplotlib; 8 draws what `alisa eval` has measured, 9 what `alisa bench` has; 11 and 12 measure speed, in
minutes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures.drawing import save
from benchmarks.outcome import GateFailed
from benchmarks.results_file import BadResults

RESULTS = Path(__file__).parent.parent / "results"
MODULES = {
    3: "attention_sparsity",
    4: "score_distribution",
    8: "accuracy_by_sparsity",
    9: "throughput_by_batch",
    10: "rank_correlation",
    11: "kernel_breakdown",
    12: "phase_breakdown",
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
            made = importlib.import_module(f"benchmarks.figures.{MODULES[number]}").make(small=options.small)
        except (BadResults, GateFailed) as error:
            print(f"error: figure {number}: {error}", file=sys.stderr)
            return 2
        for panel, figure in (made if isinstance(made, dict) else {"": made}).items():
            save(figure, options.out / f"figure{number:02d}{panel}")
            tqdm.write(f"Figure {number}{panel}: {figure.title}\n{figure.table()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
