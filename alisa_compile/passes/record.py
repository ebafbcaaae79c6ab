"""What the passes did to a graph: its state before and after each of them, and every rewrite with the rule behind it.

Somebody has to ask (`recording`); else no text is made of any graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .. import compat
from ..runtime.report import SkipRow

_PACKAGE = Path(__file__).resolve().parent.parent
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n[ \t]*([^\n]*)')
# Frames that every model shares; what called them says more about the model.
_SHARED = re.compile(r"[/\\]torch[/\\]|[/\\]transformers[/\\](integrations[/\\]|cache_utils|masking_utils|utils[/\\])")
_LAYER = re.compile(r"\.(\d+)(?=\.|$)")

#: Called with the GraphRecord of each graph that went through the passes, also of one that failed there.
listeners: list[Callable[[GraphRecord], None]] = []

STAGES = ("decode", "prefill", "extend", "other")

_families = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Source:
    """A line of Python."""

    file: str
    line: int
    function: str
    code: str

    @property
    def place(self) -> str:
        """`modeling_llama.py:272`."""
        return f"{Path(self.file).name}:{self.line}"


@dataclasses.dataclass(frozen=True)
class NodeRecord:
    """One node of a graph as text.

    label: a short name for an input, else the name; arguments are written with labels, inputs are names. value: such as
    `float32[1, 8, s53, 32]`; of several results, with commas between. nbytes: of all results, with unknown sizes as
    they were when the graph was traced; None where there is no tensor, or the data decides its size. layer, module: of
    the model, where the node was traced in a module; source: the model's line.
    """

    name: str
    label: str
    op: str
    target: str
    arguments: str
    inputs: tuple[str, ...]
    value: str
    nbytes: int | None
    layer: int | None
    module: str
    source: Source | None

    @property
    def line(self) -> str:
        """`name = target(arguments)`."""
        if self.op == "placeholder":
            return f"{self.label} = input"
        if self.op == "output":
            return f"return {self.arguments}"
        return f"{self.label} = {self.target}({self.arguments})"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A graph at one moment. In stages of one family a name is always the same node."""

    title: str
    nodes: tuple[NodeRecord, ...]
    family: int = 0

    @classmethod
    def of(cls, gm: fx.GraphModule, title: str) -> Stage:
        """Read a graph."""
        return Reader(gm).stage(title)

    def text(self) -> str:
        """One line a node, with its value behind."""
        return "".join(f"{node.line}{f'  # {node.value}' if node.value else ''}\n" for node in self.nodes)


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One place where a rule applied.

    number: in order of application since the process began, as ALISA_FUEL counts. matched: nodes of the graph before
    that were replaced or changed. replaced: what stands there now, the changed ones included; both by name. source:
    the line of the rule that made the change.
    """

    number: int
    rule: str
    layer: int | None
    source: Source
    matched: tuple[str, ...]
    replaced: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass over one graph. off: it was switched off. seconds: of the pass alone."""

    name: str
    before: Stage
    after: Stage
    rewrites: tuple[Rewrite, ...] = ()
    skipped: tuple[SkipRow, ...] = ()
    seconds: float = 0.0
    off: bool = False


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """All passes over one graph. stage: decode, prefill, extend or other. error: what ended the passes, if anything."""

    stage: str
    passes: tuple[PassRecord, ...]
    skipped: tuple[SkipRow, ...]
    error: str = ""

    @property
    def before(self) -> Stage:
        """The graph as Dynamo made it."""
        return self.passes[0].before

    @property
    def after(self) -> Stage:
        """The graph that went on to the compiler."""
        return self.passes[-1].after

    def to_dict(self) -> dict[str, Any]:
        """Plain data; each state of the graph once."""
        stages = [self.before, *(each.after for each in self.passes)]
        return {
            "stage": self.stage,
            "error": self.error,
            "before": [dataclasses.asdict(node) for node in stages[0].nodes],
            "passes": [
                {
                    "name": each.name,
                    "off": each.off,
                    "seconds": each.seconds,
                    "rewrites": [dataclasses.asdict(rewrite) for rewrite in each.rewrites],
                    "skipped": [dataclasses.asdict(row) for row in each.skipped],
                    # None: as before this pass.
                    "after": None
                    if each.after is each.before
                    else [dataclasses.asdict(node) for node in each.after.nodes],
                }
                for each in self.passes
            ],
            "skipped": [dataclasses.asdict(row) for row in self.skipped],
        }


