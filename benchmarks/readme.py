"""Tables in the README that are written from the results, so that the two cannot differ.

    python -m benchmarks.readme        # writes them anew; a test fails where that would change something

Between `<!-- bench:GROUP -->` and `<!-- /bench -->` stands the table of that group of `benchmarks/results/bench.json`;
`<!-- bench:GROUP: CASE; CASE -->` takes some of its cases alone. Between `<!-- gpu -->` and `<!-- /gpu -->` stands what
`benchmarks/gpu_check.py` has measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gpu_table, tables
from benchmarks.results_file import BadResults, read
from benchmarks.run import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
_GPU = re.compile(r"<!-- gpu -->\n.*?<!-- /gpu -->", re.DOTALL)
_MARKED = re.compile(r"<!-- bench:(?P<group>[\w-]+)(?:: (?P<cases>[^>]*?))? -->\n.*?<!-- /bench -->", re.DOTALL)


def rewritten(text: str, rows: Mapping[str, dict[str, Any]]) -> str:
    """The text with every marked table as the results have it."""
    begins, ends = text.count("<!-- bench:"), text.count("<!-- /bench -->")
    if begins != ends or begins != len(_MARKED.findall(text)):
        raise BadResults(f"{begins} times `<!-- bench:... -->` and {ends} times `<!-- /bench -->`: they come in pairs")
    text = _GPU.sub(lambda _: f"<!-- gpu -->\n\n{gpu_table.section(RESULTS.parent)}\n\n<!-- /gpu -->", text)
    return _MARKED.sub(lambda found: _section(found["group"], found["cases"], rows), text)


def _section(group: str, cases: str | None, rows: Mapping[str, dict[str, Any]]) -> str:
    known = tables.by_group(rows).get(group)
    if known is None:
        raise BadResults(f"there are no results of `{group}`; measured groups: {', '.join(tables.by_group(rows))}")
    names = [] if cases is None else [case.strip() for case in cases.split(";")]
    missing = [name for name in names if name not in [row["name"] for row in known]]
    if missing:
        raise BadResults(f"`{group}` has no case {missing[0]!r}; it has {', '.join(row['name'] for row in known)}")
    found = [row for row in known if not names or row["name"] in names]
    marker = f"<!-- bench:{group}{'' if cases is None else f': {cases}'} -->"
    parts = [
        marker,
        "",
        tables.group_table(found, markdown=True),
        "",
        *(f"- {line}" for line in tables.verdicts(found)),
    ]
    parts += [] if parts[-1] == "" else [""]
    parts += [f"Measured on {line}." for line in tables.machines(found)]
    return "\n".join([*parts, "", "<!-- /bench -->"])


def current(path: Path = README) -> tuple[str, str]:
    """The file as it is, and as it should be."""
    text = path.read_text(encoding="utf-8")
    return text, rewritten(text, read(RESULTS))


def main() -> int:
    """Write it."""
    try:
        before, after = current()
    except BadResults as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    README.write_text(after, encoding="utf-8")
    print("README.md is as the results are" if before == after else "README.md was rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
