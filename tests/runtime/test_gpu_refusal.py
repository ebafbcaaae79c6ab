"""What is not there yet on a GPU is refused by name, before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from alisa_compile import AlisaConfig, NotAvailableError
from alisa_compile.runtime import store
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes


def _store(device: str, disk: int) -> TokenStore:
    """With or without such a device here: it is only named."""
    shape = StoreShape(2, 1, 2, 16, torch.float32, torch.device(device))
    return TokenStore(shape, AlisaConfig(), 64, lambda *_: TierSizes(16, 24, disk, 16))


def test_the_disk_tier_of_a_gpu_is_refused() -> None:
    """Device and host tiers are there."""
    with pytest.raises(NotAvailableError, match="the disk tier is not available yet on a GPU"):
        _store("cuda", 24)


def test_tiers_of_other_accelerators_are_refused() -> None:
    """Nothing moves rows there."""
    with pytest.raises(NotAvailableError, match="rows below the device are not available on mps"):
        _store("mps", 0)


def test_tiers_of_a_gpu_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setattr(store, "is_installed", lambda: False)
    with pytest.raises(NotAvailableError, match=r"Triton is not installed.*alisa-compile\[gpu\]"):
        _store("cuda", 0)