@contextlib.contextmanager
def recording() -> Iterator[list[GraphRecord]]:
    """Collect what the passes do to each graph that is compiled inside the block."""
    found: list[GraphRecord] = []
    listeners.append(found.append)
    try:
        yield found
    finally:
        listeners.remove(found.append)


def is_wanted() -> bool:
    """Whether anybody reads records."""
    return bool(listeners)


class Reader:
    """Reads one graph again and again; of a node that is as before, the record is that of the last time."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._family = next(_families)
        self._known: dict[fx.Node, tuple[Any, Any, NodeRecord]] = {}
        self._labels: dict[str, str] = {}

    def stage(self, title: str) -> Stage:
        """The graph as it is now."""
        nodes = list(self._gm.graph.nodes)
        if not self._labels:
            self._labels = _labels([node for node in nodes if node.op == "placeholder"])
        return Stage(title, tuple(map(self._record, nodes)), self._family)

    def _record(self, node: fx.Node) -> NodeRecord:
        args, kwargs = node.args, node.kwargs
        known = self._known.get(node)
        if known is None or known[0] is not args or known[1] is not kwargs:
            self._known[node] = known = (args, kwargs, _record(node, self._labels))
        return known[2]


class Recorder:
    """Follows one graph through the passes."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._reader = Reader(gm)
        self._last = self._reader.stage("Dynamo's graph")
        self._passes: list[PassRecord] = []

    def passed(
        self, name: str, rewrites: list[Rewrite], skipped: list[SkipRow], seconds: float, *, off: bool = False
    ) -> None:
        """A pass has run, or was switched off."""
        before = self._last
        if not off:
            after = self._reader.stage(f"after {name}")
            self._last = after if after.nodes != before.nodes else before
        self._passes.append(PassRecord(name, before, self._last, tuple(rewrites), tuple(skipped), seconds, off))

    def finish(self, stage: str, skipped: tuple[SkipRow, ...], error: BaseException | None) -> GraphRecord:
        """The record, with what was known at an error."""
        passes = tuple(self._passes) or (PassRecord("none", self._last, self._last),)
        text = "" if error is None else f"{type(error).__name__}: {error}"
        return GraphRecord(stage, passes, skipped, text)


class Watch:
    """The nodes of a graph at the start of a rewrite, to tell which ones it replaced."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._before = {node: (node.args, node.kwargs) for node in graph.nodes}

    def changes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of what was erased or changed, and of what was inserted or changed.

        A node that only takes the result of an inserted one instead of an erased one's is not changed itself.
        """
        present = set(self._graph.nodes)
        erased = {node for node in self._before if node not in present}
        inserted = [node for node in self._graph.nodes if node not in self._before]
        changed = []
        for node, (args, kwargs) in self._before.items():
            if node in present and (node.args is not args or node.kwargs is not kwargs):
                was, now = _nodes_in((args, kwargs)), set(node.all_input_nodes)
                if not (was - now <= erased and now - was <= set(inserted)) or was == now:
                    changed.append(node)
        matched = [node.name for node in self._before if node in erased or node in changed]
        replaced = [node.name for node in self._graph.nodes if node in changed or node not in self._before]
        return tuple(matched), tuple(replaced)


