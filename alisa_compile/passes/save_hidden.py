"""Where a store deletes rows: save each layer's input before its append, and cut out what makes K and V from it.

Before: kv_append -> kv_read.recomputing. After: hidden_append -> kv_append -> kv_read.recomputing. The producers (see
`kv_producer.py`) are left for the backend, which binds those of a prefill to the store that it is called with.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from ..config import AlisaConfig
from ..errors import NotAvailableError
from .base import PassResult, Refusal, Writes, insert_call, is_op, model_layer
from .kv_producer import ProducerCut, cut_producer
from .rewrite_attention import APPENDS, ReadSite, site_of

NAME = "alisa_save_hidden"
_META = "alisa_producers"
_LENGTH, _LAYER = 3, 10  # arguments of kv_append (see kernels/)

ops = torch.ops.alisa


def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    """Rewrite every append of such a store. There, a layer for which that is impossible is an error."""
    result = PassResult(NAME)
    sites: dict[tuple[Any, Any], ReadSite] = {}
    for node in gm.graph.nodes:
        if is_op(node, ops.kv_read.recomputing):
            site = site_of(node)
            sites[site.length, site.layer] = site
    if not sites:
        return result
    writes = Writes(gm.graph)
    cuts: dict[fx.Node, dict[int, ProducerCut]] = {}
    for append in [node for node in gm.graph.nodes if is_op(node, *APPENDS)]:
        if (append.args[_LENGTH], append.args[_LAYER]) not in sites:
            continue
        site = sites[append.args[_LENGTH], append.args[_LAYER]]
        layer = model_layer(append, site.layer)
        try:
            cut = cut_producer(gm, append, writes, site.hidden_size)
            with result.rewrite(gm.graph, "saved layer input", layer):
                _save(gm, append, site, cut)
        except Refusal as refusal:
            raise NotAvailableError(
                f"K and V of layer {layer} cannot be rebuilt, so the rows that the plan deletes would be lost",
                got=str(refusal),
                fix="set recompute='off', with a larger host_kv_budget or a disk_kv_budget",
            ) from refusal
        cuts.setdefault(site.pool, {})[site.layer] = cut
    gm.meta[_META] = cuts
    gm.recompile()
    return result


def producer_cuts(gm: fx.GraphModule) -> dict[fx.Node, dict[int, ProducerCut]]:
    """What this pass has cut, by the placeholder of the store's pool and by layer."""
    return cast("dict[fx.Node, dict[int, ProducerCut]]", gm.meta.get(_META, {}))


def _save(gm: fx.GraphModule, append: fx.Node, site: ReadSite, cut: ProducerCut) -> None:
    with gm.graph.inserting_before(append):
        arguments = (cut.hidden, cut.positions, site.length, site.ticket, site.layer)
        insert_call(gm.graph, ops.hidden_append.default, arguments, append)
