"""The benchmark of decode attention: its short form runs, and wrong results print no speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode_attention

pytestmark = pytest.mark.usefixtures("built")


def test_the_short_form_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A row a case, every time above zero, and torch's threads as they were."""
    threads = torch.get_num_threads()
    decode_attention.main(["--quick", "--threads", "1", "--json", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    printed = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert len(rows) == len(decode_attention.QUICK)
    for row in rows:
        assert row["case"] in printed
        assert all(row[name] > 0 for name in ("ms", "GB/s", "share", "ratio", "best ms"))


@pytest.mark.parametrize("broken", ["out", "mass"])
def test_a_wrong_kernel_gets_no_number(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate sees one wrong element of the output or of the mass."""
    attend = decode_attention.attend

    def wrong(*args: Any) -> Any:
        out, mass = attend(*args)
        (out if broken == "out" else mass).view(-1)[3] += 0.1
        return out, mass

    monkeypatch.setattr(decode_attention, "attend", wrong)
    with pytest.raises(SystemExit, match="no speed is printed"):
        decode_attention.main(["--quick", "--threads", "1"])
    assert "GB/s" not in capsys.readouterr().out
