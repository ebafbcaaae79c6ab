"""The code of a decode step: no pool is copied, ops come layer by layer, quantisation is fused."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache

from alisa_compile import AlisaConfig, compat
from alisa_compile import backend as alisa_backend
from alisa_compile.passes import pipeline
from alisa_compile.passes.base import GraphPass, PassResult, is_op
from tests.passes.graphs import ops
from tests.support import compiled, left_padded, recorded_compiles, tiny_model

SLOW = pytest.mark.slow
CASES = pytest.mark.parametrize(
    ("layers", "options"),
    (
        pytest.param(4, {"sparsity": 0.0}, marks=SLOW),
        (4, {"kv_dtype": "int8"}),
        (4, {"sparsity": 0.8}),
        pytest.param(16, {"sparsity": 0.8}, marks=SLOW),
        pytest.param(16, {"sparsity": 0.0}, marks=SLOW),
        pytest.param(16, {"kv_dtype": "int8"}, marks=SLOW),
    ),
)


class _Generated(BaseException):
    """Carries the code out of Inductor before any C++ of it is compiled, which would take most of the time."""


def _code_of(compile_graph: Callable[[], object]) -> str:
    """The Python code that Inductor generates for a graph."""

    def stop(code: str) -> None:
        raise _Generated(code)

    with (
        patch.object(GraphLowering, "save_output_code", stop),
        fresh_cache(),
        inductor_config.patch(force_disable_caches=True),
        pytest.raises(_Generated) as generated,
    ):
        compile_graph()
    return str(generated.value)


def _decode_code(layers: int, **options: Any) -> str:
    """The code of the decode graph of a padded batch, as the backend compiles it."""
    codes: dict[str, str] = {}
    original = alisa_backend._compile

    def generate_only(gm: fx.GraphModule, inputs: list[Any], config: AlisaConfig, mode: str | None) -> Any:
        stage = alisa_backend.stage_of(gm)
        if stage == "decode":
            twin = compat.copy_graph(gm)  # Inductor takes what it is given apart
            codes[stage] = _code_of(lambda: original(twin, inputs, config, mode))
        return compat.compile_eager(gm, inputs, through_aot=False)

    model = compiled(tiny_model("llama", layers=layers), inner="inductor", **options)
    ids, mask = left_padded(2, 9)
    with recorded_compiles() as rows, patch.object(alisa_backend, "_compile", generate_only):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [row.stage for row in rows] == ["prefill", "decode"]
    assert all(row.rewritten == layers for row in rows)
    return codes["decode"]


def _calls(code: str, *names: str) -> list[tuple[str, list[str]]]:
    """The calls of these alisa ops with the text of their arguments, in the order of the code."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("torch.ops.alisa.").removesuffix(".default")
            name = name.removesuffix(".tiered")
            if name in names:
                found.append((node.lineno, name, [ast.unparse(argument) for argument in node.args]))
    return [(name, arguments) for _, name, arguments in sorted(found)]


def _body(code: str) -> str:
    """The function that runs, without the kernels before it and the benchmark after it."""
    (call,) = (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef) and n.name == "call")
    return str(ast.unparse(call))


def _arguments(code: str, op: str) -> list[list[str]]:
    return [arguments for _, arguments in _calls(code, op)]


def assert_pools_are_used_in_place(code: str, layers: int, scales: bool) -> None:
    """Every append and attention works on the inputs themselves, and nothing else touches or allocates a pool."""
    appends, attends = _arguments(code, "kv_append"), _arguments(code, "swa_attention")
    assert [int(call[10]) for call in appends] == list(range(layers))
    assert [int(call[8]) for call in attends] == list(range(layers))
    order = [name for name, _ in _calls(code, "kv_append", "swa_attention")]
    assert order == ["kv_append", "swa_attention"] * layers
    body = _body(code)
    (inputs,) = re.findall(r"^ *\(?(arg.*?)\)? = args$", body, re.MULTILINE)
    for place in (0, 1) if scales else (0,):
        names = {call[place] for call in appends} | {call[place + 1] for call in attends}
        assert len(names) == 1, f"a step works on several pools: {sorted(names)}"
        (pool,) = names
        assert pool in inputs.replace(" ", "").split(","), f"{pool} is not the pool that came in"
        _assert_untouched(body, pool)
    assert not re.search(r"\baten\.(clone|copy_?)\b|\.clone\(|\.copy_\(", code)


