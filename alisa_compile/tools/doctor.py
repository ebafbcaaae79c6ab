"""`alisa doctor`: what is installed, how fast this machine is, and what of alisa will and will not work on it."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import Any

import torch
from tabulate import tabulate
from torch.torch_version import TorchVersion

from .. import __version__, compat
from ..config import AlisaConfig
from ..errors import AlisaError, ProfileError
from ..kernels.native import native_source, register_native
from ..runtime.budgets import Budgets, format_bytes, resolve
from ..runtime.disk import IN_MEMORY, file_system
from ..runtime.profile import MachineProfile, Table, measure, processor_name, profile_path

EXIT_MISSING = 1  # 0 = decoding will be fast
OK, NOTE, MISSING = "ok", "note", "missing"
_WIDTH = 79
_REQUIREMENT = re.compile(r"(>=|<)\s*([\w.]+)")  # the comparisons that our own requirements use


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at. status: `ok`, `note` (works, but is worth knowing) or `missing`."""

    name: str
    status: str
    text: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `alisa doctor` prints. budgets: bytes by tier that `auto` would give now, without a model."""

    device: str
    dtype: str
    findings: tuple[Finding, ...]
    works: tuple[str, ...]
    does_not_work: tuple[str, ...]
    budgets: dict[str, int]
    profile: MachineProfile | None

    @property
    def exit_code(self) -> int:
        """`EXIT_MISSING` if something is missing without which decoding is slow or does not run."""
        return EXIT_MISSING if any(finding.status == MISSING for finding in self.findings) else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; bandwidths in bytes a second by bytes of a row."""
        answer = dataclasses.asdict(self)
        answer["profile"] = None if self.profile is None else _bandwidths(self.profile)
        return {"alisa": __version__, "exit_code": self.exit_code, **answer}

    def __str__(self) -> str:
        marks = {OK: "", NOTE: "note", MISSING: "MISSING"}
        rows = [
            (item.name, marks[item.status], f"{item.text}{f' To fix: {item.fix}.' if item.fix else ''}")
            for item in self.findings
        ]
        left = _WIDTH - max(len(name) for name, _, _ in rows) - max(len(mark) for _, mark, _ in rows) - 4
        rows = [(name, mark, textwrap.fill(text, left, break_on_hyphens=False)) for name, mark, text in rows]
        verdict = "something is missing" if self.exit_code else "decoding will be fast"
        parts = [
            f"alisa {__version__} on {self.device} in {self.dtype}: {verdict}",
            tabulate(rows, tablefmt="plain", disable_numparse=True),
        ]
        if self.profile is not None:
            parts.append(_speed_table(self.profile))
        for title, lines in (("Works here", self.works), ("Does not work here", self.does_not_work)):
            if lines:
                bullets = (textwrap.fill(line, _WIDTH, initial_indent="- ", subsequent_indent="  ") for line in lines)
                parts.append("\n".join((title, *bullets)))
        return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; returns the exit code."""
    device = _device(arguments.device)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    if arguments.profile:
        if not arguments.quiet:
            print(f"alisa: measuring {device} in {arguments.dtype}, which takes some seconds", file=sys.stderr)
        measure(device, dtype).save(profile_path(device, dtype))
    diagnosis = diagnose(device, dtype)
    print(json.dumps(diagnosis.to_dict()) if arguments.json else diagnosis)
    return diagnosis.exit_code


def diagnose(device: torch.device, dtype: torch.dtype) -> Diagnosis:
    """Look at everything. Builds the native kernels if they are not built yet; measures nothing else."""
    on_gpu = device.type == "cuda"
    kernels = _native_kernels()
    budgets = resolve(AlisaConfig(disk_kv_budget="auto"), device, 0, 0)
    profile, profile_finding = _profile(device, dtype)
    findings = (
        Finding("Python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _library("torch", ""),
        _library("transformers", "hf", " Without it there is no generate and no plan."),
        _backend(),
        Finding("processor", OK, f"{processor_name()}; torch uses {torch.get_num_threads()} thread(s)."),
        _gpu(device),
        _triton(on_gpu),
        _compiler(),
        dataclasses.replace(kernels, status=NOTE) if on_gpu and kernels.status == MISSING else kernels,
        _pinned_memory(on_gpu),
        _memory(budgets, on_gpu),
        _disk(),
        profile_finding,
    )
    works, does_not_work = _verdicts(on_gpu, {finding.name: finding for finding in findings})
    return Diagnosis(
        str(device),
        str(dtype).removeprefix("torch."),
        findings,
        works,
        does_not_work,
        budgets.by_tier,
        profile,
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AlisaError("cannot use this device", got=name, expected="such as cpu or cuda:0, present here") from error
    return device


def _library(name: str, extra: str, without: str = "") -> Finding:
    """An installed library beside the versions that alisa asks for."""
    install = f"pip install 'alisa-compile{f'[{extra}]' if extra else ''}'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, MISSING, f"not installed.{without}", install)
    wanted = _wanted(name)
    if not _satisfies(version, wanted):
        return Finding(name, MISSING, f"{version}, but alisa needs {','.join(map(''.join, wanted))}.", install)
    return Finding(name, OK, version)


def _wanted(name: str) -> list[tuple[str, str]]:
    """What alisa's own metadata asks of a library; nothing where alisa was never installed."""
    try:
        lines = importlib.metadata.requires("alisa-compile") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    line = next((line for line in lines if re.match(rf"{name}\b", line)), "")
    return _REQUIREMENT.findall(line.split(";")[0])