def _nodes_in(arguments: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    fx.map_arg(arguments, lambda node: found.add(node))
    return found


def rule_source(frame: Any) -> Source:
    """Where a running frame stands, with the path inside this package."""
    path = Path(frame.f_code.co_filename)
    with contextlib.suppress(ValueError):
        path = path.resolve().relative_to(_PACKAGE.parent)
    return Source(path.as_posix(), frame.f_lineno, frame.f_code.co_name, "")


def _labels(inputs: list[fx.Node]) -> dict[str, str]:
    """The last two parts of where a tensor comes from (`store.pool`), or all of them where others end alike."""
    tensors = [node for node in inputs if _tensors(_value_of(node))]
    full = {node.name: _plain_name(compat.input_source(node)) for node in tensors}
    short = {name: ".".join(source.split(".")[-2:]) for name, source in full.items()}
    times = Counter(short.values())
    chosen = {name: short[name] if times[short[name]] == 1 else full[name] for name in full}
    return {name: text or name for name, text in chosen.items()}


def _value_of(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _written(argument: Any, labels: dict[str, str]) -> str:
    """An argument as a reader would write it."""
    if isinstance(argument, fx.Node):
        return labels.get(argument.name, argument.name)
    if isinstance(argument, (tuple, list)):
        parts = [_written(part, labels) for part in argument]
        if isinstance(argument, list):
            return f"[{', '.join(parts)}]"
        return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
    if isinstance(argument, slice):
        start, stop, step = (
            "" if p is None else _written(p, labels) for p in (argument.start, argument.stop, argument.step)
        )
        return f"{start}:{stop}{f':{step}' if step else ''}"
    if argument is Ellipsis:
        return "..."
    return repr(str(argument)) if isinstance(argument, torch.device) else repr(argument)


def _record(node: fx.Node, labels: dict[str, str]) -> NodeRecord:
    arguments = [_written(argument, labels) for argument in node.args]
    arguments += [f"{name}={_written(argument, labels)}" for name, argument in node.kwargs.items()]
    values = _tensors(_value_of(node))
    module = next((name for name, _ in reversed(list(node.meta.get("nn_module_stack", {}).values()))), "")
    numbers = _LAYER.findall(module)
    return NodeRecord(
        name=node.name,
        label=labels.get(node.name, node.name),
        op=node.op,
        target=_target(node),
        arguments=", ".join(arguments),
        inputs=tuple(source.name for source in node.all_input_nodes),
        value=", ".join(map(_value, values)),
        nbytes=_nbytes(values),
        layer=int(numbers[0]) if numbers else None,
        module=_plain_name(module),
        source=_model_line(node.meta.get("stack_trace") or ""),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _value(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def _nbytes(tensors: list[torch.Tensor]) -> int | None:
    total = 0 if tensors else None
    for tensor in tensors:
        sizes = [compat.traced_size(size) for size in tensor.shape]
        if total is None or None in sizes:
            return None
        total += math.prod(size for size in sizes if size is not None) * tensor.element_size()
    return total


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return f".{node.target}" if node.op == "call_method" else node.target
    name = getattr(node.target, "__name__", str(node.target))
    return str(node.target) if compat.is_overload(node.target) else str(name)


def _plain_name(name: str) -> str:
    """`model.layers.3.mlp` of what Dynamo writes as `L['self']._modules['model']._modules['layers'][3].mlp`.

    The name of the variable is only kept where nothing follows.
    """
    name = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name)
    name = re.sub(r"\['(\w+)'\]", r".\1", name).removeprefix("L.")
    return re.sub(r"^\w+\.", "", name)


@functools.lru_cache(maxsize=65536)
def _model_line(stack: str) -> Source | None:
    """The innermost line that is the model's own."""
    frames = [Source(file, int(line), function, code) for file, line, function, code in _FRAME.findall(stack)]
    own = [f for f in frames if not (_SHARED.search(f.file) or f.file.startswith(str(_PACKAGE)))]
    chosen = own or frames
    return chosen[-1] if chosen else None
