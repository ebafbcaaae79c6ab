"""The part of a graph that makes K and V of a layer from the layer's input and the position, as a callable of its own.

A token whose K and V were deleted gets them again from the saved input of the layer. What is cut out is everything from
that input to K and V as they are stored: projections (separate or fused), bias, norms, whatever rotary embedding. The
input is found by structure, not by name: the tensor `[B, T, hidden]` nearest to K and V on which alone both depend,
beside weights and, for K, the position. That is the residual stream entering the layer, after its norm if it has one:
as many bytes, and less to compute again.

A producer is best cut from a prefill graph: in a decode graph its views hold the single token as a number, so it makes
one token of each sequence at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from .. import compat
from .base import Refusal, Writes, example, is_call, is_op

_KEY, _VALUE = 5, 6  # arguments of kv_append (see kernels/)

#: Called with hidden states `[B, T, hidden]`, positions `[B, T]` (None if K does not depend on them) and the constants.
Function = Callable[..., tuple[torch.Tensor, torch.Tensor]]


#: Makes a producer of the arguments of the whole graph.
Maker = Callable[[Sequence[Any]], "KVProducer"]


@dataclasses.dataclass(frozen=True)
class ProducerCut:
    """What makes K and V of one layer, as found in a graph.

    hidden: the node of the layer's input `[B, T, hidden]`. positions: that of the positions `[B, T]` or `[1, T]`; None
    where K does not depend on them. graph: inputs hidden, positions if there are any, and the constants; outputs K and
    V `[B, Hkv, T, D]`, not quantised. constants: arguments of the whole graph that are the constants, by place.
    """

    hidden: fx.Node
    positions: fx.Node | None
    graph: fx.GraphModule
    constants: tuple[int, ...]

    @property
    def key(self) -> str:
        """Equal for layers that differ in their constants alone, so that these share compiled code."""
        inputs = [example(node) for node in self.graph.graph.nodes if node.op == "placeholder"]
        return "\n".join([self.graph.code, *(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs)])


class KVProducer:
    """K and V of a layer from its input.

    Parameters are those of the model, not copies. Rows do not depend on each other, so any tokens may be batched, also
    of several sequences; with `shares_positions` those in one column of the batch must have the same position.
    """

    def __init__(
        self,
        function: Function,
        constants: Sequence[torch.Tensor],
        batch_size: int,
        tokens: int | None,
        positions: str,
    ) -> None:
        """tokens: the only T that the function takes; None = any from 2 on. positions: `none`, `own` (one for each
        token) or `shared` (by a column of the batch)."""
        self._function, self._constants = function, tuple(constants)
        self.batch_size, self._tokens, self._positions = batch_size, tokens, positions

    @property
    def shares_positions(self) -> bool:
        """Whether the graph has one position for each column of the batch."""
        return self._positions == "shared"

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: `[B, T, hidden]` with the graph's B; positions: `[B, T]` int64. K and V `[B, Hkv, T, D]`."""
        tokens = hidden.shape[1]
        if self._tokens is None and tokens > 1:
            return self._make(hidden, positions)
        at_once = self._tokens or 2
        columns = torch.arange(-(-tokens // at_once) * at_once, device=hidden.device).clamp_max(tokens - 1)
        calls = zip(hidden[:, columns].split(at_once, 1), positions[:, columns].split(at_once, 1), strict=True)
        parts = [self._make(*call) for call in calls]
        key, value = (torch.cat(pieces, 2)[:, :, :tokens] for pieces in zip(*parts, strict=True))
        return key, value

    def _make(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = [hidden.contiguous()]
        if self._positions != "none":
            arguments.append((positions[:1] if self.shares_positions else positions).contiguous())
        if self._tokens is None:
            for argument in arguments:
                compat.mark_dynamic(argument, 1)
        with torch.no_grad():
            return self._function(*arguments, *self._constants)


def cut_producer(gm: fx.GraphModule, append: fx.Node, writes: Writes, width: int) -> ProducerCut:
    """Cut what makes K and V of one `kv_append` from a layer input of this width; a `Refusal` says why not.

    writes: of the graph.
    """
    key, value = (_unquantised(append.args[place]) for place in (_KEY, _VALUE))
    hidden = _layer_input(key, value, width)
    needed, positions = _between(key, value, hidden)
    for node in (hidden, *needed):
        if isinstance(example(node), torch.Tensor) and writes.between(node, node, append):
            raise Refusal(f"{node.name}, from which its K and V are made, is written to")
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    constants = tuple(inputs.index(node) for node in needed if node.op == "placeholder" and _is_tensor(node))
    return ProducerCut(hidden, positions, _subgraph(gm, needed, hidden, positions, (key, value)), constants)


def layer_input(append: fx.Node, width: int) -> tuple[fx.Node, fx.Node | None]:
    """The nodes of the layer's input and of its positions in any graph, also that of a decode step."""
    key, value = (_unquantised(append.args[place]) for place in (_KEY, _VALUE))
    hidden = _layer_input(key, value, width)
    return hidden, _between(key, value, hidden)[1]


def _unquantised(node: Any) -> fx.Node:
    if is_call(node, "getitem") and is_op(node.args[0], torch.ops.alisa.quantize_row.default):
        node = node.args[0].args[0]
    if not isinstance(node, fx.Node):
        raise Refusal("its K and V are no values of the graph")
    return node


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(example(node), torch.Tensor)


def _same(size: Any, other: Any) -> bool:
    return bool(compat.symbolic_expression(size) == compat.symbolic_expression(other))


def _layer_input(key: fx.Node, value: fx.Node, width: int) -> fx.Node:
    like = example(value)
    wanted = (like.shape[0], like.shape[2], width)
    reason = none = f"no tensor of width {width} is all that its K and V depend on"
    above = _of_tokens(value)
    nodes: list[fx.Node] = [node for node in value.graph.nodes if node in above]
    for node in reversed(nodes):
        own = example(node)
        if not isinstance(own, torch.Tensor) or own.dim() != 3 or own.dtype != like.dtype:
            continue
        if node.op == "placeholder" or not all(map(_same, own.shape, wanted)):
            continue
        try:
            _between(key, value, node)
        except Refusal as refusal:
            reason = f"{none}: {refusal}"
            continue
        return node
    raise Refusal(reason)


def _between(key: fx.Node, value: fx.Node, hidden: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """What K and V need beside `hidden`, in graph order, and the positions; `Refusal` if that is not theirs alone."""
    tokens = example(value).shape[2]
    made_from = _of_tokens(value)
    needed: set[fx.Node] = set()
    positions: set[fx.Node] = set()
    ahead = [key, value]
    while ahead:
        node = ahead.pop()
        if node is hidden or node in needed or node in positions:
            continue
        own = example(node)
        if isinstance(own, (int, torch.SymInt)) and _same(own, tokens):
            needed.add(node)  # the number of tokens: that of the new call
            continue
        if _is_position(own, tokens):
            if node in made_from:
                raise Refusal(f"its K or V also depends on {node.name}")
            positions.add(node)
            continue
        if _mixes_tokens(node):
            raise Refusal("its K or V also depends on other tokens, through attention or the cache")
        if node.op == "placeholder" and not (isinstance(own, torch.Tensor) and all(type(n) is int for n in own.shape)):
            raise Refusal(f"its K or V also depends on {node.name}")
        needed.add(node)
        ahead += node.all_input_nodes
    if len(positions) > 1:
        raise Refusal(f"its K depends on several positions: {', '.join(sorted(node.name for node in positions))}")
    return [node for node in key.graph.nodes if node in needed], next(iter(positions), None)


def _mixes_tokens(node: fx.Node) -> bool:
    return str(node.target).startswith("alisa.") or is_call(node, "scaled_dot_product_attention")


def _of_tokens(value: fx.Node) -> set[fx.Node]:
    """What V is made from up to the attention of the layers before: token ids, but not what only rotates K and Q."""
    found: set[fx.Node] = set()
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if node not in found and not _mixes_tokens(node):
            found.add(node)
            ahead += node.all_input_nodes
    return found


def _is_position(value: Any, tokens: Any) -> bool:
    """Whether a value is an integer for each token: `[B, T]` or `[1, T]`."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 2
        and value.dtype in (torch.int64, torch.int32)
        and _same(value.shape[1], tokens)
    )


def _subgraph(
    gm: fx.GraphModule,
    needed: list[fx.Node],
    hidden: fx.Node,
    positions: fx.Node | None,
    outputs: tuple[fx.Node, fx.Node],
) -> fx.GraphModule:
    """A graph of its own. Names are numbered, so that equal layers have equal code."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def add_input(node: fx.Node, name: str) -> None:
        copies[node] = graph.placeholder(name)
        copies[node].meta["example_value"] = example(node)

    add_input(hidden, "hidden")
    if positions is not None:
        add_input(positions, "positions")
    leaves = [node for node in needed if node.op == "placeholder" and _is_tensor(node)]
    for number, node in enumerate(leaves):
        add_input(node, f"constant_{number}")
    tokens = None
    for number, node in enumerate(needed):
        if node in copies:
            continue
        if isinstance(example(node), (int, torch.SymInt)):
            if tokens is None:
                tokens = graph.create_node("call_method", "size", (copies[hidden], 1), name="tokens")
            copies[node] = tokens
            continue
        arguments: Any = fx.map_arg(node.args, lambda n: copies[n])
        named: Any = fx.map_arg(node.kwargs, lambda n: copies[n])
        copies[node] = graph.create_node(node.op, node.target, arguments, named, name=f"value_{number}")
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(gm, graph)


def compile_producers(cuts: dict[int, ProducerCut], compiler: str) -> dict[int, Maker]:
    """By layer, what makes a producer of the arguments of the whole graph. Equal layers share compiled code.

    compiler: `inductor`, `aot_eager` or `eager`.
    """
    functions: dict[str, Function] = {}
    makers = {}
    for layer, cut in cuts.items():
        if cut.key not in functions:
            functions[cut.key] = cut.graph if compiler == "eager" else torch.compile(cut.graph, backend=compiler)
        makers[layer] = _maker(functions[cut.key], cut)
    return makers


def _maker(function: Function, cut: ProducerCut) -> Maker:
    batch_size = int(example(cut.hidden).shape[0])
    own = None if cut.positions is None else example(cut.positions).shape[0]
    positions = "none" if own is None else "own" if own == batch_size else "shared"
    count = example(cut.hidden).shape[1]
    tokens = count if isinstance(count, int) else None
    return lambda arguments: KVProducer(function, [arguments[p] for p in cut.constants], batch_size, tokens, positions)


_COUNTED_TOKENS = 8  # FLOPs and bytes are counted on a batch of so many, and are all proportional to it


def tensor_graph(cut: ProducerCut, kv_dtype: str, *, forms_only: bool) -> nx.DiGraph:
    """The tensors between a layer's input and its K and V, as `runtime.cut` wants them described.

    kv_dtype: as the option; with `int8` the encodings `kv_int8` and `hidden_int8` exist, one float32 scale for a head
    or a row. forms_only: only what a store can hold may be kept (`hidden`, `kv`); else everything in between as well,
    under the name of its node. FLOPs: those that torch counts, and one an element of what is no product and no view.
    """
    counted = _Counted(cut)
    tensors = nx.DiGraph()
    keys: Any = cut.graph.graph.output_node().args[0]
    for node, (flops, value) in counted.about.items():
        per_token = not isinstance(value, torch.Tensor) or node in counted.from_hidden
        elements = value.numel() // counted.tokens if isinstance(value, torch.Tensor) else 0
        encodings: dict[str, int] = {}
        if node.name == "hidden":
            encodings = _encodings("hidden", value, 1, kv_dtype)
        elif node in keys:
            encodings = _encodings("kv", value, value.shape[1], kv_dtype)
        elif elements and per_token and not forms_only:
            encodings = {node.name: elements * value.dtype.itemsize}
        tensors.add_node(
            node.name, flops=flops // counted.tokens, encodings=encodings, given=node.name == "hidden",
            wanted=node in keys,
        )  # fmt: skip
    for node in counted.about:
        tensors.add_edges_from((source.name, node.name) for source in node.all_input_nodes if source in counted.about)
    return tensors


def _encodings(name: str, value: torch.Tensor, scales: int, kv_dtype: str) -> dict[str, int]:
    """Bytes of a token in the dtype of the model, and in int8 with so many float32 scales."""
    elements = value[:1].select(1 if value.dim() == 3 else 2, 0).numel()
    found = {name: elements * value.dtype.itemsize}
    if kv_dtype == "int8":
        found[f"{name}_int8"] = elements + 4 * scales
    return found


class _Counted(fx.Interpreter):
    """FLOPs and fake value of every tensor that a producer computes, weights left out.

    about: by node, in graph order. from_hidden: the nodes that depend on the layer's input. tokens: B x T.
    """

    def __init__(self, cut: ProducerCut) -> None:
        super().__init__(cut.graph)
        self.about: dict[fx.Node, tuple[int, Any]] = {}
        self.from_hidden: set[fx.Node] = set()
        inputs = [node for node in cut.graph.graph.nodes if node.op == "placeholder"]
        batch_size = int(example(cut.hidden).shape[0])
        self.tokens = batch_size * _COUNTED_TOKENS
        with torch.no_grad(), compat.fake_tensors():
            values = []
            for node in inputs:
                like = example(node)
                shape = [n if type(n) is int else _COUNTED_TOKENS for n in like.shape]
                values.append(torch.empty(shape, dtype=like.dtype, device=like.device))
            self.run(*values)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return super().run_node(n)
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        if n.op in ("placeholder", "get_attr") and n.name not in ("hidden", "positions"):
            return value
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return value
        flops = int(counter.get_total_flops())
        if n.op not in ("placeholder", "get_attr") and not flops:
            flops = sum(part.numel() for part in _parts(value) if not self._is_view(n, part))
        if n.name == "hidden" or any(source in self.from_hidden for source in n.all_input_nodes):
            self.from_hidden.add(n)
        self.about[n] = flops, value
        return value

    def _is_view(self, node: fx.Node, part: torch.Tensor) -> bool:
        sources = [p for source in node.all_input_nodes for p in _parts(self.env.get(source))]
        return any(compat.storage_id(part) == compat.storage_id(source) for source in sources)


def _parts(value: Any) -> list[torch.Tensor]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [part for part in parts if isinstance(part, torch.Tensor)]
