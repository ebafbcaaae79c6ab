"""On a real GPU: the tiers against everything on one device, and the Triton kernels against their references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

import alisa_compile
from alisa_compile.kernels.cuda_transfers import HostMemory
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, close, random_block
from tests.support import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HEADS = Heads(dim=64)
_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "policy", [{"refresh": 8}, {"policy": "churn"}, {"sparsity": 0.0}], ids=["swa", "churn", "dense"]
)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_tiers_on_the_gpu(policy: dict[str, Any], kv_dtype: str) -> None:
    """A prompt beyond the quota and 60 steps: what attention gives, and the rows on both tiers."""
    generator = torch.Generator().manual_seed(5)
    common = {"capacity": 200, "layers": 2, "batch": 2, "dtype": torch.float32, "kv_dtype": kv_dtype, **policy}
    sizes = TierSizes(device=40, host=200, disk=0, staging=16)
    ours, theirs = Driver(HEADS, sizes=sizes, device="cuda", **common), Driver(HEADS, **common)
    for tokens in (60, *[1] * 60):
        block = random_block(generator, HEADS, tokens, layers=2, batch=2, dtype=torch.float32)
        there = Block(*(tensor.cuda() for tensor in (block.query, block.key, block.value)))
        close(ours.forward(there).cpu(), theirs.forward(block), torch.float32)
    for layer in range(2):
        for mine, other in zip(ours.store.read(layer, 0, 120), theirs.store.read(layer, 0, 120), strict=True):
            if mine is not None and other is not None:
                assert torch.equal(mine.cpu(), other)
    assert ours.store.counters()[1] > 0


def test_a_steady_step_does_not_wait() -> None:
    """Torch raises where an operator makes the host wait for the GPU."""
    generator = torch.Generator().manual_seed(5)
    sizes = TierSizes(device=40, host=200, disk=0, staging=16)
    driver = Driver(HEADS, sizes=sizes, device="cuda", capacity=200, layers=2, batch=2, dtype=torch.float32, refresh=8)
    blocks = [random_block(generator, HEADS, n, layers=2, batch=2, dtype=torch.float32) for n in (60, *[1] * 40)]
    there = [Block(*(tensor.cuda() for tensor in (block.query, block.key, block.value))) for block in blocks]
    for block in there[:12]:  # kernels are compiled and tuned
        driver.forward(block)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in there[12:]:
            driver.forward(block)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert driver.store.counters()[1] > 0


def test_a_kernel_reads_and_writes_pinned_memory_in_place() -> None:
    """No copy of the host's pool: what the device scatters is there on the host."""
    host = torch.zeros((64, 33))
    memory = HostMemory(host, None, torch.device("cuda", torch.cuda.current_device()))
    slots = torch.arange(0, 64, 3, device="cuda")
    packed = torch.randn((len(slots), 33), device="cuda")
    torch.ops.alisa.scatter_rows(memory.pool[0], slots, packed)
    assert torch.equal(torch.ops.alisa.gather_rows(memory.pool[0], slots), packed)
    torch.cuda.synchronize()
    assert torch.equal(host[::3], packed.cpu())
    memory.release()


def test_generate_with_half_of_the_kv_on_the_gpu() -> None:
    """A model end to end through Inductor: the tokens of the same policy with everything on the device."""
    model = tiny_model("llama").cuda()
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    tokens, moved = [], 0
    for budgets in ({}, {"device_kv_budget": "176KiB", "host_kv_budget": "1MiB"}):
        compiled = torch.compile(model, backend="alisa", options={"policy": "churn", "max_rows": None, **budgets})
        tokens.append(compiled.generate(ids, **options))
        moved = alisa_compile.report(compiled).to_dict()["bytes_moved"]["host_to_device"]
        alisa_compile.release(compiled)
    assert torch.equal(*tokens)
    assert moved > 0


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"policy": "h2o"}], ids=str)
def test_cuda_graphs_of_decode_steps(options: dict[str, Any]) -> None:
    """What Inductor generates around our kernels, captured and replayed: the tokens of the steps that are not."""
    model = tiny_model("llama").cuda()
    ids = torch.randint(2, 128, (2, 300), generator=torch.Generator().manual_seed(0)).cuda()
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
    tokens = []
    for cuda_graphs in (False, True):
        compiled = torch.compile(model, backend="alisa", options=options)
        skipped = counters["inductor"]["cudagraph_skips"]
        with torch._inductor.config.patch({"triton.cudagraphs": cuda_graphs}):
            tokens.append(compiled.generate(ids, **asked))
        assert counters["inductor"]["cudagraph_skips"] == skipped
        alisa_compile.release(compiled)
        torch._dynamo.reset()
    assert torch.equal(*tokens)


@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_on_the_gpu(marks: str) -> None:
    """The numerics of `tests/kernels/triton/interpreted`, not interpreted: its files at a time, because compiling the
    kernels takes most of their time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pytest_on = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    processes = [
        subprocess.Popen([*pytest_on, str(file)], cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for file in sorted((_ROOT / "tests/kernels/triton/interpreted").glob("test_*.py"))
    ]
    outputs = [process.communicate()[0] for process in processes]
    fine = (0,) if marks == "not slow" else (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    failed = [
        output[-6000:] for process, output in zip(processes, outputs, strict=True) if process.returncode not in fine
    ]
    assert processes and not failed, "\n".join(failed)
