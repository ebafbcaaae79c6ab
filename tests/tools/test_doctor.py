"""`alisa doctor`: what it says about this machine, and about worse ones."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import compat
from alisa_compile.kernels import native
from alisa_compile.runtime.profile import FOLDER_VARIABLE, MachineProfile, Table, profile_path
from alisa_compile.tools import cli, doctor

CPU = torch.device("cpu")
ON_CPU = ["doctor", "--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))


def save_profile() -> None:
    rates = Table(((256.0, 1e9), (65536.0, 12.5e9)))
    times, products = Table(((1.0, 1e-9), (1e4, 1e-6)), grows=True), Table(((1.0, 1e-7),), grows=True)
    profile = MachineProfile("test", "cpu", "bfloat16", rates, rates, rates, rates, times, products, 1e-6)
    profile.save(profile_path(CPU, torch.bfloat16))


def statuses(*flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], dict[str, str]]:
    code = cli.main([*ON_CPU, "--json", *flags])
    answer = json.loads(capsys.readouterr().out)
    return code, answer, {finding["name"]: finding["status"] for finding in answer["findings"]}


@pytest.mark.skipif(not native.register_native(), reason="needs a C++ compiler")
def test_good_machine(capsys: pytest.CaptureFixture[str]) -> None:
    save_profile()
    assert cli.main(ON_CPU) == 0
    out = capsys.readouterr().out
    assert out.startswith("alisa ") and "decoding will be fast" in out.splitlines()[0]
    for text in (torch.__version__, "finds backend", "12.50", "rows of 64 KiB", "fast decode steps, by native kernels"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 79
    assert "MISSING" not in out and "Does not work here" not in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    save_profile()
    code, answer, found = statuses(capsys=capsys)
    assert answer["exit_code"] == code and answer["device"] == "cpu" and answer["dtype"] == "bfloat16"
    assert answer["profile"]["bytes_per_second"]["host_to_device"] == {"256": 1e9, "65536": 12.5e9}
    assert answer["budgets"]["device"] > 0
    assert found["speed"] == "ok"


def test_no_profile_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    save_profile()
    _, answer, found = statuses("--dtype", "float32", capsys=capsys)  # the saved one is of bfloat16
    assert found["speed"] == "note" and answer["profile"] is None
    assert any("predicted step times" in line for line in answer["does_not_work"])


def test_damaged_profile_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    save_profile()
    profile_path(CPU, torch.bfloat16).write_text("{}")
    assert statuses(capsys=capsys)[2]["speed"] == "note"


def test_profile_is_refreshed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only when it is asked for, and in the file where plans look."""
    calls = []

    def measure(device: torch.device, dtype: torch.dtype) -> MachineProfile:
        calls.append((device, dtype))
        save_profile()
        return MachineProfile.load(profile_path(device, dtype))

    monkeypatch.setattr(doctor, "measure", measure)
    assert statuses(capsys=capsys)[2]["speed"] == "note" and not calls
    assert statuses("--profile", capsys=capsys)[2]["speed"] == "ok"
    assert calls == [(CPU, torch.bfloat16)]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(compat, "cpp_compiler", broken)
    monkeypatch.setattr(compat, "load_cpp_library", broken)
    assert cli.main(ON_CPU) == 1
    out = capsys.readouterr().out
    assert "something is missing" in out.splitlines()[0]
    assert "install g++ or clang" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 79
    works, fails = out.split("Does not work here")
    assert "generate()" in fails and "fast decode steps" in fails and "generate()" not in works


def test_kernels_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ALISA_NATIVE", "0")
    code, _, found = statuses(capsys=capsys)
    assert (code, found["CPU kernels"], found["torch"]) == (1, "missing", "ok")


@pytest.mark.parametrize(("version", "status"), (("4.48.0", "missing"), ("6.0.0", "missing"), ("5.18.1", "ok")))
def test_library_versions(
    version: str, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against what the installed metadata of alisa asks for."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else real(name))
    code, _, found = statuses(capsys=capsys)
    assert (found["transformers"], code) == (status, int(status == "missing"))


def test_no_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    code, answer, found = statuses(capsys=capsys)
    assert (code, found["transformers"]) == (1, "missing")
    assert any("generate()" in line for line in answer["does_not_work"])


def test_memory_is_no_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "file_system", lambda folder: "tmpfs")
    _, answer, found = statuses(capsys=capsys)
    text = next(finding["text"] for finding in answer["findings"] if finding["name"] == "disk tier")
    assert found["disk tier"] == "note" and "is memory" in text


def test_gpu_without_triton() -> None:
    """What would be said on a GPU where Triton is missing, and where it is not."""
    good = {name: doctor.Finding(name, doctor.OK, "") for name in ("torch", "torch.compile", "transformers", "speed")}
    lacking = {**good, "triton": doctor.Finding("triton", doctor.MISSING, "")}
    works, fails = doctor._verdicts(True, lacking)
    assert not any("fast decode" in line for line in works) and any("without Triton" in line for line in fails)
    works, fails = doctor._verdicts(True, {**good, "triton": doctor.Finding("triton", doctor.OK, "")})
    assert any("Triton kernels" in line for line in works) and any("disk" in line for line in fails)


def test_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--device", "nonsense"]) == 2
    assert "cannot use this device" in capsys.readouterr().err
