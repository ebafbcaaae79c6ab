"""Bytes of a token store before it exists: what a plan counts is what `TokenStore` will allocate."""

from __future__ import annotations

import torch

from ..config import AlisaConfig
from ..kernels.swa_attention.reference import score_dtype
from ..kernels.tiers import TRAFFIC_PLACES
from .policies import head_groups, selection_spec
from .store import StoreShape, row_shape
from .tiers import TierSizes


def position_bytes(shape: StoreShape, config: AlisaConfig) -> int:
    """Bytes of K and V of one token position as stored, scales included: all layers and sequences of the store."""
    return _lists(shape, config) * row_shape(shape, config).bytes_per_row


def owner_bytes(shape: StoreShape, config: AlisaConfig) -> int:
    """Bytes that a store with tiers keeps for one slot of every (layer, sequence, group) beside the rows."""
    return _lists(shape, config) * torch.int32.itemsize


def store_bytes(
    shape: StoreShape, config: AlisaConfig, capacity: int, sizes: TierSizes | None = None
) -> dict[str, int]:
    """Bytes on the device of everything that a store of this capacity keeps between steps, by kind.

    `rows` and `scales` are K and V; they alone move between tiers. `owner`, `movement` and `staging` are those of a
    store with tiers. sizes: of the tiers; None = everything fits the device.
    """
    selection = selection_spec(config)
    lists = _lists(shape, config)
    scales = 2 * shape.kv_heads * torch.float32.itemsize if config.kv_dtype == "int8" else 0
    slots = capacity if sizes is None else sizes.device
    every_row = position_bytes(shape, config) * slots
    every_scale = shape.num_layers * shape.batch_size * scales * slots
    kinds = {
        "rows": every_row - every_scale,
        "scales": every_scale,
        "table": lists * capacity * torch.int32.itemsize,
        "length": shape.num_layers * torch.int64.itemsize,
        "valid": shape.batch_size * capacity,
        "scores": 0,
        "working_sets": 0,
        "owner": 0,
        "movement": 0,
        "staging": 0,
    }
    if selection is not None:
        # One more than fits, as in TokenStore: a step that fills the store selects for the token after it.
        ring, width = selection.score_rows(capacity + 1), selection.rows_capacity(capacity + 1)
        kinds["scores"] = lists * ring * capacity * score_dtype(shape.dtype).itemsize
        kinds["working_sets"] = lists * (width + 1) * torch.int32.itemsize + 2 * torch.int64.itemsize
    if sizes is not None:
        kinds["owner"] = owner_bytes(shape, config) * sizes.device
        # Of each layer: its place in the ticket, how much is below, how much is on disk, what was missed.
        numbers = 4 * shape.num_layers + 1 + shape.batch_size + TRAFFIC_PLACES
        kinds["movement"] = numbers * torch.int64.itemsize
        kinds["movement"] += deletion_bytes(shape, capacity) if sizes.deleted else 0
        kinds["staging"] = layer_bytes(shape, config) * sizes.staging
    return kinds


def fixed_bytes(
    shape: StoreShape, config: AlisaConfig, capacity: int, *, tiered: bool = False, deletes: bool = False
) -> int:
    """Bytes on the device that do not depend on how many rows are there: tables, scores and working sets."""
    kinds = store_bytes(shape, config, capacity, TierSizes(0, 0, 0, 0, deleted=int(deletes)) if tiered else None)
    return sum(count for kind, count in kinds.items() if kind not in ("rows", "scales"))


def hidden_bytes(shape: StoreShape, config: AlisaConfig, hidden_size: int) -> int:
    """Bytes on the host of the layer inputs of one token position, in all layers and sequences of a store.

    int8 with one scale if rows are int8.
    """
    row = hidden_size + 4 if config.kv_dtype == "int8" else hidden_size * shape.dtype.itemsize
    return shape.num_layers * shape.batch_size * row


def deletion_bytes(shape: StoreShape, capacity: int) -> int:
    """Bytes that a store which deletes rows keeps about them: the model's position of each token, and by layer how many
    layer inputs are saved and how many rows deleted."""
    return shape.batch_size * capacity * torch.int32.itemsize + 2 * shape.num_layers * torch.int64.itemsize


def layer_bytes(shape: StoreShape, config: AlisaConfig) -> int:
    """Bytes of K and V of one token position in one layer."""
    return position_bytes(shape, config) // shape.num_layers


def tier_bytes(shape: StoreShape, config: AlisaConfig, capacity: int, sizes: TierSizes | None) -> dict[str, int]:
    """Bytes by tier, as `TokenStore.bytes_by_tier` has them."""
    device = sum(store_bytes(shape, config, capacity, sizes).values())
    if sizes is None:
        return {"device": device}
    position = position_bytes(shape, config)
    host = 0 if sizes.shared_until else position * sizes.host
    if sizes.deleted:
        host += hidden_bytes(shape, config, sizes.hidden_size) * sizes.deleted
    return {"device": device, "host": host, "disk": position * sizes.disk}


def _lists(shape: StoreShape, config: AlisaConfig) -> int:
    return shape.num_layers * shape.batch_size * head_groups(config, shape.kv_heads)
