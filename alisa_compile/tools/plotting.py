"""What the commands that draw have in common: refuse a file before the work, and do without matplotlib in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import AlisaError
from .progress import Progress

_KINDS = (".png", ".svg", ".pdf")


def check_plot(path: Path | None) -> None:
    """Raise unless a plot can be written there; None is no plot."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise AlisaError("there is no such folder for --plot", got=path.parent)
    if path.suffix.lower() not in _KINDS:
        raise AlisaError("no plot can be drawn into this file", got=path, expected=", ".join(_KINDS))


def can_plot(path: Path | None, progress: Progress) -> bool:
    """Whether a plot was asked for and matplotlib is there; a line says so if it is not."""
    if path is None:
        return False
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    progress.line("no plot will be drawn: matplotlib is missing (pip install 'alisa-compile[plot]')")
    return False
