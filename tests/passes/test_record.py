"""Records of the passes, fuel, and what both mean for torch's caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

pytest.importorskip("transformers")

import alisa_compile
from alisa_compile import backend
from alisa_compile.config import AlisaConfig
from alisa_compile.errors import AlisaError
from alisa_compile.passes import fuel, pipeline, record
from alisa_compile.passes.base import GraphPass, PassResult
from alisa_compile.passes.record import GraphRecord
from tests.support import compiled, left_padded, tiny_model

LAYERS = 2
ATTENTION = "scaled_dot_product_attention"


def generate(model: Any, length: int = 9, **options: Any) -> torch.Tensor:
    ids, mask = left_padded(2, length)
    return compiled(model, inner="eager", **options).generate(
        ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", layers=LAYERS)


@pytest.fixture(scope="module")
def stock_tokens(model: Any) -> torch.Tensor:
    ids, mask = left_padded(2, 9)
    return model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def graphs(model: Any) -> dict[str, GraphRecord]:
    """The records of a generation on tiers, by stage."""
    with alisa_compile.record() as found:
        generate(model, 200, device_kv_budget="100KiB", host_kv_budget="1MiB")
    return {graph.stage: graph for graph in found}


def test_every_pass_is_there_in_order(graphs: dict[str, GraphRecord]) -> None:
    """Each starts from what the one before left."""
    assert list(graphs) == ["prefill", "decode"]
    for graph in graphs.values():
        assert [each.name for each in graph.passes] == [each.name for each in pipeline.PIPELINE]
        assert all(first.after is second.before for first, second in zip(graph.passes, graph.passes[1:], strict=False))
        assert all(each.seconds > 0 and not each.off for each in graph.passes)
        assert graph.error == ""


def test_a_rewrite_says_what_it_matched_and_what_stands_there_now(graphs: dict[str, GraphRecord]) -> None:
    """One for each layer, with the rule's own line; names are those of the stages."""
    rewriting = next(each for each in graphs["decode"].passes if each.name == "alisa_rewrite_attention")
    assert [rewrite.layer for rewrite in rewriting.rewrites] == list(range(LAYERS))
    before = {node.name: node for node in rewriting.before.nodes}
    after = {node.name: node for node in rewriting.after.nodes}
    for rewrite in rewriting.rewrites:
        assert rewrite.rule == "decode attention"
        matched = [before[name].target for name in rewrite.matched]
        assert "scaled_dot_product_attention" in matched
        placed = [after[name].target.split(".")[1] for name in rewrite.replaced if "alisa." in after[name].target]
        waiting = ["kv_wait", *(["kv_append"] if len(matched) > 1 else [])]
        assert placed == [*waiting, "swa_attention", "kv_select", "kv_offload", "kv_prefetch"]
        source = rewrite.source
        assert source.file == "alisa_compile/passes/rewrite_attention.py"
        with open(pipeline.rewrite_attention.__file__, encoding="utf-8") as file:
            assert "result.rewrite(" in file.read().splitlines()[source.line - 1]
    numbers = [r.number for graph in graphs.values() for each in graph.passes for r in each.rewrites]
    assert numbers == sorted(set(numbers))


def test_a_node_knows_its_value_and_the_models_line(graphs: dict[str, GraphRecord]) -> None:
    """Shapes as the graph has them, bytes, and a line of the model's file, not of torch's or ours."""
    nodes = {node.target: node for node in graphs["decode"].before.nodes if node.layer == 1}
    attention = nodes["scaled_dot_product_attention"]
    assert attention.value == "float32[2, 4, 1, 16]" and attention.nbytes == 2 * 4 * 16 * 4
    assert attention.module == "model.layers.1.self_attn"
    assert attention.source is not None and attention.source.place.startswith("modeling_llama.py:")
    assert attention.source.code.startswith("attn_output")
    read = nodes["alisa.kv_read.tiered"]
    assert read.arguments.startswith("store.pool, None, store.table, store.length")


def test_nothing_is_recorded_unless_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no text is made of any graph."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("somebody reads the graph")

    monkeypatch.setattr(record, "Reader", fail)
    monkeypatch.setattr(record, "Watch", fail)
    generate(model)
    with pytest.raises(Exception, match="somebody reads the graph"), alisa_compile.record():
        generate(model)


