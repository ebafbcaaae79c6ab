"""K and V rebuilt from a layer's input are those that the model stored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx

from alisa_compile import AlisaCache, compat
from alisa_compile.hf.cache import observe_kv_shapes
from alisa_compile.kernels.quantize_row import dequantize_row, quantize_row
from alisa_compile.passes.base import Refusal, Writes, is_op
from alisa_compile.passes.kv_producer import KVProducer, ProducerCut, compile_producers, cut_producer, layer_input
from alisa_compile.passes.rewrite_attention import APPENDS
from alisa_compile.runtime.store import TokenStore

PROMPT, NEW, BATCH, WIDTH = 13, 4, 2, 64
_BASE: dict[str, Any] = {"vocab_size": 128, "hidden_size": WIDTH, "num_attention_heads": 4}
_LAYERS: dict[str, Any] = {**_BASE, "num_hidden_layers": 2, "max_position_embeddings": 256}
_GQA: dict[str, Any] = {**_LAYERS, "num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_GQA),
    "llama, multi-head": lambda: hf.LlamaConfig(**{**_GQA, "num_key_value_heads": 4}, attention_bias=True),
    "opt": lambda: hf.OPTConfig(**_LAYERS, ffn_dim=96, word_embed_proj_dim=WIDTH),
    "opt, norm after": lambda: hf.OPTConfig(
        **_LAYERS, ffn_dim=96, word_embed_proj_dim=WIDTH, do_layer_norm_before=False
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_LAYERS, intermediate_size=96),
    "qwen3": lambda: hf.Qwen3Config(**_GQA, head_dim=24),
    "falcon, multi-query": lambda: hf.FalconConfig(
        **_BASE, num_hidden_layers=2, multi_query=True, new_decoder_architecture=False, alibi=False
    ),
    "falcon, new decoder": lambda: hf.FalconConfig(
        **_BASE, num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "gemma 3": lambda: hf.Gemma3TextConfig(
        **{**_GQA, "num_hidden_layers": 4, "head_dim": 16},
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}


@dataclasses.dataclass
class Run:
    """A short generation: its graphs with their arguments, the store, and the layer inputs that the store was fed from.

    hidden: by layer, `[B, PROMPT + NEW, hidden]`, as the graphs computed them. positions: `[B, PROMPT + NEW]`.
    """

    prefill: fx.GraphModule
    arguments: list[Any]
    decode: fx.GraphModule
    store: TokenStore
    hidden: dict[int, torch.Tensor]
    positions: torch.Tensor

    def copied(self) -> Run:
        """With a prefill graph that may be changed."""
        return dataclasses.replace(self, prefill=compat.copy_graph(self.prefill))

    def append(self, layer: int, stage: str = "prefill") -> fx.Node:
        gm = getattr(self, stage)
        (found,) = (n for n in gm.graph.nodes if is_op(n, *APPENDS) and n.args[10] == layer)
        return found

    def cut(self, layer: int, width: int = WIDTH) -> ProducerCut:
        return cut_producer(self.prefill, self.append(layer), Writes(self.prefill.graph), width)

    def producer(self, layer: int, compiler: str = "eager") -> KVProducer:
        return compile_producers({layer: self.cut(layer)}, compiler)[layer](self.arguments)

    def stored(self, layer: int, end: int = PROMPT + NEW) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, Hkv, T, D]` as the store has them."""
        rows, scales = self.store.read(layer, 0, end)
        if scales is not None:
            rows = dequantize_row(rows, scales, torch.float32)
        both = rows.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        return both[0], both[1]