def _satisfies(version: str, wanted: list[tuple[str, str]]) -> bool:
    have = TorchVersion(version)  # compares any version with text, as packaging does
    return all(have >= limit if comparison == ">=" else have < limit for comparison, limit in wanted)


def _backend() -> Finding:
    if "alisa" in torch.compiler.list_backends(exclude_tags=None):
        return Finding("torch.compile", OK, 'finds backend="alisa".')
    return Finding("torch.compile", MISSING, 'does not find backend="alisa".', "install alisa with pip (-e for a copy)")


def _gpu(device: torch.device) -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", OK, "none that torch can use; alisa decodes on the CPU.")
    index = device if device.type == "cuda" else torch.device("cuda")
    free, total = torch.cuda.mem_get_info(index)
    text = f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of {format_bytes(total)} free."
    return Finding("GPU", OK, text)


def _triton(on_gpu: bool) -> Finding:
    try:
        return Finding("triton", OK, importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        if not on_gpu:
            return Finding("triton", OK, "not installed; only a GPU needs it.")
    text = "not installed; the GPU kernels and Inductor need it."
    return Finding("triton", MISSING, text, "pip install 'alisa-compile[gpu]'")


def _compiler() -> Finding:
    fix = "install g++ or clang, or name one in CXX"
    try:
        command = compat.cpp_compiler()
        version = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except Exception as error:  # torch raises types of its own where it finds none
        return Finding("C++ compiler", MISSING, f"none works ({_first_line(error)}).", fix)
    return Finding("C++ compiler", OK, (version.splitlines() or [command])[0])


def _native_kernels() -> Finding:
    """Build and load the CPU kernels, as the first decode step would."""
    name = "CPU kernels"
    if os.environ.get("ALISA_NATIVE") == "0":
        return Finding(name, MISSING, "switched off by ALISA_NATIVE=0: decoding is several times slower.", "unset it")
    started = time.perf_counter()
    try:
        compat.load_cpp_library(native_source())
    except Exception as error:  # a broken toolchain may raise anything
        text = f"cannot be built ({type(error).__name__}: {_first_line(error)}); decoding is several times slower."
        return Finding(name, MISSING, text, "see the C++ compiler, which Inductor needs too")
    seconds = time.perf_counter() - started
    if not register_native():
        return Finding(name, MISSING, "built, but torch refuses to register them.", "report this with torch's version")
    unit = torch.backends.cpu.get_cpu_capability()
    return Finding(name, OK, f"ready after {seconds:.1f} s (built once, then kept); {unit}.")


def _pinned_memory(on_gpu: bool) -> Finding:
    name = "pinned memory"
    if not on_gpu:
        return Finding(name, OK, "not needed without a GPU.")
    try:
        torch.empty(1 << 20, dtype=torch.uint8).pin_memory()
    except RuntimeError as error:
        text = f"refused ({_first_line(error)}), so transfers are slow."
        return Finding(name, NOTE, text, "raise the limit of locked memory (ulimit -l)")
    return Finding(name, OK, "available.")


def _memory(budgets: Budgets, on_gpu: bool) -> Finding:
    device, host = format_bytes(budgets.device), format_bytes(budgets.host)
    room = f"{device} on the GPU and {host} in host memory" if on_gpu else f"{device} in memory"
    return Finding("memory", OK, f"budgets left at auto now mean {room}, less the model's weights.")


def _disk() -> Finding:
    folder = tempfile.gettempdir()
    kind = file_system(folder)
    text = f"{folder} has {format_bytes(shutil.disk_usage(folder).free)} free"
    if kind in IN_MEMORY:
        text += f", but it is {kind}, which is memory: a disk tier there saves none."
        return Finding("disk tier", NOTE, text, "set disk_path, or TMPDIR, to a folder on a disk")
    return Finding("disk tier", OK, f"{text}{f' ({kind})' if kind else ''}; disk_path names another folder.")


def _profile(device: torch.device, dtype: torch.dtype) -> tuple[MachineProfile | None, Finding]:
    name, path, refresh = "speed", profile_path(device, dtype), "alisa doctor --profile"
    if not path.exists():
        text = "not measured yet, so reports predict no step times."
        return None, Finding(name, NOTE, text, f"{refresh} (some seconds, kept in a file)")
    try:
        profile = MachineProfile.load(path)
    except ProfileError as error:
        return None, Finding(name, NOTE, f"the saved profile is damaged ({error.what}).", refresh)
    day = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    return profile, Finding(name, OK, f"measured on {day}, kept in {path}.")


def _verdicts(on_gpu: bool, found: dict[str, Finding]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What works and what does not, in plain words."""

    def good(*names: str) -> bool:
        return all(found[name].status != MISSING for name in names)

    works: list[str] = []
    fails: list[str] = []

    def judge(is_good: bool, yes: str, no: str) -> None:
        (works if is_good else fails).append(yes if is_good else no)

    compiles = good("torch", "torch.compile") and good("triton" if on_gpu else "C++ compiler")
    judge(
        compiles and good("transformers"),
        "model.generate() of torch.compile(model, backend='alisa')",
        "model.generate() of torch.compile(model, backend='alisa')",
    )
    if on_gpu:
        triton = good("triton")
        judge(
            triton,
            "fast decode steps, by Triton kernels",
            "fast decode steps: without Triton plain torch operations serve (correct, but slow)",
        )
        judge(
            triton,
            "budgets smaller than the KV cache: rows in host memory",
            "budgets smaller than the KV cache: Triton kernels move the rows",
        )
        fails.append("rows on disk: not available on a GPU yet")
    else:
        kernels = good("CPU kernels")
        judge(
            kernels,
            "fast decode steps, by native kernels",
            "fast decode steps: without native kernels plain torch operations serve (correct, but slow)",
        )
        judge(
            kernels,
            "budgets smaller than the KV cache: rows on the host and on disk move while layers compute",
            "moving rows while layers compute: budgets smaller than the KV cache work, but transfers are waited for",
        )
    judge(
        found["speed"].status == OK,
        "predicted step times, in `alisa plan` and in reports",
        "predicted step times in reports, until this machine's speed is measured",
    )
    return tuple(works), tuple(fails)


def _speed_table(profile: MachineProfile) -> str:
    """Bandwidths by row size in GB/s."""
    rates = _bandwidths(profile)["bytes_per_second"]
    sizes = sorted({size for table in rates.values() for size in table})
    lines = [
        (f"rows of {format_bytes(size)}", *(_gigabytes(table.get(size)) for table in rates.values())) for size in sizes
    ]
    heads = ("GB/s", *(name.replace("_", " ") for name in rates))
    shared = (
        ""
        if profile.device != "cpu"
        else "\nDevice and host share one memory here; the disk is read through the page cache."
    )
    return str(tabulate(lines, headers=heads, tablefmt="simple", disable_numparse=True)) + shared


def _gigabytes(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.2f}"


def _bandwidths(profile: MachineProfile) -> dict[str, Any]:
    def by_size(table: Table) -> dict[int, float]:
        return {int(size): rate for size, rate in table.points}

    names = ("device_to_host", "host_to_device", "disk_write", "disk_read")
    return {
        "machine": profile.machine,
        "bytes_per_second": {name: by_size(getattr(profile, name)) for name in names},
        "layer_seconds": profile.layer_seconds,
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
