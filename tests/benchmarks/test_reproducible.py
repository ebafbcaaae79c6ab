"""The commands behind accuracy and the paper's figures, each in two processes: the same files to the last byte.

Only what is measured in seconds may differ; it has fields of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from tests.support import ASSETS, NOVEL

ROOT = Path(__file__).resolve().parents[2]
TIMES = ("seconds",)  # fields that hold times
EVAL = ["eval", "--model", str(NOVEL), "--text", str(ASSETS / "moby-dick-excerpt.txt"), "--quiet"]
EVAL += ["--samples", "3", "--sample-tokens", "60", "--prompt-tokens", "20", "--trials", "1", "--recall-lengths", "60"]
EVAL += ["--recall-depths", "0.5", "--policies", "swa,h2o", "--sparsities", "0.8", "--batch-size", "2"]
EVAL += ["--variant", "paper=true", "--out", "accuracy.json", "--plot", "accuracy.png"]
SCRIPT = f"""
import sys
from alisa_compile.tools.cli import main as alisa
from benchmarks.figures.__main__ import main as figures
sys.exit(alisa({EVAL!r}) or figures(["3", "4", "8", "10", "--small", "--out", "."]))
"""


def run(folder: Path, threads: int) -> dict[str, bytes]:
    """Contents of the files by name, and what the commands printed. Hashes of text differ from process to process."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONHASHSEED", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {**files, "standard output": done.stdout.encode()}


def without_times(value: Any) -> Any:
    """JSON without the fields that hold times."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def comparable(name: str, content: bytes) -> bytes:
    if not name.endswith(".json"):
        return content
    return json.dumps(without_times(json.loads(content)), indent=1).encode()


def test_a_second_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """On two threads, where reductions could be split in other places."""
    first, second = (run(tmp_path / name, threads=2) for name in ("first", "second"))
    figures = [f"figure{number}.{suffix}" for number in ("03", "04", "08", "10") for suffix in ("json", "md", "png")]
    assert sorted(first) == sorted([*figures, "accuracy.json", "accuracy.png", "standard output"])
    assert sorted(second) == sorted(first)
    different = [name for name in first if comparable(name, first[name]) != comparable(name, second[name])]
    assert not different
    cells = json.loads(first["accuracy.json"])["cells"]
    assert len(cells) == 3 * 4  # dense and three lines, each with perplexity and two forms of recall
    assert all(set(cell) == {"settings", "result", "seconds"} for cell in cells)
