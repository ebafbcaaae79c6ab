"""The README's marked tables are those of the results; `python -m benchmarks.readme` rewrites them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks import readme
from benchmarks.results_file import BadResults

_ROWS = {
    f"move: {name}": {
        "group": "move",
        "name": name,
        "status": "ok",
        "machine": "a machine",
        "verdicts": [{"text": "twice as fast", "met": True}],
        "measures": [
            {
                "who": "alisa",
                "times": {"p50": ms, "p20": ms, "p80": ms, "calls": 3},
                "note": "", "floor_ms": None, "kv_bytes": None, "peak_bytes": None, "tokens_per_s": None,
            }
        ],
    }
    for name, ms in (("a", 1.25), ("b", 2.5))
}  # fmt: skip


def test_the_readme_is_as_the_results_are() -> None:
    """If this fails: `python -m benchmarks.readme`."""
    before, after = readme.current()
    assert before == after


def test_tables_are_written_between_the_marks_alone() -> None:
    """All cases or some; a second time changes nothing; another number does."""
    text = (
        "before\n<!-- bench:move -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:move: b -->\n<!-- /bench -->\nafter\n"
    )
    once = readme.rewritten(text, _ROWS)
    assert once.startswith("before\n<!-- bench:move -->\n") and once.endswith("<!-- /bench -->\nafter\n")
    assert "\nbetween\n" in once and "old" not in once
    whole, part = once.split("between")
    assert whole.count("| 1.25 |") == 1 and whole.count("| b") == 1 and "a: twice as fast: met" in whole
    assert "1.25" not in part and part.count("| b") == 1
    assert readme.rewritten(once, _ROWS) == once
    assert readme.rewritten(once.replace("1.25", "1.24"), _ROWS) == once != once.replace("1.25", "1.24")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:move -->\n", "pairs"),
        ("<!-- bench:nothing -->\n<!-- /bench -->", "no results of `nothing`"),
        ("<!-- bench:move: c -->\n<!-- /bench -->", "no case 'c'"),
    ],
)
def test_marks_that_lead_nowhere_are_refused(text: str, message: str) -> None:
    """Rather than left as they are."""
    with pytest.raises(BadResults, match=message):
        readme.rewritten(text, _ROWS)
