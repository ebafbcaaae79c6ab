"""The file of measured cells: what is in it is not measured again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import AlisaError

_FORMAT = "alisa eval 1"


class Results:
    """Cells by their settings, in memory and, given a path, in a JSON file that is whole after every cell.

    A cell's settings hold everything that decides its numbers, so one file may collect several models and texts.
    """

    def __init__(self, path: Path | None, machine: str, command: str) -> None:
        self._path = path
        self._about = {"format": _FORMAT, "machine": machine, "command": command}
        self._cells: dict[str, dict[str, Any]] = {}
        self._take_over()

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a finished cell."""
        cell = self._cells.get(_key(settings))
        return None if cell is None else cell["result"]

    def _take_over(self) -> None:
        """Know the cells that are in the file, which another run may be filling too."""
        for cell in _read(self._path) if self._path is not None else []:
            self._cells.setdefault(_key(cell["settings"]), cell)

    def add(self, settings: dict[str, Any], result: dict[str, Any], seconds: float) -> None:
        """Keep a finished cell."""
        self._cells[_key(settings)] = {"settings": settings, "result": result, "seconds": round(seconds, 2)}
        if self._path is None:
            return
        self._take_over()
        text = json.dumps({**self._about, "cells": list(self._cells.values())}, indent=1)
        partial = self._path.with_name(self._path.name + ".partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self._path)  # an interruption leaves the old file or the new one
        except OSError as error:
            raise AlisaError(f"cannot write the results: {error.strerror}", got=self._path) from error


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _read(path: Path) -> list[dict[str, Any]]:
    """The cells of an earlier run; a file of anything else is never written over."""
    if not path.parent.is_dir():
        raise AlisaError("there is no such folder for --out", got=path.parent)
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise KeyError("format")
        cells: list[dict[str, Any]] = content["cells"]
        for cell in cells:
            cell["settings"], cell["result"]
    except OSError as error:
        raise AlisaError(f"cannot read the earlier results: {error.strerror}", got=path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise AlisaError(
            "this file holds no results of `alisa eval`", got=path, fix="give --out the name of a new file"
        ) from error
    return cells
