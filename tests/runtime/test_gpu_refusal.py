"""What is not there yet on a GPU is refused by name, before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from alisa_compile import AlisaConfig, NotAvailableError
from alisa_compile.runtime.store import StoreShape, TokenStore
from alisa_compile.runtime.tiers import TierSizes


def test_tiers_on_a_gpu_are_refused() -> None:
    """With or without a GPU here: the device is only named."""
    shape = StoreShape(2, 1, 2, 16, torch.float32, torch.device("cuda"))
    with pytest.raises(NotAvailableError, match="not available yet on a GPU"):
        TokenStore(shape, AlisaConfig(), 64, lambda *_: TierSizes(16, 64, 0, 16))
