"""Measure every row of the registry, or some, and print the tables.

    alisa bench [--only TEXT ...] [--quick] [--fresh] [--out FILE.json] [--list]    # or python -m benchmarks.run
    alisa bench --compare OLD.json NEW.json

Results are kept in --out after every row, with CSV and PNG files of the same name beside it. Rows that are there
already, from the same commit and machine, are skipped: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from alisa_compile.tools.bench import add_flags
from benchmarks import compare, isolated, tables
from benchmarks.machine import machine_line
from benchmarks.registry import Row, all_rows
from benchmarks.results_file import BadResults, ResultsFile

RESULTS = Path(__file__).parent / "results" / "bench.json"
_QUICK = RESULTS.parent.parent.parent / ".cache" / "bench-quick.json"  # says nothing, so it is not kept


def chosen(only: Sequence[str]) -> list[Row]:
    """Rows whose id contains one of the texts; all where there is none."""
    return [row for row in all_rows() if not only or any(text in row.id for text in only)]


def measure(rows: Sequence[Row], results: ResultsFile, *, quick: bool, quiet: bool) -> None:
    """Each row that is not in the results yet."""
    host = machine_line()
    left = [row for row in rows if not results.finished(row.id, row.definition(quick), host)]
    if len(left) < len(rows) and not quiet:
        print(f"{len(rows) - len(left)} of {len(rows)} rows are in {results.path.name} already", file=sys.stderr)
    tqdm.set_lock(threading.RLock())  # its default is shared with processes, which rows that are killed never give back
    bar = tqdm(left, unit="row", file=sys.stderr, dynamic_ncols=True, disable=quiet)
    for row in bar:
        bar.set_description(row.id[:40])
        found = isolated.run(row, quick)
        if found["status"] != "ok" and not quiet:
            bar.write(f"{row.id}: {found['reason']}", file=sys.stderr)
        about = {"group": row.group, "name": row.name, "gate": row.gate, "parameters": row.arguments(quick)}
        results.add(row.id, {**about, "definition": row.definition(quick), "host": host, **found})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a row has no number, 2 where the command line or a file is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    add_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    options = parser.parse_args(argv)
    rows = chosen(options.only)
    if not rows:
        print(f"no row contains any of {options.only}; --list shows all", file=sys.stderr)
        return 2
    try:
        if options.compare:
            print(compare.compare(*options.compare))
            return 0
        if options.list:
            print("\n".join(f"{row.id}  [{row.gate}]" for row in rows))
            return 0
        path = options.out or (_QUICK if options.quick else RESULTS)
        _QUICK.parent.mkdir(exist_ok=True)
        if not path.parent.is_dir():
            raise BadResults(f"there is no folder {path.parent}")
        results = ResultsFile(path, fresh=options.fresh)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the row's process, too
        try:
            measure(rows, results, quick=options.quick, quiet=options.quiet)
        finally:
            signal.signal(signal.SIGTERM, before)
    except BadResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the next row", file=sys.stderr)
        return 130
    found = {row.id: results.rows[row.id] for row in rows}
    print(tables.text(found, shutil.get_terminal_size((100, 24)).columns))
    tables.write_csv(results.rows, path.with_suffix(".csv"))
    if importlib.util.find_spec("matplotlib") is not None:
        tables.plot(results.rows, path.with_suffix(".png"))
    return int(any(row["status"] != "ok" for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