def test_passes_that_fail_are_recorded_up_to_there(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the error."""

    def run(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
        raise ValueError("planted")

    monkeypatch.setattr(pipeline, "PIPELINE", (*pipeline.PIPELINE, GraphPass("planted", run)))
    with alisa_compile.record() as found, pytest.raises(Exception, match="planted"):
        generate(model)
    assert [len(graph.passes) for graph in found] == [len(pipeline.PIPELINE) - 1]
    assert found[0].error == "ValueError: planted"
    assert sum(len(each.rewrites) for each in found[0].passes) >= LAYERS


def test_a_switched_off_pass_is_recorded_as_off(model: Any) -> None:
    """Every attention has that reason."""
    from alisa_compile import compat

    with alisa_compile.record() as found, compat.disabled_pass("alisa_rewrite_attention"):
        generate(model)
    assert [each.name for each in found[0].passes if each.off] == ["alisa_rewrite_attention"]
    assert {row.reason for row in found[0].skipped} == {"switched off: alisa_rewrite_attention"}


@pytest.mark.parametrize("limit", [0, LAYERS + 1, 3 * LAYERS + 1])
def test_fuel_is_the_number_of_rewrites(model: Any, stock_tokens: torch.Tensor, limit: int) -> None:
    """Over all graphs; what stays dense has that reason; tokens are right with every amount, for each part is exact."""
    with alisa_compile.record() as found, fuel.limited(limit):
        assert (generate(model, sparsity=0.0) == stock_tokens).all()
        assert fuel.used() == limit
    assert sum(len(each.rewrites) for graph in found for each in graph.passes) == limit
    assert {row.reason for graph in found for row in graph.skipped} == {fuel.OUT_OF_FUEL}
    dense = sum(node.target == ATTENTION for graph in found for node in graph.after.nodes)
    assert dense == sum(len(graph.skipped) for graph in found) > 0


def test_folds_take_fuel_too() -> None:
    """And an attention that nobody folds any more has one reason, the true one."""
    model = tiny_model("neox", layers=2)
    model.set_attn_implementation("eager")
    with alisa_compile.record() as found, fuel.limited(1):
        generate(model)
    first = found[0]
    assert [each.name for each in first.passes for _ in each.rewrites] == ["alisa_fold_eager_attention"]
    assert {row.reason for row in first.skipped} == {fuel.OUT_OF_FUEL}


def test_the_variable_is_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ALISA_FUEL counts from the start of the process."""
    monkeypatch.setenv("ALISA_FUEL", str(fuel.used() + 2))
    with alisa_compile.record() as found:
        generate(model)
    assert sum(len(each.rewrites) for graph in found for each in graph.passes) == 2
    monkeypatch.setenv("ALISA_FUEL", "some")
    with pytest.raises(AlisaError, match="ALISA_FUEL"):
        fuel.take()


def planted_pass(gm: fx.GraphModule, config: AlisaConfig) -> PassResult:
    return PassResult("planted")


def test_fuel_and_passes_from_outside_are_in_the_cache_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Else torch's caches would serve the code of another list of passes. The source of such a pass counts."""
    keys = [backend._fingerprint(pipeline.identity()).uuid()]
    with fuel.limited(3):
        keys.append(backend._fingerprint(pipeline.identity()).uuid())
    with fuel.limited(4):
        keys.append(backend._fingerprint(pipeline.identity()).uuid())
    original = pipeline.PIPELINE
    monkeypatch.setattr(pipeline, "PIPELINE", (*original, GraphPass("planted", planted_pass)))
    keys.append(backend._fingerprint(pipeline.identity()).uuid())
    for body in ("return 1", "return 2"):
        path = tmp_path / "outside.py"
        path.write_text(f"def run(gm, config):\n    {body}\n")
        namespace: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), namespace)
        monkeypatch.setattr(pipeline, "PIPELINE", (*original, GraphPass("planted", namespace["run"])))
        keys.append(backend._fingerprint(pipeline.identity()).uuid())
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(pipeline, "PIPELINE", original)
    assert backend._fingerprint(pipeline.identity()).uuid() == keys[0]
