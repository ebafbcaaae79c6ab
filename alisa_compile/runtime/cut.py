"""What to keep of a token whose K and V are deleted: minimum cuts between bytes and FLOPs (`networkx`).

The description of one layer is a `networkx.DiGraph` of the tensors from which it makes K and V, for one token:

- node attributes: `flops`, integer, to compute the tensor from its predecessors; `encodings`, a dict of name to integer
  bytes of the ways to keep it ({} = it cannot be kept); `given` = it cannot be computed, only kept (the layer input);
  `wanted` = it is what has to be had again (K and V). A tensor without predecessors that is not given is free (the
  position).
- an edge leads from a tensor to one that is computed from it.

To keep tensors costs their bytes, and to compute what is wanted from them costs FLOPs. At an exchange rate between the
two the best set is a minimum cut: each tensor is a pair of nodes whose edge, when cut, keeps it at the bytes of its
cheapest encoding; where both are on the side of what is wanted, an edge from the source charges its FLOPs. Bisection
finds every rate at which the best set changes, and so every set that is best at some rate; each is then priced with the
cost model of a machine. All numbers are integers, so cuts are exact.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import networkx as nx

from ..errors import ConfigError

OBJECTIVES = ("overlapped", "additive")
_SOURCE, _SINK = "source", "sink"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Bytes a second of the link that kept tensors come by, and FLOPs a second of recomputation."""

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tensors to keep, each with its encoding; bytes to keep and FLOPs to recompute of one token in one layer."""

    kept: tuple[tuple[Any, str], ...]
    bytes: int
    flops: int

    @property
    def form(self) -> str:
        """The encodings, each once: `kv`, `kv_int8`, `hidden`, `hidden_int8`, or several joined by +."""
        return "+".join(dict.fromkeys(encoding for _, encoding in self.kept))

    def seconds(self, machine: Machine, objective: str = "overlapped") -> float:
        """Of one token in one layer: the larger of transfer and recomputation, or their sum (`additive`)."""
        both = self.bytes / machine.bytes_per_second, self.flops / machine.flops_per_second
        return max(both) if objective == "overlapped" else sum(both)


def best_cut(tensors: nx.DiGraph, machine: Machine, objective: str = "overlapped") -> Cut:
    """Of all sets that are best at some exchange rate, the fastest on a machine; of equals, that with fewest bytes."""
    if objective not in OBJECTIVES:
        raise ConfigError("the objective is unknown", got=repr(objective), expected=f"one of {', '.join(OBJECTIVES)}")
    return min(distinct_cuts(tensors), key=lambda cut: (cut.seconds(machine, objective), cut.bytes))


def distinct_cuts(tensors: nx.DiGraph) -> list[Cut]:
    """The sets that are best at some exchange rate, from fewest bytes to fewest FLOPs."""
    first, last = minimum_cut(tensors, 1, 0), minimum_cut(tensors, 0, 1)
    return [first] if first.bytes == last.bytes else [first, *_between(tensors, first, last), last]


def _between(tensors: nx.DiGraph, left: Cut, right: Cut) -> list[Cut]:
    """The sets between two, of which the right one has more bytes and fewer FLOPs."""
    rate = Fraction(left.flops - right.flops, right.bytes - left.bytes)  # where the two cost the same
    byte_price, flop_price = rate.numerator, rate.denominator
    middle = minimum_cut(tensors, byte_price, flop_price)

    def cost(cut: Cut) -> int:
        return cut.bytes * byte_price + cut.flops * flop_price

    if cost(middle) >= cost(left):
        return []
    return [*_between(tensors, left, middle), middle, *_between(tensors, middle, right)]


def minimum_cut(tensors: nx.DiGraph, byte_price: int, flop_price: int) -> Cut:
    """The set of least bytes x byte_price + FLOPs x flop_price; of equals, that of fewest bytes and FLOPs together."""
    # More than bytes and FLOPs of any set together, so that these only decide between equals.
    every = [about for _, about in tensors.nodes(data=True)]
    most = 1 + sum(about["flops"] + max(about["encodings"].values(), default=0) for about in every)
    network = nx.DiGraph()
    network.add_nodes_from((_SOURCE, _SINK))
    for tensor, about in tensors.nodes(data=True):
        before, after = (tensor, "before"), (tensor, "after")
        if about.get("given"):
            network.add_edge(_SOURCE, before)  # no capacity: never cut
        else:
            network.add_edge(_SOURCE, before, capacity=about["flops"] * (flop_price * most + 1))
        if about["encodings"]:
            network.add_edge(before, after, capacity=min(about["encodings"].values()) * (byte_price * most + 1))
        else:
            network.add_edge(before, after)
        if about.get("wanted"):
            network.add_edge(after, _SINK)
        for user in tensors.successors(tensor):
            network.add_edge(after, (user, "before"))
    try:
        _, (near, _) = nx.minimum_cut(network, _SOURCE, _SINK)
    except nx.NetworkXUnbounded as error:
        raise ConfigError(
            "K and V can neither be kept nor recomputed",
            got="a description with no cut of finite cost",
            expected="an encoding for what cannot be computed, or for what comes after it",
        ) from error
    return cut_at(tensors, {t for t in tensors if (t, "before") in near and (t, "after") not in near})


def cut_at(tensors: nx.DiGraph, kept: set[Any]) -> Cut:
    """Bytes and FLOPs where these tensors are kept, each in its cheapest encoding, and the others recomputed."""
    computed: set[Any] = set()
    ahead = [t for t, about in tensors.nodes(data=True) if about.get("wanted")]
    while ahead:
        tensor = ahead.pop()
        if tensor in kept or tensor in computed:
            continue
        if tensors.nodes[tensor].get("given"):
            raise ConfigError("these tensors do not suffice", got=sorted(map(str, kept)), expected=f"{tensor} or later")
        computed.add(tensor)
        ahead += tensors.predecessors(tensor)
    encodings = {t: tensors.nodes[t]["encodings"] for t in tensors if t in kept}
    cheapest = tuple((t, min(choices, key=lambda name: (choices[name], name))) for t, choices in encodings.items())
    return Cut(
        cheapest,
        bytes=sum(encodings[t][name] for t, name in cheapest),
        flops=sum(tensors.nodes[t]["flops"] for t in computed),
    )


def layer_tensors(hidden_size: int, kv_heads: int, head_dim: int, itemsize: int, kv_dtype: str) -> nx.DiGraph:
    """A layer by its shapes alone: its input, and one product each to K and V, in what a store can hold.

    itemsize: bytes of an element in the dtype of the model. kv_dtype: as the option.
    """
    tensors = nx.DiGraph()
    sizes = {"hidden": hidden_size * itemsize}
    if kv_dtype == "int8":
        sizes["hidden_int8"] = hidden_size + 4
    tensors.add_node("hidden", flops=0, encodings=sizes, given=True)
    for name in ("key", "value"):
        sizes = {"kv": kv_heads * head_dim * itemsize}
        if kv_dtype == "int8":
            sizes["kv_int8"] = kv_heads * (head_dim + 4)
        tensors.add_node(name, flops=2 * hidden_size * kv_heads * head_dim, encodings=sizes, wanted=True)
        tensors.add_edge("hidden", name)
    return tensors
