"""The README says what is: families as tested, every option and policy, and links that lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from alisa_compile.config import POLICIES, AlisaConfig
from tests.hf.support_table import families_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_families_are_those_of_the_tests() -> None:
    """Written by `python -c "from tests.hf.support_table import families_table; print(families_table())"`."""
    assert families_table() in README


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(AlisaConfig)] + list(POLICIES))
def test_every_option_and_policy_is_named(name: str) -> None:
    """In code marks."""
    assert f"`{name}`" in README


def test_files_that_are_named_exist() -> None:
    """Paths in code marks."""
    named = set(re.findall(r"`((?:alisa_compile|benchmarks|tests)/[\w./-]+)`", README))
    assert len(named) > 5
    assert not [path for path in named if not (ROOT / path).exists()]


def test_accuracy_numbers_are_those_of_the_table() -> None:
    """Each line of the README's accuracy table repeats cells of `benchmarks/results/accuracy.md`."""
    measured = [[cell.strip() for cell in line.split("|")] for line in _rows(ROOT / "benchmarks/results/accuracy.md")]
    section = README.split("## What sparsity costs")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(lines) >= 6
    for line in lines:
        name, *numbers = [cell.strip() for cell in line.strip("| ").split("|")]
        label = name.replace("`", "")
        found = [row for row in measured if row[1] == label and row[2] == "80 %"]
        if label == "dense":
            found = [row for row in measured if row[1] == label]
        assert found, label
        row = found[0]
        expected = [row[4].split()[0], row[5].split(" / ")[0], row[6].split(" / ")[0]]
        assert [number.split()[0] for number in numbers[:3]] == expected, label


def _rows(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
