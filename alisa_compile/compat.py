"""Every private torch and transformers name that alisa touches, with the versions it was checked on.

Nothing else in the package may import a private name. Checked by running: torch 2.13.0, transformers 5.23.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch._dynamo
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import _internal as torch_logging
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

__all__ = [
    "BUILTIN_PAD",
    "PREFILL",
    "CustomGraphPass",
    "OptimizedModule",
    "apply_graph_pass",
    "attention_with_lse",
    "compile_eager",
    "compile_inductor",
    "copy_graph",
    "cpp_compiler",
    "disabled_pass",
    "fake_tensors",
    "generous_recompile_limit",
    "input_source",
    "is_higher_order",
    "is_tracing_structured",
    "is_written",
    "layer_types_with_moving_rope",
    "load_cpp_library",
    "mark_dynamic",
    "mark_static",
    "mark_static_address",
    "module_source",
    "name_input_source",
    "optimized_module_backend",
    "post_grad_passes_with",
    "profiler_is_on",
    "schemas_of",
    "storage_id",
    "symbolic_expression",
    "trace_artifact",
    "trace_op_as",
    "traced_size",
    "without_rope_update",
]

T = TypeVar("T")

GRAD_MODE_SWITCH = torch._C._set_grad_enabled  # what Dynamo records for torch.no_grad() inside a model
PREFILL = "_prefill"  # method of GenerationMixin that feeds the prompt, chunk by chunk if asked
BUILTIN_PAD = torch._C._nn.pad  # what Dynamo records for `F.pad`


def optimized_module_backend(module: torch.nn.Module) -> tuple[Any, dict[str, Any]]:
    """The backend function and its keyword arguments of a `torch.compile(module, backend=...)` result."""
    wrapper = innermost_backend(module.dynamo_ctx.callback)  # type: ignore[arg-type, union-attr]
    return getattr(wrapper, "compiler_fn", None), dict(getattr(wrapper, "kwargs", {}))


# Marking a tensor means something else while torch compiles, which it notes for the whole process: `compile_lock` keeps
# other threads' compilations away meanwhile.


def mark_static(tensor: torch.Tensor, *dims: int) -> None:
    """Compile for exactly these sizes, even where Dynamo has seen other ones before (in another model as well)."""
    with compile_lock:
        torch._dynamo.mark_static(tensor, list(dims))


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Ask Dynamo for a symbol in this dimension instead of a constant; sizes 0 and 1 are always constants."""
    with compile_lock:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that a tensor stays where it is: they change it in place, and record again if it moves."""
    torch._dynamo.mark_static_address(tensor, guard=False)


@contextlib.contextmanager
def generous_recompile_limit() -> Iterator[None]:
    """Room for a model's graphs: stages x batch sizes x padded or not. Past the limit Dynamo turns eager silently."""
    limit = max(64, torch._dynamo.config.recompile_limit)
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield


def compile_inductor(
    gm: fx.GraphModule, example_inputs: list[Any], mode: str | None, patches: dict[str, Any]
) -> Callable[..., Any]:
    """Hand a graph to Inductor; `compile_fx` takes ownership of it."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = dict(list_mode_options(mode)) if mode else {}
    return cast("Callable[..., Any]", compile_fx(gm, example_inputs, config_patches={**options, **patches}))


def compile_eager(gm: fx.GraphModule, example_inputs: list[Any], through_aot: bool) -> Callable[..., Any]:
    """Run the graph without Inductor, after AOTAutograd (`aot_eager`) or as it is (`eager`)."""
    if not through_aot:
        return gm.forward
    compiled: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
    return compiled


def post_grad_passes_with(own: CustomGraphPass) -> dict[str, Any]:
    """An Inductor config patch that appends a pass to whatever post-grad passes are already set."""
    present = inductor_config.post_grad_custom_post_pass
    others = () if present is None else tuple(present) if isinstance(present, (list, tuple)) else (present,)
    return {"post_grad_custom_post_pass": (*others, own) if others else own}


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, operations compute shapes and dtypes only; real parameters may take part."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph to rewrite: after the backend returns, Dynamo still reads its own graph's inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, twin in copies.items():
        if node.op == "placeholder":
            twin._dynamo_source = getattr(node, "_dynamo_source", None)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


def name_input_source(node: fx.Node) -> None:
    """Give an added placeholder what AOTAutograd asks of every input of a Dynamo graph: where it comes from."""
    from torch._dynamo.source import LocalSource

    node._dynamo_source = LocalSource(node.name)


def input_source(node: fx.Node) -> str:
    """Where the user's code finds an input of a Dynamo graph, as Python; empty if unknown (checked on 2.13)."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else str(source.name)


def module_source(gm: fx.GraphModule) -> str:
    """Python that defines this graph as a class `Repro`, with random weights for what it holds (checked on 2.13)."""
    from torch._dynamo.debug_utils import NNModuleToString

    return str(NNModuleToString.convert(gm))


def apply_graph_pass(gm: fx.GraphModule, name: str, run: Callable[[fx.GraphModule], T]) -> T | None:
    """Run a pass under torch's observer: timing, its debug dumps, and TORCHINDUCTOR_DISABLED_PASSES (returns None)."""
    result: T | None = GraphTransformObserver(gm, name, "pre_grad_passes").apply_gm_pass(run)
    return result


