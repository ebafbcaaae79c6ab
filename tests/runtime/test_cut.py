"""Minimum cuts: against every possible set of tensors, and the published arithmetic of recomputation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alisa_compile import ConfigError
from alisa_compile.passes.kv_producer import tensor_graph
from alisa_compile.runtime.cut import Cut, Machine, best_cut, cut_at, distinct_cuts, minimum_cut
from tests.passes.test_kv_producer import SIX, family_run


def every_cut(tensors: nx.DiGraph) -> list[Cut]:
    """All sets of tensors from which what is wanted can be computed, without those that keep what is never used."""
    order = list(reversed(list(nx.topological_sort(tensors))))
    found: list[Cut] = []

    def decide(place: int, needed: frozenset[Any], kept: frozenset[Any]) -> None:
        """Keep or compute the tensor at a place of the order, if it is needed."""
        if place == len(order):
            found.append(cut_at(tensors, set(kept)))
            return
        tensor = order[place]
        about = tensors.nodes[tensor]
        if tensor not in needed:
            decide(place + 1, needed, kept)
            return
        if about["encodings"]:
            decide(place + 1, needed, kept | {tensor})
        if not about.get("given"):
            decide(place + 1, needed | set(tensors.predecessors(tensor)), kept)

    decide(0, frozenset(t for t, about in tensors.nodes(data=True) if about.get("wanted")), frozenset())
    return found


def hull(cuts: list[Cut]) -> set[tuple[int, int]]:
    """(bytes, FLOPs) that are the only best ones at some exchange rate: corners of the lower left convex hull."""
    points = sorted({(cut.bytes, cut.flops) for cut in cuts})
    corners: list[tuple[int, int]] = []
    for point in points:
        if corners and point[1] >= corners[-1][1]:
            continue  # more bytes and no fewer FLOPs
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0) > 0:
                break
            corners.pop()
        corners.append(point)
    return set(corners)


def check_against_all(tensors: nx.DiGraph, every: list[Cut]) -> None:
    """`minimum_cut` at several rates, and `distinct_cuts`."""
    for rate in (Fraction(0), Fraction(1, 1000), Fraction(1, 7), Fraction(1), Fraction(3), Fraction(1000)):
        prices = rate.denominator, rate.numerator
        found = minimum_cut(tensors, *prices)
        costs = [cut.bytes * prices[0] + cut.flops * prices[1] for cut in every]
        assert found.bytes * prices[0] + found.flops * prices[1] == min(costs)
    cuts = distinct_cuts(tensors)
    assert {(cut.bytes, cut.flops) for cut in cuts} == hull(every)
    assert [cut.bytes for cut in cuts] == sorted({cut.bytes for cut in cuts})


@st.composite
def dags(draw: st.DrawFn) -> nx.DiGraph:
    """Up to nine tensors; the first is given, the last and perhaps others are wanted."""
    count = draw(st.integers(2, 9))
    tensors = nx.DiGraph()
    for node in range(count):
        sizes = {"a": draw(st.integers(0, 30))} if node == 0 or draw(st.integers(0, 3)) else {}
        if sizes and draw(st.booleans()):
            sizes["b"] = draw(st.integers(0, 30))
        wanted = node == count - 1 or draw(st.integers(0, 5)) == 0
        tensors.add_node(node, flops=draw(st.integers(0, 30)), encodings=sizes, given=node == 0, wanted=wanted)
        sources = draw(st.lists(st.integers(0, node - 1), max_size=3, unique=True)) if node else []
        tensors.add_edges_from((source, node) for source in sources)
    return tensors


@settings(max_examples=100, deadline=None)
@given(dags())
def test_random_graphs_against_exhaustive_enumeration(tensors: nx.DiGraph) -> None:
    check_against_all(tensors, every_cut(tensors))


@pytest.mark.parametrize("family", SIX)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_producers_against_exhaustive_enumeration(family: str, kv_dtype: str) -> None:
    """The subgraphs of six architectures, with every tensor that a graph of theirs could keep."""
    tensors = tensor_graph(family_run(family).cut(0), kv_dtype, forms_only=False)
    assert sum(about["flops"] > 1000 for _, about in tensors.nodes(data=True)) in (1, 2)  # projections, or one fused
    small = _without_chains(tensors)
    every = every_cut(small)
    assert len(every) >= 3
    check_against_all(small, every)
    # What was left out cannot be better: all prices agree.
    for prices in ((1, 0), (0, 1), (1, 1), (1000, 1), (1, 1000)):
        whole, part = minimum_cut(tensors, *prices), minimum_cut(small, *prices)
        assert (whole.bytes, whole.flops) == (part.bytes, part.flops)


def _without_chains(tensors: nx.DiGraph) -> nx.DiGraph:
    """Without encodings that another of no more bytes makes useless: of the only user, or the only source if free."""
    small = tensors.copy()
    for node in list(small):
        about, users = small.nodes[node], list(small.successors(node))
        if about.get("wanted") or about.get("given") or not about["encodings"] or len(users) != 1:
            continue
        after = small.nodes[users[0]]
        if after["encodings"] and min(after["encodings"].values()) <= min(about["encodings"].values()):
            about["encodings"] = {}
    for node in list(small):
        about, sources = small.nodes[node], list(small.predecessors(node))
        if about.get("wanted") or about.get("given") or not about["encodings"] or about["flops"] or len(sources) != 1:
            continue
        before = small.nodes[sources[0]]
        if before["encodings"] and min(before["encodings"].values()) <= min(about["encodings"].values()):
            about["encodings"] = {}
    return small


@pytest.mark.parametrize(
    ("family", "kv_dtype", "forms"),
    [
        ("llama, multi-head", "auto", ["hidden", "kv"]),
        ("llama, multi-head", "int8", ["hidden_int8", "kv_int8"]),
        ("opt", "auto", ["hidden", "kv"]),
        ("gpt-neox", "auto", ["hidden", "kv"]),
        ("qwen3", "auto", ["hidden", "kv"]),
        ("falcon, multi-query", "auto", ["kv"]),
    ],
)
def test_forms(family: str, kv_dtype: str, forms: list[str]) -> None:
    """What a store could hold of a token: hidden states only where they are smaller; int8 only if K and V are."""
    run = family_run(family)
    cuts = distinct_cuts(tensor_graph(run.cut(0), kv_dtype, forms_only=True))
    assert [cut.form for cut in cuts] == forms
    heads, width = run.store.shape.kv_heads, run.store.shape.head_dim
    expected = {
        "hidden": 64 * 4,
        "hidden_int8": 64 + 4,
        "kv": 2 * heads * width * 4,
        "kv_int8": 2 * heads * (width + 4),
    }
    assert [cut.bytes for cut in cuts] == [expected[form] for form in forms]
    if "hidden" in forms:
        products = 2 * 64 * 2 * heads * width * (2 if family == "gpt-neox" else 1)
        if family == "gpt-neox":
            products = 2 * 64 * 3 * 64  # Q comes with K and V
        assert products <= cuts[0].flops < 1.2 * products


def layer(hidden: int, kv_heads_width: int, parameters: float, layers: int, itemsize: int = 2) -> nx.DiGraph:
    """One layer by numbers alone: ids -> hidden -> K and V."""
    tensors = nx.DiGraph()
    tensors.add_node("ids", flops=0, encodings={"ids": 0}, given=True)
    forward = round(2 * parameters / layers)  # of the whole model, K and V included
    tensors.add_node("hidden", flops=forward - 4 * hidden * kv_heads_width, encodings={"hidden": itemsize * hidden})
    tensors.add_edge("ids", "hidden")
    for name in ("key", "value"):
        size = {"kv": itemsize * kv_heads_width}
        tensors.add_node(name, flops=2 * hidden * kv_heads_width, encodings=size, wanted=True)
        tensors.add_edge("hidden", name)
    return tensors


# Layers, hidden size, width of K, parameters; and bytes and FLOPs a second, with what the arithmetic gives there in
# microseconds a token: K and V in 16 bits, in 8; transfer of hidden states, their projection; all from token ids.
MODELS = {
    "OPT-6.7B": (32, 4096, 4096, 6.7e9),
    "OPT-13B": (40, 5120, 5120, 13e9),
    "OPT-30B": (48, 7168, 7168, 30e9),
    "Llama-2-7B": (32, 4096, 4096, 6.7e9),
    "Llama-3.1-8B": (32, 4096, 1024, 8e9),
    "Qwen3-8B": (36, 4096, 1024, 8.2e9),
}
MACHINES = {"V100": Machine(20e9, 80e12), "H100": Machine(20e9, 400e12), "H200": Machine(50e9, 500e12)}
TABLE = [
    ("V100", "OPT-6.7B", 26.21, 13.11, 13.11, 26.84, 167.50),
    ("V100", "OPT-13B", 40.96, 20.48, 20.48, 52.43, 325.00),
    ("V100", "OPT-30B", 68.81, 34.41, 34.41, 123.31, 750.00),
    ("V100", "Llama-3.1-8B", 6.55, 3.28, 13.11, 6.71, 200.00),
    ("H100", "OPT-6.7B", 26.21, 13.11, 13.11, 5.37, 33.50),
    ("H100", "OPT-13B", 40.96, 20.48, 20.48, 10.49, 65.00),
    ("H100", "OPT-30B", 68.81, 34.41, 34.41, 24.66, 150.00),
    ("H200", "Llama-2-7B", 10.49, 5.24, 5.24, 4.29, 26.80),
    ("H200", "Llama-3.1-8B", 2.62, 1.31, 5.24, 1.07, 32.00),
    ("H200", "Qwen3-8B", 2.95, 1.47, 5.90, 1.21, 32.80),
]


@pytest.mark.parametrize(("machine", "model", "kv", "int8", "hidden", "projection", "ids"), TABLE)
def test_published_arithmetic(
    machine: str, model: str, kv: float, int8: float, hidden: float, projection: float, ids: float
) -> None:
    """The costs of each choice, and which one the cut makes."""
    layers, width, kv_width, parameters = MODELS[model]
    speed = MACHINES[machine]
    tensors = layer(width, kv_width, parameters, layers)

    def microseconds(kept: set[str], objective: str, graph: nx.DiGraph = tensors, within: float = 0.006) -> Any:
        return pytest.approx(1e6 * layers * cut_at(graph, kept).seconds(speed, objective), abs=within)

    assert kv == microseconds({"key", "value"}, "additive")
    assert int8 == microseconds({"key", "value"}, "additive", layer(width, kv_width, parameters, layers, itemsize=1))
    assert round(hidden + projection, 2) == microseconds({"hidden"}, "additive", within=0.011)
    assert max(hidden, projection) == microseconds({"hidden"}, "overlapped")
    assert ids == microseconds({"ids"}, "additive")
    tensors.nodes["hidden"]["encodings"] = {"hidden": 0}  # on the device
    assert projection == microseconds({"hidden"}, "additive")


@pytest.mark.parametrize(
    ("machine", "model", "form"),
    [("H100", "OPT-30B", "hidden"), ("V100", "OPT-30B", "kv"), ("H200", "Llama-2-7B", "hidden"),
     ("H200", "Llama-3.1-8B", "kv"), ("V100", "OPT-6.7B", "kv")],
)  # fmt: skip
def test_best_form(machine: str, model: str, form: str) -> None:
    """Recomputation wins for multi-head models on fast machines with slow links, and never with grouped heads."""
    layers, width, kv_width, parameters = MODELS[model]
    tensors = layer(width, kv_width, parameters, layers)
    tensors.remove_node("ids")
    tensors.nodes["hidden"]["given"] = True
    assert best_cut(tensors, MACHINES[machine]).form == form


def test_what_cannot_be_had() -> None:
    tensors = nx.DiGraph()
    tensors.add_node("hidden", flops=0, encodings={}, given=True)
    tensors.add_node("key", flops=3, encodings={}, wanted=True)
    tensors.add_edge("hidden", "key")
    with pytest.raises(ConfigError, match="neither be kept nor recomputed"):
        distinct_cuts(tensors)
    with pytest.raises(ConfigError, match="the objective is unknown"):
        best_cut(tensors, MACHINES["V100"], "fast")