class _Recorder:
    """A backend that runs graphs as they are, and keeps the values of the layer inputs."""

    def __init__(self) -> None:
        self.graphs: list[tuple[fx.GraphModule, list[Any]]] = []
        self.hidden: dict[int, list[torch.Tensor]] = {}

    def __call__(self, gm: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        gm = compat.copy_graph(gm)
        self.graphs.append((gm, inputs))
        places = {}
        for append in [n for n in gm.graph.nodes if is_op(n, *APPENDS)]:
            places[int(append.args[10])] = layer_input(append, WIDTH)[0]
        run = compat.copy_graph(gm)
        (output,) = (n for n in run.graph.nodes if n.op == "output")
        by_name = {node.name: node for node in run.graph.nodes}
        output.args = ((*output.args[0], *(by_name[node.name] for node in places.values())),)
        run.recompile()

        def call(*arguments: Any) -> Any:
            out = run(*arguments)
            for layer, value in zip(places, out[len(out) - len(places) :], strict=True):
                self.hidden.setdefault(layer, []).append(value.detach().clone())
            return out[: len(out) - len(places)]

        return call


def short_run(config: Any, **options: Any) -> Run:
    """PROMPT tokens at once, then NEW tokens one by one, through a cache that keeps everything on the device."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    shapes = observe_kv_shapes(model)
    cache = AlisaCache(model.config, batch_size=BATCH, kv_shapes=shapes, sparsity=0.0, max_length=64, **options)
    recorder = _Recorder()
    torch._dynamo.reset()
    forward = torch.compile(model, backend=recorder)
    (store,) = cache.stores
    start = torch.tensor([[3], [0]])  # as if the first row had padding before
    positions = start + torch.arange(PROMPT + NEW)
    with torch.no_grad():
        for first, end in [(0, PROMPT), *((n, n + 1) for n in range(PROMPT, PROMPT + NEW))]:
            ids = torch.randint(2, 128, (BATCH, end - first))
            own, mask = positions[:, first:end].contiguous(), torch.ones((BATCH, end), dtype=torch.int64)
            for tensor in (ids, own):
                compat.mark_static(tensor, 0)
                if end - first > 1:
                    compat.mark_dynamic(tensor, 1)
            compat.mark_dynamic(mask, 1)
            store.begin_step(end - first)
            forward(input_ids=ids, position_ids=own, attention_mask=mask, past_key_values=cache)
            store.end_step(end - first)
    (prefill, arguments), (decode, _) = recorder.graphs[:2]
    hidden = {layer: torch.cat(values, 1) for layer, values in recorder.hidden.items()}
    return Run(prefill, arguments, decode, store, hidden, positions)


#: Those of which everything is shown.
SIX = ("llama, multi-head", "opt", "gpt-neox", "qwen3", "falcon, multi-query", "gemma 3")
_SLOW = ("llama", "opt, norm after", "falcon, new decoder")


@functools.cache
def family_run(name: str) -> Run:
    """`short_run` of a family; not to be changed."""
    return short_run(FAMILIES[name]())


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in FAMILIES])
def run(request: pytest.FixtureRequest) -> Run:
    return family_run(request.param)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_rebuilt_as_stored(run: Run) -> None:
    """Bit-equal at the shape of the prefill; within 2e-6 for tokens of decode steps, and in any other batch.

    The layer inputs of the last tokens are those of the decode graph.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in range(run.store.shape.num_layers):
        producer, expected = run.producer(layer), run.stored(layer)
        hidden = run.hidden[layer]
        at_prefill = producer(hidden[:, :PROMPT], run.positions[:, :PROMPT])
        for got, want in zip(at_prefill, expected, strict=True):
            assert torch.equal(got, want[:, :, :PROMPT])
        for tokens in (torch.randperm(PROMPT + NEW, generator=generator), torch.tensor([PROMPT + 1]), torch.arange(5)):
            rebuilt = producer(hidden[:, tokens], run.positions[:, tokens])
            for got, want in zip(rebuilt, expected, strict=True):
                assert got.shape == want[:, :, tokens].shape
                assert _error(got, want[:, :, tokens]) <= 2e-6


def test_positions_and_inputs_matter(run: Run) -> None:
    """The comparison fails with the input of another token, and of another position where K is rotated."""
    producer, (key, value), hidden = run.producer(0), run.stored(0), run.hidden[0]
    got = producer(hidden.roll(1, 1), run.positions)
    assert _error(got[1], value) > 1e-2
    moved = producer(hidden, run.positions + 1)
    rotated = run.cut(0).positions is not None
    assert (_error(moved[0], key) > 1e-3) == rotated
    assert torch.equal(moved[1], producer(hidden, run.positions)[1])


def test_parameters_are_the_models_own(run: Run) -> None:
    """Not copies: changing a weight in place changes what is rebuilt."""
    producer = run.producer(1)
    before = producer(run.hidden[1], run.positions)
    weights = [t for t in producer._constants if isinstance(t, torch.nn.Parameter) and t.dim() == 2]
    assert weights and all(any(w is argument for argument in run.arguments) for w in weights)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(2)
        after = producer(run.hidden[1], run.positions)
        for weight in weights:
            weight.div_(2)
    assert _error(after[1], before[1]) > 0.1


def test_layers_share_code(run: Run) -> None:
    """One compilation serves all layers of the same structure."""
    keys = {run.cut(layer).key for layer in range(run.store.shape.num_layers)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("qwen3", "gpt-neox"))) for name in SIX]
)
def test_compiled_by_inductor(family: str) -> None:
    """Any number of tokens, in one compilation for all layers."""
    run = family_run(family)
    layers = range(run.store.shape.num_layers)
    makers = compile_producers({layer: run.cut(layer) for layer in layers}, "inductor")
    torch._dynamo.utils.counters.clear()
    for layer in layers:
        producer, expected = makers[layer](run.arguments), run.stored(layer)
        for tokens in (torch.arange(7), torch.tensor([4]), torch.arange(PROMPT + NEW)):
            rebuilt = producer(run.hidden[layer][:, tokens], run.positions[:, tokens])
            for got, want in zip(rebuilt, expected, strict=True):
                assert _error(got, want[:, :, tokens]) <= 2e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("opt", "qwen3"))) for name in SIX]
)
def test_hidden_int8(family: str) -> None:
    """From an int8 layer input: within its rounding, half a step in each channel, as the producer carries it on."""
    run = short_run(FAMILIES[family](), kv_dtype="int8")
    producer, hidden = run.producer(0), run.hidden[0]
    rounded, scale = quantize_row(hidden)
    restored = dequantize_row(rounded, scale, torch.float32)
    half_step = 0.5001 * scale
    assert bool(((restored - hidden).abs() <= half_step.unsqueeze(-1)).all())
    exact, got = producer(hidden, run.positions), producer(restored, run.positions)
    for a, b, slope in zip(got, exact, _slopes(producer, hidden, run.positions), strict=True):
        # Norms are not linear: what the slope leaves out is of the order of the rounding squared.
        bound = 1.02 * slope * half_step[:, None, :, None] + 2e-6 * b.abs().max()
        assert bool(((a - b).abs() <= bound).all())
        assert 1e-4 < _error(a, b) < 0.03
    # What the store holds is int8 too: half a step of its own scale apart.
    _, scales = run.store.read(0, 0, PROMPT + NEW)
    assert scales is not None
    steps = scales.permute(3, 0, 1, 4, 2).flatten(2, 3).unsqueeze(-1)  # [K|V, B, Hkv, T, 1]
    for stored, b, step in zip(run.stored(0), exact, steps, strict=True):
        assert bool(((stored - b).abs() <= 0.5001 * step + 2e-6 * b.abs().max()).all())