@contextlib.contextmanager
def disabled_pass(name: str) -> Iterator[None]:
    """Inside, what TORCHINDUCTOR_DISABLED_PASSES says, and this pass as well; "" = nothing more (checked on 2.13)."""
    present = inductor_config.disabled_passes
    with inductor_config.patch(disabled_passes=f"{present},{name}".strip(",") if name else present):
        yield


def symbolic_expression(value: Any) -> Any:
    """The sympy expression of a SymInt, or the integer itself: two sizes are the same symbol if these are equal."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def traced_size(value: Any) -> int | None:
    """What a SymInt was when the graph was traced, or the integer itself; None where the data decides. Asking adds no
    guard (checked on 2.13)."""
    known = value.node.hint if isinstance(value, torch.SymInt) else value
    return None if known is None else int(known)


def is_tracing_structured() -> bool:
    """Whether torch writes its structured trace (`TORCH_TRACE=folder`), which tlparse reads (checked on 2.13)."""
    return any(isinstance(handler, torch_logging.LazyTraceHandler) for handler in torch_logging.trace_log.handlers)


def trace_artifact(name: str, encoding: str, payload: Callable[[], Any]) -> None:
    """A file among those of the running compilation in tlparse. encoding: `string` or `json` (checked on 2.13)."""
    torch_logging.trace_structured_artifact(name, encoding, payload)


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory; also for fake tensors, which have no data pointer."""
    return int(tensor.untyped_storage()._cdata)


def is_overload(target: Any) -> bool:
    """Whether a call's target is one overload of an operator (`aten.add.Tensor`; checked on 2.13)."""
    return isinstance(target, torch._ops.OpOverload)


def schemas_of(target: Any) -> list[Any]:
    """The schemas that a call of a `torch.ops` target may have; none for other callables and for methods."""
    if is_overload(target):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    return []


def is_higher_order(target: Any) -> bool:
    """Whether a call runs graphs of its own (`cond`, checkpointing, user Triton kernels)."""
    return isinstance(target, torch._ops.HigherOrderOperator)


def is_written(argument: Any) -> bool:
    """Whether a schema declares that an argument is mutated."""
    return argument.alias_info is not None and argument.alias_info.is_write


def load_cpp_library(source: str) -> Any:
    """Compile C++ with Inductor's compiler, flags and cache directory, linked to torch; the loaded `ctypes.CDLL`."""
    from torch._inductor.codecache import CppCodeCache

    class Cache(CppCodeCache):
        cache = {}  # noqa: RUF012  (as in torch: CppCodeCache's own holds libraries without these flags)
        cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

    # Inductor turns both off because it vectorises by itself.
    return Cache.load(source, extra_flags=("-ftree-loop-vectorize", "-ffp-contract=fast"))


def trace_op_as(library: torch.library.Library, name: str, trace: Callable[..., Any]) -> None:
    """Let `trace(mode, call_op, *args)` say what enters a graph when AOTAutograd traces a call of an op: what is called
    within `mode`, or with `call_op()` the call itself. As `torch.library.triton_op` does, for an op of `Library.define`
    (checked on 2.13)."""
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        def call_op() -> Any:
            return mode.__torch_dispatch__(op, types, args, kwargs)

        if kwargs or not all(issubclass(kind, FunctionalTensor) for kind in types):
            return call_op()
        return trace(mode, call_op, *args)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, rule, lib=library)


def profiler_is_on() -> bool:
    """Whether torch.profiler records (checked on 2.13): `record_function` costs microseconds even where it does not."""
    return bool(torch.autograd.profiler._is_profiler_enabled)


def cpp_compiler() -> str:
    """The C++ compiler that Inductor would call (checked on 2.13); an error of torch's where none works."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())


def without_rope_update(forward: Any) -> Any:
    """What a rotary embedding's `forward` computes after `dynamic_rope_update` has set its frequencies; None if it is
    not decorated so. The update branches on positions, which no graph can hold."""
    from transformers import modeling_rope_utils

    while forward is not None:
        inner = getattr(forward, "__wrapped__", None)
        if getattr(forward, "__globals__", None) is vars(modeling_rope_utils):
            return inner
        forward = inner
    return None


def layer_types_with_moving_rope(module: Any) -> list[str | None]:
    """For which of a rotary embedding's layer types (None = it has none) `dynamic_rope_update` does anything."""
    rope_type = getattr(module, "rope_type", None)
    kinds = rope_type.items() if isinstance(rope_type, dict) else [(None, rope_type)]
    return [name for name, kind in kinds if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")]


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `query [B, Hq, T, D]` over `key, value [B, Hkv, K, D]`, and its log-sum-exp `[B, Hq, T]`.

    mask: `[B, 1, T, K]` bool, or None; then is_causal says whether row i sees the columns up to i. A row that attends
    to nothing has output 0 and log-sum-exp -inf. Torch's public attention does not return the log-sum-exp; on CPU its
    flash kernel does (checked on 2.13), elsewhere and with soft-capped scores this is spelled out.
    """
    ratio = query.shape[1] // key.shape[1]
    if ratio > 1:
        key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    has_flash = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if has_flash and mask is None and not soft_cap:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = flash(query, key, value, 0.0, is_causal, scale=scale)
        return out, lse
    logits = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if soft_cap:
        logits = (logits / soft_cap).tanh() * soft_cap
    if is_causal and mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - torch.where(lse == float("-inf"), 0, lse).unsqueeze(-1)).exp()
    return weights.to(query.dtype) @ value, lse
