"""The machine profile: measured once, saved, loaded back; a damaged file is a typed error and a new measurement."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import AlisaError, ProfileError
from alisa_compile.runtime import profile as module
from alisa_compile.runtime.profile import MachineProfile, Table, machine_name, measure, obtain, profile_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured() -> MachineProfile:
    return measure(CPU, torch.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of these tests alone."""
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def count_measurements(measured: MachineProfile, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(module, "measure", lambda *place: (calls.append(place), measured)[1])
    return calls


def test_measured_numbers_are_plausible(measured: MachineProfile) -> None:
    """Rates between a floppy disk's and a cache's; larger cases take longer."""
    for name in ("device_to_host", "host_to_device", "disk_write", "disk_read"):
        table: Table = getattr(measured, name)
        assert len(table.points) >= 2 and all(1e4 < rate < 1e12 for _, rate in table.points), name
    attention = [seconds for _, seconds in measured.attention.points]
    assert attention[-1] > attention[0] > 0
    (first, one), *_, (last, many) = measured.linear.points
    assert first == 1 and last > 1 and many > one
    sizes, factors = zip(*measured.matrix.points, strict=True)
    assert sizes[0] < 2**20 < sizes[-1] and factors[sizes.index(2**20)] == 1 and factors[0] > 1
    assert 1e-8 < measured.layer_seconds < 1e-2
    assert measured.machine == machine_name(CPU) and measured.dtype == "float32"


def test_round_trip(measured: MachineProfile, tmp_path: Path) -> None:
    profile = dataclasses.replace(measured, churn={"decay": 0.01})
    path = tmp_path / "new" / "folder" / "profile.json"
    profile.save(path)
    assert MachineProfile.load(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_measured_once(count_measurements: list[Any], folder: Path) -> None:
    first, second = obtain(CPU, torch.float32), obtain(CPU, torch.float32)
    assert first == second and len(count_measurements) == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]
    obtain(CPU, torch.bfloat16)
    assert len(count_measurements) == 2 and len(list(folder.iterdir())) == 2


def test_other_threads_are_another_machine() -> None:
    before, threads = profile_path(CPU, torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert profile_path(CPU, torch.float32) != before
    finally:
        torch.set_num_threads(threads)


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable, else XDG_CACHE_HOME, else ~/.cache."""
    assert profile_path(CPU, torch.float32).parent == tmp_path / "cache"
    monkeypatch.delenv(module.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert profile_path(CPU, torch.float32).parent == tmp_path / "xdg" / "alisa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile_path(CPU, torch.float32).parent == tmp_path / ".cache" / "alisa"


def damaged(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("damage", "text"),
    (
        (lambda c: "", "JSONDecodeError"),
        (lambda c: json.dumps(c)[:200], "JSONDecodeError"),
        (lambda c: "[]", "TypeError"),
        (lambda c: "null", "TypeError"),
        (lambda c: "{}", "KeyError: 'format'"),
        (lambda c: damaged(c, format=0), "format 0 instead of 2"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "linear"}), "KeyError: 'linear'"),
        (lambda c: damaged(c, attention=[]), "attention has no rising x"),
        (lambda c: damaged(c, attention=[[2, 1], [1, 1]]), "attention has no rising x"),
        (lambda c: damaged(c, disk_read=[[1, 2, 3]]), "ValueError"),
        (lambda c: damaged(c, disk_read=7), "TypeError"),
        (lambda c: damaged(c, disk_read=[["a", "b"]]), "ValueError"),
        (lambda c: damaged(c, host_to_device=[[1, 0]]), "host_to_device holds 0"),
        (lambda c: damaged(c, host_to_device=[[1, float("nan")]]), "host_to_device holds nan"),
        (lambda c: damaged(c, layer_seconds=-1), "layer_seconds holds -1"),
        (lambda c: damaged(c, churn={"decay": 2}), "churn of decay is 2"),
        (lambda c: damaged(c, churn=[]), "AttributeError"),
    ),
)
def test_damaged_file(
    damage: Any, text: str, measured: MachineProfile, count_measurements: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """`load` says what is wrong; `obtain` says it too, measures again and repairs the file."""
    path = profile_path(CPU, torch.float32)
    measured.save(path)
    path.write_text(damage(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(ProfileError, match=text) as caught:
        MachineProfile.load(path)
    assert isinstance(caught.value, AlisaError) and caught.value.got == path and "delete the file" in caught.value.fix
    with caplog.at_level(logging.WARNING):
        assert obtain(CPU, torch.float32) == measured
    assert len(count_measurements) == 1 and "measuring the machine again" in caplog.text
    assert MachineProfile.load(path) == measured


def test_binary_file(measured: MachineProfile, count_measurements: list[Any]) -> None:
    path = profile_path(CPU, torch.float32)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ProfileError, match="UnicodeDecodeError"):
        MachineProfile.load(path)
    assert obtain(CPU, torch.float32) == measured


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot read the machine profile: No such file"):
        MachineProfile.load(tmp_path / "none.json")


def test_folder_that_cannot_be_written(
    measured: MachineProfile,
    count_measurements: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file is in the way of the folder: the measurement is used, with one warning."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(module.FOLDER_VARIABLE, str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING):
        assert obtain(CPU, torch.float32) == measured
    assert caplog.text.count("cannot write the machine profile") == 1


def test_interrupted_writing_keeps_the_old_file(
    measured: MachineProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    measured.save(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ProfileError, match="No space left on device"):
        dataclasses.replace(measured, layer_seconds=1.0).save(path)
    assert MachineProfile.load(path) == measured
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_table() -> None:
    """Lines between the points, constant before them; after them constant, or in proportion where times grow."""
    points = ((10.0, 4.0), (20.0, 2.0), (40.0, 8.0))
    rate, time = Table(points), Table(points, grows=True)
    assert rate.at([0, 10, 15, 30, 40, 400]).tolist() == [4, 4, 3, 5, 8, 8]
    assert time.at([0, 10, 15, 30, 40, 400]).tolist() == [4, 4, 3, 5, 8, 80]
    assert not rate.is_rising and Table(((1.0, 1.0), (2.0, 1.0))).is_rising
