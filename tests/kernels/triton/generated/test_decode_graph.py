"""A decode graph on a GPU is what Inductor generates: our kernels among its own, no Python, no copy of the store."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import compat
from alisa_compile.runtime.store import TokenStore
from tests.kernels.harness import Driver, Heads
from tests.kernels.triton.compiling import SHARED_MEMORY, check_fits
from tests.kernels.triton.generating import Generated, generate, register_device_guard, told_of_gpu

_HEADS = Heads(query=8, kv=2, dim=64)
_LAYERS, _BATCH = 3, 2
_GRAPHS = {"triton.cudagraphs": True}  # as under `mode="reduce-overhead"`
ops = torch.ops.alisa

#: The kernels of each op, in order of launch.
APPEND, ATTEND = ["write_rows"], ["attend_share", "merge_shares"]
SELECT = ["add_and_count", "count_digit", "count_digit", "count_digit", "write_chosen"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a store is like, and the kernels that every layer of a step launches."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    padded: bool = False
    soft_cap: float = 0.0
    launches: tuple[str, ...] = (*APPEND, *ATTEND, *SELECT)


CASES = {
    "default": Case(),
    "int8, padded": Case({"kv_dtype": "int8"}, padded=True, launches=(*APPEND, "restate_padding", *ATTEND, *SELECT)),
    "dense": Case({"sparsity": 0.0}, launches=(*APPEND, *ATTEND)),
    "soft-capped": Case(soft_cap=50.0),
    "per head": Case({"head_mode": "per_kv_head", "policy": "h2o"}),
}


def _step(
    x: torch.Tensor, weight: torch.Tensor, store: TokenStore, mask: torch.Tensor | None, soft_cap: float
) -> torch.Tensor:
    """As the rewritten graph of a model: x `[B, 1, E]`, weight `[E, (Hq + 2 Hkv) D]`."""
    query_heads, heads, dim = _HEADS.query, _HEADS.kv, _HEADS.dim
    valid = None if mask is None else store.valid
    for layer in range(_LAYERS):
        parts = (x @ weight).view(_BATCH, 1, query_heads + 2 * heads, dim).transpose(1, 2)
        query, key, value = parts.split((query_heads, heads, heads), dim=1)
        query, key = query * 2, key * 3
        key_scale = value_scale = None
        if store.scales is not None:
            (key, key_scale), (value, value_scale) = ops.quantize_row(key), ops.quantize_row(value)
        table, length = store.table, store.length
        ops.kv_append(
            store.pool, store.scales, table, length, store.valid, key, value, key_scale, value_scale, mask, layer
        )
        out, mass = ops.swa_attention(
            query, store.pool, store.scales, table, length, valid, store.rows, store.counts, layer, _HEADS.scale,
            soft_cap,
        )  # fmt: skip
        if store.rows is not None:
            state = (store.scores, store.rows, store.counts)
            ops.kv_select(*state, mass, length, store.origin, valid, layer, store.spec)
        x = x + out.transpose(1, 2).reshape(_BATCH, 1, query_heads * dim)
    return x


def _generate(case: Case, capability: int = 90, **inductor: Any) -> Generated:
    with told_of_gpu(capability, **inductor):
        driver = Driver(
            _HEADS, capacity=100, layers=_LAYERS, batch=_BATCH, dtype=torch.bfloat16, device="cuda", **case.options
        )
        width = _HEADS.query * _HEADS.dim
        x = torch.empty((_BATCH, 1, width), device="cuda", dtype=torch.bfloat16)
        weight = torch.empty((width, width + 2 * _HEADS.kv * _HEADS.dim), device="cuda", dtype=torch.bfloat16)
        mask = None
        if case.padded:
            mask = torch.empty((_BATCH, 50), device="cuda", dtype=torch.int64)
            compat.mark_dynamic(mask, 1)
        return generate(_step, x, weight, driver.store, mask, case.soft_cap)


@functools.cache
def _generated(name: str, capability: int) -> Generated:
    """The code of one case."""
    return _generate(CASES[name], capability, **_GRAPHS)


@pytest.fixture(scope="module", autouse=True)
def _device_guard() -> None:
    register_device_guard()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name == "default" else pytest.mark.slow) for name in CASES],
)
def graph(request: pytest.FixtureRequest) -> tuple[Case, Generated]:
    """Each case, and its code."""
    return CASES[request.param], _generated(request.param, 90)


def test_kernels_are_launched_by_the_generated_code(graph: tuple[Case, Generated]) -> None:
    """In order of the ops, layer after layer, by their own launchers; no op of ours is called."""
    case, generated = graph
    assert [name.rpartition("_")[0] for name, _ in generated.launches] == list(case.launches) * _LAYERS
    assert "torch.ops.alisa" not in generated.code
    assert "def attend_share(" in generated.code  # its source


def test_the_host_waits_for_nothing(graph: tuple[Case, Generated]) -> None:
    """Between a step's first launch and its last the host reads no value, and nothing is copied to it."""
    _, generated = graph
    assert generated.waits == []


_WAITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty_strided_cpu": lambda x: x.cpu() + 1,
    "nonzero": lambda x: x + x.nonzero().sum(),
}


@pytest.mark.parametrize("line", _WAITS)
def test_a_wait_shows(line: str) -> None:
    """Ways to let the host wait, as Inductor writes them."""
    scalars = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with told_of_gpu(90, **_GRAPHS), torch._dynamo.config.patch(scalars):
        waits = generate(_WAITS[line], torch.empty(16, device="cuda")).waits
    assert any(line in found for found in waits)


def test_layers_share_kernels(graph: tuple[Case, Generated]) -> None:
    """A layer's number is no reason for another kernel; where its part of a table begins may be, by its alignment."""
    case, generated = graph
    for name in set(case.launches):
        same = {other for other in generated.kernels if other.rpartition("_")[0] == name}
        most = {"attend_share": 3, "merge_shares": 3, "count_digit": 3}.get(name, 1)
        assert 0 < len(same) <= most, same


def test_the_store_is_changed_in_place(graph: tuple[Case, Generated]) -> None:
    """Every layer's kernels get the pool, scores and lists themselves, which are arguments of the graph; nothing of
    the pool's size is made."""
    case, generated = graph
    state = {"write_rows": {"pool": 4}, "attend_share": {"pool": 1}}
    state["write_chosen"] = {"scores": 0, "rows": 1, "counts": 2}
    state["add_and_count"] = {"scores": 0, "rows": 2, "counts": 3}
    given: dict[str, set[str]] = {}
    for name, arguments in generated.launches:
        for tensor, place in state.get(name.rpartition("_")[0], {}).items():
            given.setdefault(tensor, set()).add(arguments[place])
    assert set(given) == ({"pool", "scores", "rows", "counts"} if "add_and_count" in case.launches else {"pool"})
    assert all(len(names) == 1 and names.pop().startswith("arg") for names in given.values())
    heads = _HEADS.kv if case.options.get("head_mode") != "per_kv_head" else 1
    assert not re.search(rf"empty_strided_cuda\(\(s\d+, 2, {heads}, {_HEADS.dim}\)", generated.code)


def test_one_cuda_graph_holds_the_step(graph: tuple[Case, Generated]) -> None:
    """Inductor would skip none of it: one partition, and what is changed stays where it is."""
    _, generated = graph
    assert generated.cuda_graphs == (1, [])
    assert generated.mutated and generated.mutated <= generated.static


@pytest.mark.slow
def test_an_op_without_a_kernel_stays_outside() -> None:
    """Algorithm 1's ring of attention rows: selection reads lengths on the host, between two CUDA graphs."""
    generated = _generate(Case({"paper": True, "sparsity": 0.8}), **_GRAPHS)
    assert generated.code.count("torch.ops.alisa.kv_select.default(") == _LAYERS == len(generated.waits)
    assert generated.cuda_graphs == (_LAYERS, [])  # nothing is left to do after the last selection


@pytest.mark.slow
def test_without_fixed_addresses_inductor_would_skip_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the store marks its tensors is what makes the graph one that may change them."""
    monkeypatch.setattr(compat, "mark_static_address", lambda _: None)
    generated = _generate(Case({"sparsity": 0.0}), **_GRAPHS)
    assert generated.mutated and not generated.mutated & generated.static


def test_the_soft_cap_is_part_of_the_kernel(graph: tuple[Case, Generated]) -> None:
    """Its source comes from another module; where there is none, it is compiled away."""
    case, generated = graph
    caps = {each for source in generated.kernels.values() for each in re.findall(r"'CAP_LOG2': ([\d.]+)", source)}
    assert caps == {str(case.soft_cap * math.log2(math.e))}
    assert "def soft_capped(" in generated.code


#: Compiled by default; the others are slow.
_QUICK = {("default", 90), ("int8, padded", 75)}


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(*pair, marks=[] if pair in _QUICK else pytest.mark.slow)
        for pair in itertools.product(CASES, SHARED_MEMORY)
    ],
)
def test_generated_kernels_compile(name: str, capability: int, tmp_path: Path) -> None:
    """With the configurations, types, constants and alignments that Inductor wrote down for this GPU: no spills, enough
    shared memory."""
    case = CASES[name]
    generated = _generated(name, capability)
    first = {kernel.rpartition("_")[0]: kernel for kernel in reversed(generated.kernels)}
    assert set(first) == set(case.launches)
    with told_of_gpu(capability):
        check_fits([each for kernel in first.values() for each in generated.compile(kernel, capability, tmp_path)])
