"""The memory of CPU pools: huge pages where Linux has them, handed out by torch."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from alisa_compile.runtime.tiers import Pool, RowForm, RowShape, Tier
from benchmarks.memory import allocated

HUGE_PAGE = 2 << 20


def _flags(address: int) -> set[str]:
    """Flags of the mapping that holds an address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):
            start, end = (int(edge, 16) for edge in first.split("-"))
            found = start <= address < end
        elif found and first == "VmFlags:":
            return set(others)
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/proc/self/smaps").exists(), reason="no huge pages to ask for"
)
@pytest.mark.parametrize("form", list(RowForm))
def test_rows_and_scales_of_a_pool_have_huge_pages(form: RowForm) -> None:
    """Each whole huge page of them is advised (hg); all zeros."""
    pool = Pool.allocate(Tier.DEVICE, RowShape(8, 16, torch.bfloat16, form), 100_000, torch.device("cpu"))
    assert (pool.scales is not None) == (form is RowForm.KV_INT8)
    for tensor in (pool.rows, pool.scales):
        if tensor is None:
            continue
        assert tensor.nbytes > 2 * HUGE_PAGE and not tensor.any()
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        last = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
        assert first < last
        for address in (first, last - 1):
            assert "hg" in _flags(address)


def test_pools_are_counted_where_torch_hands_memory_out() -> None:
    """Budgets are checked against torch's allocator, which memory from elsewhere would pass by."""
    shape = RowShape(8, 16, torch.bfloat16, RowForm.KV_INT8)
    pool, memory = allocated(lambda: Pool.allocate(Tier.DEVICE, shape, 100_000, torch.device("cpu")))
    assert pool.scales is not None
    assert pool.rows.nbytes + pool.scales.nbytes <= memory.held < pool.rows.nbytes + pool.scales.nbytes + 4096
