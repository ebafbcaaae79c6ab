"""Every reason that a pass can give has an advice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from alisa_compile import passes
from alisa_compile.passes import causal_mask, fold_eager_attention, fuel
from alisa_compile.passes.record import GraphRecord, PassRecord, Stage
from alisa_compile.runtime.report import SkipRow
from alisa_compile.tools.advice import advice, explain

FOLDER = Path(str(passes.__file__)).parent
CONSTANTS = {
    "PREPARED_OUTSIDE": causal_mask.PREPARED_OUTSIDE,
    "_SECOND_SUM": fold_eager_attention._SECOND_SUM,
    "fuel.OUT_OF_FUEL": fuel.OUT_OF_FUEL,
}


def _text(node: ast.expr) -> str | None:
    """A text of the source, with a placeholder where a value is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "something" for part in node.values)
    return CONSTANTS.get(ast.unparse(node))


def _reasons() -> Iterator[str]:
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Refusal", "SkipRow") and node.args:
                text = _text(node.args[-1])
                if text is not None:
                    yield text
            if isinstance(node, ast.FunctionDef) and node.name == "_obstacle":
                for found in ast.walk(node):
                    if isinstance(found, ast.Return) and found.value is not None:
                        branches = (
                            [found.value.body, found.value.orelse]
                            if isinstance(found.value, ast.IfExp)
                            else [found.value]
                        )
                        yield from (text for text in map(_text, branches) if text is not None)


REASONS = sorted(set(_reasons()))


def test_the_reasons_were_found() -> None:
    """The scan above sees the passes."""
    assert len(REASONS) > 60 and fuel.OUT_OF_FUEL in REASONS


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_an_advice(reason: str) -> None:
    """A new reason without one fails here."""
    assert advice(reason)


def test_reasons_are_grouped() -> None:
    """Each once, with the places it was given for; a reason nobody knows is to be reported."""
    rows = tuple(SkipRow(f"attention_{layer}", layer, "it uses dropout (training mode)") for layer in range(5))
    rows += (SkipRow("odd", None, "never heard of"),)
    stage = Stage("a graph", ())
    text = explain([GraphRecord("decode", (PassRecord("a pass", stage, stage),), rows)])
    assert text.count("it uses dropout") == 1 and "and 2 more" in text and "model.eval()" in text
    assert "please report" in text.partition("never heard of")[2]
    empty = explain([GraphRecord("decode", (PassRecord("a pass", stage, stage),), ())])
    assert "every attention was rewritten" in empty