def _assert_untouched(body: str, pool: str) -> None:
    """`pool` is named only where it is unpacked, checked, released and given to our ops; nothing has its shape."""
    (shape,) = re.findall(rf"assert_size_stride\({pool}, \(([^)]*)\)", body)
    rows = shape.split(",")[0]
    assert re.fullmatch(r"s\d+", rows), f"the pool's size is a constant of the code: ({shape})"
    harmless = (r"= args$", r"^assert_size_stride\(", r"^del ", r"^torch\.ops\.alisa\.", r"= torch\.ops\.alisa\.")
    for line in map(str.strip, body.splitlines()):
        if re.search(rf"\bempty\w*\(.*\b{rows}\b", line):
            raise AssertionError(f"a buffer as large as the pool is made: {line}")
        if re.search(rf"\b{pool}\b", line):
            assert any(re.search(pattern, line) for pattern in harmless), f"the pool is used in: {line}"


@CASES
def test_no_pool_is_copied(layers: int, options: dict[str, Any]) -> None:
    """4 and 16 layers that mutate one shared pool compile to code without a copy, clone or new pool."""
    is_int8 = options.get("kv_dtype") == "int8"
    code = _decode_code(layers, **options)
    assert_pools_are_used_in_place(code, layers, scales=is_int8)
    assert len(_arguments(code, "kv_select")) == (0 if options.get("sparsity") == 0.0 else layers)
    assert "kv_read" not in code and "scaled_dot_product" not in code
    assert "torch.ops.alisa.quantize_row" not in code
    if is_int8:
        # Both results of the two quantisations of a layer come from generated kernels, not from a library call.
        produced = {name for call in _arguments(code, "kv_append") for name in call[5:9]}
        assert "None" not in produced and len(produced) == 4 * layers
        kernels = re.findall(r"^ *cpp_fused\w*\((.*)\)", code, re.MULTILINE)
        written = {name for call in kernels for name in re.findall(r"\bbuf\d+\b", call)}
        assert {re.findall(r"\bbuf\d+\b", name)[0] for name in produced} <= written


MOVEMENT = ("kv_wait", "kv_append", "swa_attention", "kv_select", "kv_offload", "kv_prefetch")


