"""`alisa::kv_read`: dense K and V back from the store.

`AlisaCache.update` returns its result, which makes the graph right before any rewrite. It also carries everything that
the rewrite needs, so that a pass never has to look beyond this one node. After the rewrite nothing uses it.
"""

from __future__ import annotations

import torch

from ..library import define
from .reference import kv_read, kv_read_recomputing, kv_read_tiered


def _fake(
    pool: torch.Tensor,
    scales: torch.Tensor | None,
    table: torch.Tensor,
    length: torch.Tensor,
    valid: torch.Tensor,
    scores: torch.Tensor | None,
    rows: torch.Tensor | None,
    counts: torch.Tensor | None,
    origin: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: int,
    stage: str,
    spec: str,
    padded: bool,
    ticket: torch.Tensor | None = None,
    hidden_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    if stage == "prefill":
        return key.new_empty(key.shape), value.new_empty(value.shape)
    shape = (key.shape[0], key.shape[1], table.shape[3], key.shape[3])
    return key.new_empty(shape), value.new_empty(shape)


_ARGUMENTS = (
    "Tensor pool, Tensor? scales, Tensor table, Tensor length, Tensor valid, Tensor? scores, Tensor? rows, "
    "Tensor? counts, Tensor? origin, Tensor key, Tensor value, int layer, str stage, str spec, bool padded"
)

define(f"kv_read({_ARGUMENTS}) -> (Tensor, Tensor)", kv_read, _fake)
define(f"kv_read.tiered({_ARGUMENTS}, Tensor ticket) -> (Tensor, Tensor)", kv_read_tiered, _fake)
define(
    f"kv_read.recomputing({_ARGUMENTS}, Tensor ticket, int hidden_size) -> (Tensor, Tensor)",
    kv_read_recomputing,
    _fake,
)
