"""pytest plugin, `-p tests.hf.support_table --support-table FILE`: what `test_modes.py` found, family by mode.

A Markdown table. `make test-all` uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

BEGIN, END = "<!-- families: written by tests/hf/support_table.py -->", "<!-- end of families -->"
_cells: dict[tuple[str, str], str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option."""
    parser.addoption("--support-table", metavar="FILE", help="write family x generation mode as run in this session")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember one cell."""
    for name, value in report.user_properties:
        if name == "support" and report.when == "call":
            family, mode, outcome = value  # type: ignore[misc]
            _cells[family, mode] = outcome if report.passed else "FAILED"


def pytest_sessionfinish(session: Any) -> None:
    """Write the table."""
    path = session.config.getoption("--support-table")
    if not path or not _cells:
        return
    families, modes = (list(dict.fromkeys(key[place] for key in _cells)) for place in (0, 1))
    rows = [[mode, *(_cells.get((family, mode), "not run") for family in families)] for mode in modes]
    # Families are many and modes are few, but names of families are short enough to stand on the left.
    turned = [list(column) for column in zip(*rows, strict=True)]
    numbers = [f"{number}" for number in range(1, len(modes) + 1)]
    table = tabulate(
        [[family, *cells] for family, cells in zip(families, turned[1:], strict=True)],
        headers=["", *numbers],
        tablefmt="github",
    )
    legend = "\n".join(f"{number}. {mode}" for number, mode in zip(numbers, modes, strict=True))
    Path(path).write_text(
        "# Model families and generation modes\n\n"
        "Written by `make test-all` (tests/hf/test_modes.py): small random models against stock transformers at "
        "sparsity 0.\n`yes`: attention rewritten, and the mode's result is stock's. `dense`: the same result, with "
        "attention left dense and the reason\nin a warning and in the report. `no cache`: the mode passes an "
        "AlisaCache of one's own, which such a model refuses by a typed\n"
        f"error.\n\n{table}\n\n{legend}\n",
        encoding="utf-8",
    )


def families_table() -> str:
    """The README's table of model families, from the cases of `test_families.py`."""
    from tests.hf.test_families import REFUSED, REWRITTEN

    refused = "; ".join(f"{family}: {reason}" for family, (_, reason) in REFUSED.items())
    return (
        f"{BEGIN}\n\n| | families |\n|---|---|\n"
        f"| rewritten, exact | {'; '.join(REWRITTEN)} |\n"
        f"| left dense, exact, with the reason | {refused} |\n\n{END}"
    )