def _tiered_code(layers: int, **options: Any) -> str:
    """The decode graph where a third of 800 positions fits the device."""
    row = 2 * (16 + 4) * 2 if options.get("kv_dtype") == "int8" else 2 * 2 * 16 * 4
    code = _decode_code(layers, max_length=800, device_kv_budget=layers * 2 * row * 800 // 2, **options)
    assert "swa_attention.tiered" in code
    return code


@pytest.mark.parametrize("options", (pytest.param({}, marks=SLOW), {"kv_dtype": "int8"}, {"sparsity": 0.0}), ids=str)
def test_transfers_come_in_order(options: dict[str, Any]) -> None:
    """Order, with Inductor's default settings: a layer waits just before its append and starts after its selection.

    So the wait of a layer comes after all transfers and matrix products of the layer before: none is hoisted.
    """
    layers = 4
    code = _tiered_code(layers, **options)
    names = [name for name in MOVEMENT if name != "kv_select" or options.get("sparsity") != 0.0]
    calls = _calls(code, *MOVEMENT)
    assert [name for name, _ in calls] == names * layers
    waits = [line for line in _body(code).splitlines() if "ops.alisa.kv_wait" in line]
    places = [_body(code).splitlines().index(line) for line in waits]
    starts = [i for i, line in enumerate(_body(code).splitlines()) if "ops.alisa.kv_prefetch" in line]
    products = [i for i, line in enumerate(_body(code).splitlines()) if re.search(r"\.(mm|addmm|bmm)\(|mkldnn", line)]
    assert len(waits) == len(starts) == layers
    for layer in range(1, layers):
        assert any(starts[layer - 1] < product < places[layer] for product in products), "a wait was hoisted"


@pytest.mark.parametrize("layers", (4, pytest.param(16, marks=SLOW)))
def test_what_transfers_use_lives_on(layers: int) -> None:
    """Lifetime: transfers of all layers work on the inputs themselves, which no step frees, copies or makes anew."""
    code = _tiered_code(layers)
    body = _body(code)
    assert_pools_are_used_in_place(code, layers, scales=False)
    (inputs,) = re.findall(r"^ *\(?(arg.*?)\)? = args$", body, re.MULTILINE)
    owned = inputs.replace(" ", "").split(",")
    places = {"kv_wait": (0, 1), "kv_offload": (0, 2, 3, 4), "kv_prefetch": (0, 2, 3, 4, 5, 6)}
    for name, arguments in places.items():
        calls = _arguments(code, name)
        for place in arguments:
            assert {call[place] for call in calls} <= set(owned), f"argument {place} of {name} is no input"
            assert len({call[place] for call in calls}) == 1
    # Inductor deletes an input after its last use; the caller holds it too, so only its own buffers would be freed.
    assert not re.search(r"\bempty_strided\w*\(\(s\d+, 2, 2, 16\)", body)


def _copying_pass(kind: str) -> GraphPass:
    """A fault in the last layer: attention reads a snapshot of the pool, or a pool computed anew."""

    def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
        append = [node for node in gm.graph.nodes if is_op(node, ops.kv_append.default)][-1]
        attention = [node for node in gm.graph.nodes if is_op(node, ops.swa_attention.default)]
        if attention:
            pool = append.args[0]
            with gm.graph.inserting_before(append if kind == "snapshot" else attention[-1]):
                if kind == "snapshot":
                    twin = gm.graph.call_method("clone", (pool,))
                else:
                    twin = gm.graph.call_function(operator.mul, (pool, 2))
            twin.meta["example_value"] = pool.meta["example_value"].clone()
            attention[-1].update_arg(1, twin)
            gm.recompile()
        return PassResult("alisa_fault")

    return GraphPass("alisa_fault", run)


@pytest.mark.parametrize("kind", ("snapshot", "anew"))
def test_the_check_finds_a_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that does copy the pool fails the check above, in each of its parts."""
    monkeypatch.setattr(pipeline, "PIPELINE", (*pipeline.PIPELINE, _copying_pass(kind)))
    code = _decode_code(2, sparsity=0.0)
    with pytest.raises(AssertionError, match="a step works on several pools"):
        assert_pools_are_used_in_place(code, 2, scales=False)
    with pytest.raises(AssertionError, match="a buffer as large as the pool is made"):
        _assert_untouched(_body(code), _arguments(code, "kv_append")[0][0])


def test_unfused_quantisation_would_be_seen() -> None:
    """The op name is in the code of a graph that keeps `quantize_row` opaque, so its absence means fusion."""

    def opaque(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.alisa.kv_read.default(
            rows, None, rows, rows, rows, None, None, None, None, rows, rows, 0, "prefill", "", False
        )

    def fused(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.alisa.quantize_row.default(rows + 1)

    rows = torch.randn(2, 2, 3, 8)
    code = _code_of(lambda: torch.compile(opaque)(rows))
    assert "torch.ops.alisa.kv_read" in code
    code = _code_of(lambda: torch.compile(fused)(rows))
    assert "torch.ops.alisa.quantize_row" not in code and "cpp_fused" in code
