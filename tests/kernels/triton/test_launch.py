"""Which implementation CUDA tensors get, and what is said when it is the slower one."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alisa_compile.errors import NotAvailableError
from alisa_compile.kernels import triton_launch
from alisa_compile.kernels.swa_attention import triton as swa
from alisa_compile.kernels.swa_attention.reference import swa_attention

_OPS = ("swa_attention", "prefill_attention")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CUDA implementation of decode attention, called with CPU tensors that pass for CUDA tensors."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_launch, "_reported", set())
    return triton_launch.triton_first(swa_attention)


def _arguments(dtype: torch.dtype) -> tuple[Any, ...]:
    states = torch.randn((1, 2, 1, 16), dtype=dtype)
    table = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 4)
    pool = torch.randn((4, 2, 2, 16), dtype=dtype)
    return states, pool, None, table, torch.tensor([3]), None, None, None, 0, 0.25


@pytest.mark.parametrize("name", _OPS)
def test_ops_have_a_cuda_implementation(name: str) -> None:
    """Otherwise CUDA tensors would never leave the references."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"alisa::{name}", "CUDA")


@pytest.mark.parametrize("op", ["kv_append", "kv_append.tiered", "swa_attention", "swa_attention.tiered", "kv_select"])
def test_calls_of_ops_stay_out_of_cuda_graphs(op: str) -> None:
    """A call that Inductor has not replaced by kernels may be one of the reference, which reads counts on the host."""
    name, _, overload = op.partition(".")
    assert torch.Tag.cudagraph_unsafe in getattr(getattr(torch.ops.alisa, name), overload or "default").tags


def test_cuda_tensors_get_the_kernel(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of the reference's name in `triton.py` beside it."""
    seen: list[Any] = []
    monkeypatch.setattr(swa, "swa_attention", lambda *args: seen.append(args) or "launched")
    arguments = _arguments(torch.float32)
    assert on_gpu(*arguments) == "launched" and seen[0][0] is arguments[0]


def test_the_reference_serves_what_the_kernel_cannot_hold(on_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With the reason, said once."""
    arguments = _arguments(torch.float64)
    with caplog.at_level(logging.WARNING, logger=triton_launch.__name__):
        out, _ = on_gpu(*arguments)
        on_gpu(*arguments)
    assert torch.equal(out, swa_attention(*arguments)[0])
    assert [record.getMessage() for record in caplog.records] == [
        "alisa::swa_attention uses its slower plain-torch version on this GPU: queries are torch.float64."
    ]


def test_without_triton_the_references_serve(
    on_gpu: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton comes with torch's CUDA builds on Linux, not everywhere else."""
    monkeypatch.setattr(triton_launch, "is_installed", lambda: False)
    with caplog.at_level(logging.WARNING, logger=triton_launch.__name__):
        on_gpu(*_arguments(torch.float32))
    assert "Triton is not installed" in caplog.text


def test_a_reference_inside_a_capture_is_refused(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the GPU, which fails in a capture with an error that says nothing."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NotAvailableError, match=r"cannot be captured.*float64.*reduce-overhead"):
        on_gpu(*_arguments(torch.float64))


def test_configurations_that_do_not_suit_are_not_measured() -> None:
    """The autotuner asks `fits` with the GPU's capability, the arguments and the constants."""
    from triton.runtime import driver

    wide = {"HEADS": 16, "DIM": 256}
    query = torch.zeros(1, dtype=torch.bfloat16)
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        for capability in (75, 80):
            target = SimpleNamespace(get_current_target=lambda arch=capability: SimpleNamespace(arch=arch))
            patch.setattr(driver, "_active", target)
            swa.attend_share.nargs = {"query": query}
            kept[capability] = [config.kwargs["BLOCK"] for config in swa.attend_share.prune_configs(wide)]
    assert set(kept[75]) == {16} and min(kept[80]) == 32


def test_the_package_works_without_triton() -> None:
    """None in `sys.modules` makes an import fail, as on a machine that does not have it."""
    code = "import sys; sys.modules['triton'] = None; import alisa_compile.kernels.triton_launch as launch"
    subprocess.run([sys.executable, "-c", f"{code}; assert not launch.is_installed()"], check=True)
