"""What the passes leave of graphs that Dynamo captured: which nodes, how many, and when they must stay away."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from alisa_compile import AlisaCache
from alisa_compile.backend import alisa
from alisa_compile.passes.base import attention_nodes, example, is_call, is_op
from alisa_compile.passes.fold_repeated_heads import unrepeated
from tests.passes.graphs import Capture, captures, dynamo_graph, hint, ops, returned
from tests.support import compiled, left_padded, tiny_model

ATTENTION = (ops.swa_attention.default, ops.prefill_attention.default, ops.extend_attention.default)
SCORING = (ops.kv_select.default, ops.kv_seed.default)
BATCH, PROMPT = 2, 11


def _generated(model: Any, padded: bool = True, turns: int = 1, **options: Any) -> dict[str, Capture]:
    """The graphs of a conversation, by stage."""
    candidate = compiled(model, inner="eager", **options)
    cache = AlisaCache(model.config, **options)
    ids, mask = left_padded(BATCH, PROMPT)
    mask = mask if padded else torch.ones_like(mask)
    with captures() as found:
        for _ in range(turns):
            out = candidate.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3)
            ids = torch.cat([out, torch.randint(2, 128, (BATCH, 4))], dim=1)
            mask = torch.cat([mask, mask.new_ones(BATCH, ids.shape[1] - mask.shape[1])], dim=1)
    stages = [capture.stage for capture in found]
    assert stages == ["prefill", "decode", "extend"][: 1 + turns]
    return dict(zip(stages, found, strict=True))


def _counts(capture: Capture) -> dict[str, int]:
    """How often each alisa op, and attention, is in the rewritten graph."""
    names = [str(node.target) for node in capture.after.graph.nodes if str(node.target).startswith("alisa.")]
    dense = ["attention"] * len(attention_nodes(capture.after))
    return dict(Counter([name.removesuffix(".default").removeprefix("alisa.") for name in names] + dense))


def _no_mask_left(capture: Capture) -> None:
    """No boolean value as wide as the keys is computed any more, nor any value with a query and a key dimension.

    The one value as wide as the context is the attention mass, of at most the last rows that seed the scores.
    """
    reads = [node for node in capture.before.graph.nodes if node.target is ops.kv_read.default]
    keys = hint(example(reads[0])[0].shape[2])
    queries = hint(example(reads[0].args[9]).shape[2])
    for node in capture.after.graph.nodes:
        value = example(node)
        is_mass = is_call(node, "getitem") and is_op(node.args[0], *ATTENTION)
        if node.op == "placeholder" or is_mass or not isinstance(value, torch.Tensor):
            continue
        shape = [hint(size) for size in value.shape]
        assert not (value.dtype == torch.bool and keys in shape), f"{node} is a mask {shape}"
        assert shape[-2:] != [queries, keys], f"{node} is a score matrix {shape}"
        assert queries == keys or keys not in shape, f"{node} is as wide as the context"


@pytest.mark.parametrize(
    ("layers", "options"),
    ((2, {"sparsity": 0.0}), (5, {"sparsity": 0.0}), (5, {}), (2, {"paper": True}), (2, {"kv_dtype": "int8"})),
)
def test_node_counts(layers: int, options: dict[str, Any]) -> None:
    """L appends, L attentions, L selections (none at sparsity 0), nothing dense, no mask; in all three graphs."""
    found = _generated(tiny_model("llama", layers=layers), turns=2, **options)
    quantize = {"quantize_row": 2 * layers} if options.get("kv_dtype") == "int8" else {}
    scoring = {"prefill": "kv_seed", "decode": "kv_select", "extend": "kv_seed"}
    attention = {"prefill": "prefill_attention", "decode": "swa_attention", "extend": "extend_attention"}
    for stage, capture in found.items():
        expected = {"kv_append": layers, attention[stage]: layers, **quantize}
        if options.get("sparsity") != 0.0:
            expected[scoring[stage]] = layers
        assert _counts(capture) == expected
        assert capture.outcome.rewritten == layers and not capture.outcome.skipped
        _no_mask_left(capture)
        _in_layer_order(capture, layers)


def _in_layer_order(capture: Capture, layers: int) -> None:
    """append 0, attention 0, selection 0, append 1, ..."""
    names = [str(n.target) for n in capture.calls(ops.kv_append.default, *ATTENTION, *SCORING)]
    assert names == names[: len(names) // layers] * layers
    assert [n.args[10] for n in capture.calls(ops.kv_append.default)] == list(range(layers))
    for op, place in ((ATTENTION[0], 8), (ATTENTION[2], 8), (SCORING[0], 7), (SCORING[1], 8)):
        assert [n.args[place] for n in capture.calls(op)] in ([], list(range(layers)))


@pytest.mark.parametrize("padded", (False, True))
def test_padding_is_given_to_one_append(padded: bool) -> None:
    """The padding mask reaches exactly one append of the store, the first, and only if the batch is padded."""
    for capture in _generated(tiny_model("llama", layers=3), padded=padded, turns=2).values():
        masks = [node.args[9] for node in capture.calls(ops.kv_append.default)]
        assert masks[1:] == [None, None]
        assert (masks[0] is not None) == padded
        if padded:
            assert masks[0].op == "placeholder" and "attention_mask" in masks[0].name
        for node in capture.calls(ops.swa_attention.default):
            assert (node.args[5] is not None) == padded
        for node in capture.calls(ops.prefill_attention.default):
            assert (node.args[3] is not None) == padded


@pytest.mark.parametrize(("family", "flag"), (("llama", False), ("llama", True), ("qwen3", False)))
def test_both_spellings_of_grouped_queries(family: str, flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """enable_gqa, and K and V repeated per query head: the same rewrite, with nothing of the repetition left."""
    monkeypatch.setattr("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: flag)
    found = _generated(tiny_model(family))
    for capture in found.values():
        flagged = [bool(node.kwargs.get("enable_gqa")) for node in attention_nodes(capture.before)]
        assert flagged == [flag] * 2
        folded = [result.rewritten for result in capture.outcome.passes if result.name == "alisa_fold_repeated_heads"]
        assert folded == [0 if flag else 2]
        assert capture.outcome.rewritten == 2
        heads = {example(node.args[0]).shape[1] for node in capture.calls(*ATTENTION)}
        assert heads == {4}
        repeated = (BATCH, 2, 2)  # [B, Hkv, n, T, D]
        shapes = [example(n).shape for n in capture.after.graph.nodes if isinstance(example(n), torch.Tensor)]
        assert not any(len(shape) == 5 and tuple(shape[:3]) == repeated for shape in shapes)


def test_default_scale_is_computed() -> None:
    """scale=None becomes 1 / sqrt(head_dim); a given scale is kept."""
    for scale, expected in ((None, 1 / math.sqrt(8)), (0.25, 0.25), (2, 2)):
        capture = _attend(lambda q, k, v, m, s=scale: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=s))
        (node,) = capture.calls(*ATTENTION)
        assert node.args[-1] == expected


# A hand-written attention over an AlisaCache, to see where the rewrite stays away

HEADS, HEAD_DIM = 4, 8


class Attend(nn.Module):
    """One step: store K and V in each layer, attend with `attention(query, key, value, mask)`, sum over layers."""

    def __init__(self, attention: Callable[..., torch.Tensor], layers: int = 1, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.attention, self.layers, self.kv_heads = attention, layers, kv_heads
        self.project = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def heads(self, hidden: torch.Tensor, count: int = HEADS) -> torch.Tensor:
        """`[B, H, T, D]`."""
        return hidden.view(hidden.shape[0], -1, HEADS, HEAD_DIM).transpose(1, 2)[:, :count]

    def mask(self, cache: AlisaCache, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """Causal, from the length of the cache; with the padding of `padding` if given."""
        batch_size, new_tokens = hidden.shape[:2]
        keys, _ = cache.get_mask_sizes(new_tokens, 0)
        return hf.masking_utils.sdpa_mask(
            batch_size,
            new_tokens,
            keys,
            q_offset=cache.layers[0].get_seq_length(),
            attention_mask=padding,
            allow_is_causal_skip=False,
        )

    def forward(self, hidden: torch.Tensor, cache: AlisaCache, padding: torch.Tensor | None = None) -> torch.Tensor:
        """hidden: `[B, T, H * D]`."""
        mask = self.mask(cache, hidden, padding)
        for layer in range(self.layers):
            projected = self.project(hidden)
            key, value = self.heads(projected, self.kv_heads), self.heads(projected.tanh(), self.kv_heads)
            key, value = cache.update(key, value, layer)
            out = self.attention(self.heads(hidden), key, value, mask)
            hidden = hidden + out.transpose(1, 2).reshape(hidden.shape)
        return hidden


def _cache(layers: int, kv_heads: int = HEADS, **options: Any) -> AlisaCache:
    config = hf.LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=32,
    )
    return AlisaCache(config, batch_size=BATCH, max_length=32, dtype=torch.float32, **options)


@dataclasses.dataclass
class Setup:
    """How `_attend` runs the module."""

    layers: int = 1
    kv_heads: int = HEADS
    tokens: int = 1
    no_grad: bool = True
    padded: bool = False
    module: type[Attend] = Attend


def _attend(attention: Callable[..., torch.Tensor], setup: Setup | None = None) -> Capture:
    """The graph of one step after a history of 5 tokens (tokens > 0) or without one (tokens < 0)."""
    setup = setup or Setup()
    torch.manual_seed(0)
    module = setup.module(attention, setup.layers, setup.kv_heads)
    cache = _cache(setup.layers, setup.kv_heads, sparsity=0.5)
    if setup.tokens > 0:
        with torch.no_grad():
            for layer in range(setup.layers):
                cache.update(*torch.randn(2, BATCH, setup.kv_heads, 5, HEAD_DIM), layer)
    hidden = torch.randn(BATCH, abs(setup.tokens), HEADS * HEAD_DIM)
    padding = torch.ones(BATCH, abs(setup.tokens) + 5 * (setup.tokens > 0), dtype=torch.bool) if setup.padded else None
    torch._dynamo.reset()
    step = torch.compile(module, backend=alisa, fullgraph=True, options={"inner_compiler": "eager", "sparsity": 0.5})
    with captures() as found, torch.set_grad_enabled(not setup.no_grad):
        step(hidden, cache, padding)
    (capture,) = found
    return capture


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor, **options: Any) -> torch.Tensor:
    """The attention that is rewritten."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m, **options)


