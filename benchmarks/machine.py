"""Where numbers come from: the machine line that stands above every table, and the folder of models and texts."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch
import transformers

from alisa_compile.runtime.profile import processor_name

ASSETS = Path(__file__).parent / "assets"


def machine_line() -> str:
    """Processor, threads, versions and commit."""
    return (
        f"{processor_name()}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, commit {_commit()}"
    )


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
