"""`alisa::copy_rows`: rows from one pool to another, some of them left out; how many is known on the device alone."""

from __future__ import annotations

import torch

from ..library import define
from ..triton_launch import triton_first
from .reference import copy_rows


def _fake(source: torch.Tensor, source_slots: torch.Tensor, target: torch.Tensor, target_slots: torch.Tensor) -> None:
    return None


define(
    "copy_rows(Tensor source, Tensor source_slots, Tensor(a!) target, Tensor target_slots) -> ()",
    copy_rows,
    _fake,
    cuda=triton_first(copy_rows),
)
