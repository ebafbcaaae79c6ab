"""The file of finished rows: what is in it, measured by this code on this machine, is not measured again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = "alisa bench 1"


class BadResults(Exception):
    """A file that holds no results; its text says which and what to do."""


class ResultsFile:
    """Rows by their id, in a JSON file that is whole after every row."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {} if fresh or not path.exists() else read(path)

    def finished(self, row_id: str, definition: str, machine: str) -> bool:
        """Whether a number for exactly this is there. Rows that failed are tried again."""
        row = self.rows.get(row_id)
        if row is None or row["status"] != "ok":
            return False
        return (row["definition"], row["host"]) == (definition, machine)

    def add(self, row_id: str, result: dict[str, Any]) -> None:
        """Keep a row, and the file with it."""
        self.rows[row_id] = result
        write_whole(self.path, {"format": FORMAT, "rows": self.rows})


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """JSON; an interruption leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file that `ResultsFile` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise KeyError("format")
        rows: dict[str, dict[str, Any]] = content["rows"]
        for row in rows.values():
            row["status"], row["group"], row["name"], row["definition"], row["host"]
    except OSError as error:
        raise BadResults(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadResults(f"{path} holds no results of `alisa bench`; give --out another name") from None
    return rows
