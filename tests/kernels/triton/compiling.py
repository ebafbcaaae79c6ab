"""Compiles what a launch function launches, for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

#: Shared memory that a program may have, in bytes, by compute capability (CUDA C++ Programming Guide, table of
#: technical specifications: "maximum amount of shared memory per thread block").
SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration as the GPU would get it; sizes in bytes."""

    name: str
    capability: int
    shared: int
    registers: int
    spilled: int
    warps: int
    stages: int


class CompileOnlyDriver:
    """Stands in for a GPU of one kind; kernels are compiled for it and never launched."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # JITFunction keeps one cache of kernels a device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compile_only(capability: int, kernels: list[Any]) -> Iterator[None]:
    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    def compile_each(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    run, driver = JITFunction.run, triton.runtime.driver
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", CompileOnlyDriver(capability))
        patch.setattr(JITFunction, "run", compile_one)
        patch.setattr(Autotuner, "run", compile_each)
        yield


def compile_launches(capability: int, launch: Callable[[], Any]) -> list[Compiled]:
    """Every kernel that `launch()` starts on CPU tensors, in every configuration of its autotuner, as a cubin.

    Specialisation (alignment, arguments equal to 1) is that of the real launch. capability: 75, 80, 90 or 100.
    """
    kernels: list[Any] = []
    with _compile_only(capability, kernels):
        launch()
    assert kernels, "nothing was launched"
    return [inspect_kernel(kernel, capability) for kernel in kernels]


def inspect_kernel(kernel: Any, capability: int) -> Compiled:
    """What a compiled kernel asks of a GPU."""
    usage = _resource_usage(kernel.asm["cubin"])
    return Compiled(
        kernel.metadata.name,
        capability,
        kernel.metadata.shared,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the binary asks of a GPU. A kernel without arrays of its own has a stack for spilled registers alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}


def check_fits(compiled: list[Compiled]) -> None:
    """No spills, and at least one configuration of every kernel has room in the GPU's shared memory; prints both.

    The autotuner drops configurations without room by itself.
    """
    for kernel in compiled:
        print(
            f"sm_{kernel.capability} {kernel.name}: {kernel.shared} B shared, {kernel.registers} registers, "
            f"{kernel.spilled} B spilled, {kernel.warps} warps, {kernel.stages} stages"
        )
    assert [kernel for kernel in compiled if kernel.spilled] == [], "registers are spilled"
    for name in {kernel.name for kernel in compiled}:
        smallest = min(kernel.shared for kernel in compiled if kernel.name == name)
        assert smallest <= SHARED_MEMORY[compiled[0].capability], f"{name} needs {smallest} B of shared memory"