@pytest.mark.parametrize("setup", (Setup(), Setup(tokens=3), Setup(tokens=-6), Setup(layers=3), Setup(padded=True)))
def test_plain_attention_over_the_cache_is_rewritten(setup: Setup) -> None:
    """The module that the refusals below are variations of is rewritten: decode, extend, prefill, several layers."""
    capture = _attend(sdpa, setup)
    assert capture.outcome.rewritten == setup.layers and not capture.outcome.skipped
    assert not attention_nodes(capture.after)


def _first_is_foreign(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return sdpa(q, torch.zeros_like(k), v, m)


def _written_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    k.mul_(2)
    return sdpa(q, k, v, m)


def _per_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, m.expand(-1, HEADS, -1, -1))


REFUSED: dict[str, tuple[Callable[..., torch.Tensor], Setup, str]] = {
    "swapped": (lambda q, k, v, m: sdpa(q, v, k, m), Setup(), "its K and V are swapped"),
    "K twice": (lambda q, k, v, m: sdpa(q, k, k, m), Setup(), "its K and V are swapped"),
    "dropout": (lambda q, k, v, m: sdpa(q, k, v, m, dropout_p=0.5), Setup(), "it uses dropout"),
    "dropout by position": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.5),
        Setup(),
        "it uses dropout",
    ),
    "gradients": (sdpa, Setup(no_grad=False), "gradients are enabled"),
    "longer query": (
        lambda q, k, v, m: sdpa(torch.cat([q, q], 2), k, v, m)[:, :, :1],
        Setup(),
        "its query is not the new tokens' alone",
    ),
    "last query only": (
        lambda q, k, v, m: sdpa(q[:, :, -1:], k, v, m[:, :, -1:]).expand(-1, -1, 3, -1),
        Setup(tokens=3),
        "its query is not the new tokens' alone",
    ),
    "mask of the last query": (
        lambda q, k, v, m: sdpa(q, k, v, m[:, :, -1:]),
        Setup(tokens=3),
        "its mask slices a condition",
    ),
    "foreign K": (_first_is_foreign, Setup(), "do not come from an AlisaCache"),
    "scaled K": (lambda q, k, v, m: sdpa(q, 2 * k, v, m), Setup(), "do not come from an AlisaCache"),
    "sliced K": (
        lambda q, k, v, m: sdpa(q, k[:, :, :8], v[:, :, :8], m[..., :8]),
        Setup(),
        "do not come from an AlisaCache|neither an AlisaCache nor a static buffer",
    ),
    "K written to": (_written_key, Setup(), "written to after it was stored"),
    "no mask after a history": (lambda q, k, v, m: sdpa(q, k, v, None), Setup(tokens=3), "it has no mask although"),
    "bidirectional prompt": (lambda q, k, v, m: sdpa(q, k, v, None), Setup(tokens=-6), "it is not causal"),
    "mask and is_causal": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
        Setup(),
        "is_causal on a single query",
    ),
    "mask per head": (_per_head, Setup(), "its mask differs between heads"),
    "mask without batch": (lambda q, k, v, m: sdpa(q, k, v, m[0, 0]), Setup(), "its mask has 2 dimensions"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_stays_away(kind: str) -> None:
    """The attention stays as it is, and the skip row has its node, its layer where known, and the reason."""
    attention, setup, reason = REFUSED[kind]
    capture = _attend(attention, setup)
    (node,) = attention_nodes(capture.after)
    (row,) = capture.outcome.skipped
    assert capture.outcome.rewritten == 0 and not capture.calls(*ATTENTION, *SCORING)
    assert row.node == node.name
    assert any(part in row.reason for part in reason.split("|")), row.reason
    assert row.layer == (None if kind == "sliced K" else 0)
    assert len(capture.calls(ops.kv_append.default)) == 1


class OtherOffset(Attend):
    """A mask whose queries stand one place further than the history."""

    def mask(self, cache: AlisaCache, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """length + 1."""
        key = torch.arange(cache.get_mask_sizes(hidden.shape[1], 0)[0])
        query = torch.arange(hidden.shape[1]) + cache.layers[0].get_seq_length() + 1
        mask = key[None, None, None, :] <= query[None, None, :, None]
        return mask.expand(hidden.shape[0], 1, hidden.shape[1], key.shape[0])


class StrictMask(Attend):
    """Strictly causal: a token does not see itself."""

    def mask(self, cache: AlisaCache, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """lt."""
        key = torch.arange(cache.get_mask_sizes(hidden.shape[1], 0)[0])
        query = torch.arange(hidden.shape[1]) + cache.layers[0].get_seq_length()
        return key[None, None, None, :] < query[None, None, :, None]


class NoOffset(Attend):
    """A mask that counts queries from 0 although there is a history."""

    def mask(self, cache: AlisaCache, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """No offset."""
        key = torch.arange(cache.get_mask_sizes(hidden.shape[1], 0)[0])
        return key[None, None, None, :] <= torch.arange(hidden.shape[1])[None, None, :, None]


class OneRow(Attend):
    """One row of a mask for all queries."""

    def mask(self, cache: AlisaCache, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """[B, 1, 1, K]."""
        key = torch.arange(cache.get_mask_sizes(hidden.shape[1], 0)[0])
        query = torch.arange(1) + cache.layers[0].get_seq_length()
        return key[None, None, None, :] <= query[None, None, :, None]


class LateMask(Attend):
    """The mask is made from the length after K and V were stored, so it is off by the new tokens."""

    def forward(self, hidden: torch.Tensor, cache: AlisaCache, padding: torch.Tensor | None = None) -> torch.Tensor:
        """As in the base class, in another order."""
        offset = cache.layers[0].get_seq_length()  # a view: it follows the append
        key, value = cache.update(self.heads(hidden), self.heads(hidden), 0)
        position, query = torch.arange(key.shape[2]), torch.arange(hidden.shape[1]) + offset
        mask = position[None, None, None, :] <= query[None, None, :, None]
        return self.attention(self.heads(hidden), key, value, mask)


class TwoAppends(Attend):
    """Two steps in one graph: the second attention's history is longer than its mask says."""

    def forward(self, hidden: torch.Tensor, cache: AlisaCache, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Append twice, attend once."""
        mask = self.mask(cache, hidden, padding)
        cache.update(self.heads(hidden), self.heads(hidden), 0)
        key, value = cache.update(self.heads(hidden), self.heads(hidden), 0)
        return self.attention(self.heads(hidden), key, value, mask)


@pytest.mark.parametrize(
    ("module", "tokens", "reason"),
    (
        (OtherOffset, 1, "its mask is causal with a shift of 1"),
        (StrictMask, 1, "its mask is causal with a shift of -1"),
        (NoOffset, 1, "its mask does not count the history"),
        (OneRow, 3, "its mask repeats one position"),
        (LateMask, 1, "after the graph has written to it"),
        (TwoAppends, 1, "appended to more than once"),
    ),
)
def test_masks_for_other_positions(
    module: type[Attend], tokens: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal masks whose queries do not stand right after the history keep their attention."""
    if module is TwoAppends:
        monkeypatch.delenv("ALISA_CHECK")  # that a layer is appended to twice is a fault of its own
    capture = _attend(sdpa, Setup(module=module, tokens=tokens))
    (row,) = capture.outcome.skipped
    assert len(attention_nodes(capture.after)) == 1
    assert row.layer == 0 and reason in row.reason, row.reason


def test_layers_with_different_padding() -> None:
    """A store has one set of validity bits: a layer with another padding than the first one's stays dense."""

    class Mixed(Attend):
        def forward(self, hidden: torch.Tensor, cache: AlisaCache, padding: torch.Tensor | None = None) -> torch.Tensor:
            masks = self.mask(cache, hidden, padding), self.mask(cache, hidden, None)
            for layer, mask in enumerate(masks):
                key, value = cache.update(self.heads(hidden), self.heads(hidden), layer)
                out = self.attention(self.heads(hidden), key, value, mask)
                hidden = hidden + out.transpose(1, 2).reshape(hidden.shape)
            return hidden

    capture = _attend(sdpa, Setup(module=Mixed, layers=2, tokens=-6, padded=True))
    (row,) = capture.outcome.skipped
    assert capture.outcome.rewritten == 1
    assert (row.layer, row.reason) == (1, "its mask has another padding mask than that of the layers before")


def test_cross_attention_over_other_tokens() -> None:
    """Attention without a cache stays, with a reason and no layer."""

    class Cross(nn.Module):
        def forward(self, query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, other, other)

    step = torch.compile(Cross(), backend=alisa, options={"inner_compiler": "eager"})
    with captures() as (found), torch.no_grad():
        step(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8))
    (capture,) = found
    (row,) = capture.outcome.skipped
    (node,) = attention_nodes(capture.after)
    assert row.node == node.name and row.layer is None and row.reason


def test_statements_in_the_rest_of_the_model_survive() -> None:
    """Removing what the rewrite made useless must not remove `x.add_(1)`, whose result nobody reads by name."""

    class InPlace(Attend):
        def forward(self, hidden: torch.Tensor, cache: AlisaCache, padding: torch.Tensor | None = None) -> torch.Tensor:
            hidden = self.project(hidden)
            hidden.add_(1)
            hidden.relu_()
            hidden[:, :, 0] = 3
            return super().forward(hidden, cache, padding)

    torch.manual_seed(0)
    module, hidden = InPlace(sdpa), torch.randn(BATCH, 6, HEADS * HEAD_DIM)
    step = torch.compile(module, backend=alisa, fullgraph=True, options={"inner_compiler": "eager", "sparsity": 0.0})
    with torch.no_grad(), captures() as (found):
        got = step(hidden, _cache(1, sparsity=0.0))
        expected = copy.deepcopy(module)(hidden, _cache(1, sparsity=0.0))
    assert found[0].outcome.rewritten == 1
    torch.testing.assert_close(got, expected)


# fold_repeated_heads

KV, GROUP, TOKENS = 2, 3, 5
FOLDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat_kv": lambda x: x[:, :, None, :, :].expand(-1, -1, GROUP, -1, -1).reshape(x.shape[0], -1, TOKENS, 8),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, KV, GROUP, TOKENS, 8).reshape(x.shape[0], KV * GROUP, -1, 8),
}
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tiled heads": lambda x: x[:, None].expand(-1, GROUP, -1, -1, -1).reshape(x.shape[0], -1, TOKENS, 8),
    "repeated tokens": lambda x: x[:, :, :, None].expand(-1, -1, -1, GROUP, -1).reshape(-1, KV, TOKENS * GROUP, 8),
    "mixed into tokens": lambda x: x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(-1, KV, GROUP * TOKENS, 8),
    "repeated batch": lambda x: x[None].expand(GROUP, -1, -1, -1, -1).reshape(-1, KV, TOKENS, 8),
    "batch expanded": lambda x: x[:1].expand(GROUP, -1, -1, -1),
    "other tokens": lambda x: x[:, :, None, 1:].expand(-1, -1, GROUP, -1, -1).reshape(-1, KV * GROUP, TOKENS - 1, 8),
    "transposed": lambda x: (
        x[:, :, None].expand(-1, -1, GROUP, -1, -1).transpose(1, 2).reshape(-1, KV * GROUP, TOKENS, 8)
    ),
    "unsqueeze by name": lambda x: x.unsqueeze(dim=1).expand(-1, GROUP, -1, -1, -1).reshape(-1, KV * GROUP, TOKENS, 8),
    "other bytes": lambda x: (
        x[:, :, None].expand(-1, -1, GROUP, -1, -1).reshape(-1, KV * GROUP, TOKENS, 8).view(torch.int32)
    ),
    "permuted batch": lambda x: x[torch.tensor([[1], [0]])].expand(-1, -1, KV, -1, -1),
}


@pytest.mark.parametrize("spelling", FOLDS)
def test_repeated_heads_are_recognised(spelling: str) -> None:
    """The tensor behind the repetition is found."""
    node = returned(dynamo_graph(FOLDS[spelling], torch.randn(2, KV, TOKENS, 8)))
    source = unrepeated(node)
    assert source is not None and source.op == "placeholder"


@pytest.mark.parametrize("spelling", OTHERS)
def test_other_repetitions_are_not(spelling: str) -> None:
    """Reshapes that repeat something else, or in another order, are left alone."""
    assert unrepeated(returned(dynamo_graph(OTHERS[spelling], torch.randn(2, KV, TOKENS, 8)))) is None


def test_permuted_sequences_are_not_taken_for_repeated_heads() -> None:
    """Indexing by a tensor can have the shape of an inserted dimension when there is one KV head."""
    index = torch.tensor([[1], [0]])
    node = returned(
        dynamo_graph(
            lambda x, i: x[i].expand(-1, -1, GROUP, -1, -1).reshape(2, GROUP, TOKENS, 8),
            torch.randn(2, 1, TOKENS, 8),
            index,
        )
    )
    assert unrepeated(node) is None


def test_changed_copies_are_not_folded() -> None:
    """A repeated K that is changed in place before attention is no longer the cache's."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, HEADS, -1, HEAD_DIM) for x in (k, v))
        k.mul_(2)
        return sdpa(q, k, v, m)

    capture = _attend(attention, Setup(kv_heads=2))
    assert capture.outcome.rewritten == 0 and len(attention_nodes(capture.after)) == 1
    (row,) = capture.outcome.skipped
    assert row.reason
