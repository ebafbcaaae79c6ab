"""Bytes of a token store before it exists: what a plan counts is what `TokenStore` will allocate."""

from __future__ import annotations

import torch

from ..config import AlisaConfig
from ..kernels.swa_attention.reference import score_dtype
from .policies import head_groups, selection_spec
from .store import StoreShape, row_shape


def position_bytes(shape: StoreShape, config: AlisaConfig) -> int:
    """Bytes of K and V of one token position as stored, scales included: all layers and sequences of the store."""
    groups = head_groups(config, shape.kv_heads)
    return shape.num_layers * shape.batch_size * groups * row_shape(shape, config).bytes_per_row


def store_bytes(shape: StoreShape, config: AlisaConfig, capacity: int) -> dict[str, int]:
    """Bytes of everything that a store of this capacity keeps between steps, by kind.

    `rows` and `scales` are K and V; they alone move between tiers. The others stay on the device.
    """
    selection = selection_spec(config)
    groups = head_groups(config, shape.kv_heads)
    lists = shape.num_layers * shape.batch_size * groups
    scales = 2 * shape.kv_heads * torch.float32.itemsize if config.kv_dtype == "int8" else 0
    every_row = position_bytes(shape, config) * capacity
    every_scale = shape.num_layers * shape.batch_size * scales * capacity
    kinds = {
        "rows": every_row - every_scale,
        "scales": every_scale,
        "table": lists * capacity * torch.int32.itemsize,
        "length": shape.num_layers * torch.int64.itemsize,
        "valid": shape.batch_size * capacity,
        "scores": 0,
        "working_sets": 0,
    }
    if selection is not None:
        # One more than fits, as in TokenStore: a step that fills the store selects for the token after it.
        ring, width = selection.score_rows(capacity + 1), selection.rows_capacity(capacity + 1)
        kinds["scores"] = lists * ring * capacity * score_dtype(shape.dtype).itemsize
        kinds["working_sets"] = lists * (width + 1) * torch.int32.itemsize + torch.int64.itemsize
    return kinds


def fixed_bytes(shape: StoreShape, config: AlisaConfig, capacity: int) -> int:
    """Bytes that stay on the device wherever the rows are: tables, scores and working sets."""
    kinds = store_bytes(shape, config, capacity)
    return sum(count for kind, count in kinds.items() if kind not in ("rows", "scales"))
