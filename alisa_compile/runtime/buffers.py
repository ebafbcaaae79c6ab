"""Scores for KV buffers that belong to a user's own module: kept beside the buffer, for as long as it lives."""

from __future__ import annotations

import torch

_ATTRIBUTE = "alisa_scores"


def new_scores(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty scores of this shape, and a count of rows scored `[1]` that is 0."""
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device)


def scores_of(buffer: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores `[B, G, R, N]` and the number of rows scored `[1]` of a K buffer, made on first use.

    Every graph that decodes over the buffer shares them, so they belong to the tensor and not to compiled code.
    """
    held: tuple[torch.Tensor, torch.Tensor] | None = getattr(buffer, _ATTRIBUTE, None)
    if held is None or held[0].shape != shape or held[0].device != buffer.device:
        held = new_scores(shape, dtype, buffer.device)
        setattr(buffer, _ATTRIBUTE, held)
    return held


def forget_scores(buffer: torch.Tensor) -> None:
    """A new prompt fills the buffer: what was scored before is void."""
    held: tuple[torch.Tensor, torch.Tensor] | None = getattr(buffer, _ATTRIBUTE, None)
    if held is not None:
        for tensor in held:
            tensor.zero_()