def _slopes(producer: KVProducer, hidden: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """For each element of K and V `[B, Hkv, T, D]`, how much all channels of its token's input can move it together."""
    hidden = hidden.detach().clone().requires_grad_()
    shared = positions[:1] if producer.shares_positions else positions
    arguments = [hidden] if producer._positions == "none" else [hidden, shared]
    slopes = []
    with torch.enable_grad():
        for part in producer._function(*arguments, *producer._constants):
            slope = torch.zeros_like(part)
            for head in range(part.shape[1]):
                for channel in range(part.shape[3]):  # tokens do not depend on each other
                    (gradient,) = torch.autograd.grad(part[:, head, :, channel].sum(), hidden, retain_graph=True)
                    slope[:, head, :, channel] = gradient.abs().sum(-1)
            slopes.append(slope.detach())
    return slopes


def test_refusals() -> None:
    """No layer input of the width asked for; and K and V that depend on what the cache holds."""
    run = family_run("llama, multi-head").copied()
    with pytest.raises(Refusal, match="no tensor of width 48"):
        run.cut(0, width=48)
    append = run.append(1)
    read = next(n for n in run.prefill.graph.nodes if "kv_read" in str(n.target))
    with run.prefill.graph.inserting_before(append):
        first = run.prefill.graph.call_function(lambda pair: pair[0], (read,))
        first.meta["example_value"] = append.args[6].meta["example_value"]
        mixed = run.prefill.graph.call_function(torch.add, (append.args[6], first))
        mixed.meta["example_value"] = append.args[6].meta["example_value"]
    append.update_arg(6, mixed)
    with pytest.raises(Refusal, match="through attention or the cache"):
        run.cut(1)


def test_written_in_place() -> None:
    """A layer input that is written to before K and V are stored cannot be saved there."""
    run = family_run("llama, multi-head").copied()
    append, hidden = run.append(1), run.cut(1).hidden
    with run.prefill.graph.inserting_before(append):
        run.prefill.graph.call_method("add_", (hidden, 1)).meta["example_value"] = hidden.meta["example_value"]
    with pytest.raises(Refusal, match="written to"):
        run.cut(1)
