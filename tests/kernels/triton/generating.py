"""What Inductor generates for a GPU that is not here: the code of a graph of fake CUDA tensors, which is never run.

Inductor asks a GPU for its kind, its processors and the sizes of its memories, and Triton for its target: here both are
told. Checked on torch 2.13 with Triton 3.7; a private name that moves is an error here, not a test that passes.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, output_code
from torch._inductor.utils import get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alisa_compile.compat import load_cpp_library
from tests.kernels.triton.compiling import Compiled, CompileOnlyDriver, inspect_kernel

#: Indexing asks the device of a tensor to be made current; torch without CUDA has nobody to ask.
_DEVICE_GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>) }
"""


def register_device_guard() -> None:
    """Let operators on fake CUDA tensors make their device current, for the rest of the process."""
    ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"), mode=ctypes.RTLD_GLOBAL)
    load_cpp_library(_DEVICE_GUARD)


@contextlib.contextmanager
def told_of_gpu(capability: int, **options: Any) -> Iterator[None]:
    """Inside, tensors may be made on `cuda`, and Inductor compiles for a GPU of this compute capability (90 = 9.0) with
    these options of its own."""
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="told", gcnArchName="", major=major, minor=minor, multi_processor_count=132, warp_size=32,
        total_memory=80 << 30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        regs_per_multiprocessor=65536, shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=227 << 10, L2_cache_size=50 << 20,
    )  # fmt: skip
    # Caches would be filled with what no GPU has seen; folding runs operators, and padding of matrices times them.
    options = {"force_disable_caches": True, "joint_graph_constant_folding": False, "shape_padding": False, **options}
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(options), FakeTensorMode():
        patch.setattr(triton.runtime.driver, "_active", CompileOnlyDriver(capability))
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            patch.setattr(owner, "get_device_properties", lambda *_: properties)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(CudaInterface, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(CudaInterface, "get_compute_capability", lambda *_: capability)
        patch.setattr(CudaInterface, "is_available", lambda: True)
        yield


#: Values read by the host, memory of the host that a copy could go to, and ops that may be references.
_WAITS = r"\.item\(|\.tolist\(|\.cpu\(|_cpu\(|synchronize|nonzero|torch\.ops\.alisa"


class Generated:
    """The code of one graph, and what Inductor knows about it.

    mutated, static: indices of inputs that the graph changes, and of those that stay where they are. cuda_graphs: how
    many Inductor would make of it, and why it would make none.
    """

    def __init__(self, code: str, compiled: Any) -> None:
        self.code = code
        self.mutated, self.static = set(compiled.mutated_input_idxs), set(compiled.fx_kwargs["static_input_idxs"])
        self.cuda_graphs = (len(compiled.partition_maps or ()), list(compiled.cudagraph_info.cudagraph_fail_reasons))

    @property
    def kernels(self) -> dict[str, str]:
        """By its name in the code, the source of each kernel of a user of Inductor."""
        pattern = r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)^''', device_str='cuda'\)"
        found = dict(re.findall(pattern, self.code, re.DOTALL | re.MULTILINE))
        return {name: source for name, source in found.items() if "custom_kernel=True" in source}

    @property
    def waits(self) -> list[str]:
        """Lines of the code that let the host wait for the GPU, or that may: calls of ops in Python."""
        functions = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(self.code))
            if isinstance(node, ast.FunctionDef) and re.fullmatch(r"call|partition_\d+", node.name)
        ]
        assert functions
        return [line.strip() for text in functions for line in text.splitlines() if re.search(_WAITS, line)]

    @property
    def launches(self) -> list[tuple[str, list[str]]]:
        """In order, the kernel and the arguments of each launch of one of `kernels`."""
        kernels, found = self.kernels, []
        for line in re.findall(r"^ *(\w+\.run\(.*, stream=\w+\))$", self.code, re.MULTILINE):
            call = ast.parse(line, mode="eval").body
            assert isinstance(call, ast.Call)
            name = line.partition(".")[0]
            if name in kernels:
                found.append((name, [ast.unparse(argument) for argument in call.args]))
        return found

    def compile(self, name: str, capability: int, folder: Path) -> list[Compiled]:
        """A kernel of `kernels` as the GPU would get it, in every configuration that Inductor would measure."""
        path = folder / f"{name}.py"
        path.write_text(self.kernels[name].replace("\\\\", "\\"))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (tuner,) = [value for value in vars(module).values() if hasattr(value, "triton_meta")]
        found = []
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            target, options = GPUTarget("cuda", capability, 32), tuner._create_compile_options(config, meta)
            found.append(inspect_kernel(triton.compile(source, target=target, options=options), capability))
        return found


def generate(function: Callable[..., Any], *args: Any, backend: Any = "inductor") -> Generated:
    """What Inductor makes of a function of fake CUDA tensors; nothing of it is run."""
    seen: list[Any] = []
    inner = compile_fx._compile_fx_inner

    def noting(*given: Any, **options: Any) -> Any:
        seen.append(inner(*given, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(compile_fx, "_compile_fx_inner", noting)
        patch.setattr(output_code, "cudagraph_partition_post_compile", lambda *_: None)  # would prepare the capture
        code = get_code(torch.compile(function, backend=backend), *args)[0]
    return Generated(code, seen[0])
