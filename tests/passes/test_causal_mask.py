"""The prover accepts the masks of real models, refuses every other kind, and never accepts a wrong one."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from transformers import masking_utils

from alisa_compile import AlisaCache
from alisa_compile.passes.base import Refusal, example, target_name
from alisa_compile.passes.causal_mask import CausalMask, prove_causal
from tests.passes.graphs import (
    Capture,
    captures,
    dynamo_graph,
    evaluated,
    hint,
    mask_of,
    returned,
    tensor_inputs,
)
from tests.support import compiled, left_padded, tiny_model

causal = masking_utils.causal_mask_function


# What transformers builds


def _conversation(family: str, padded: bool) -> list[Capture]:
    """The prefill, decode and extend graphs of two turns."""
    stock = tiny_model(family)
    model = compiled(stock, inner="eager", sparsity=0.0)
    cache = AlisaCache(stock.config, sparsity=0.0)
    ids, mask = left_padded(2, 9)
    mask = mask if padded else torch.ones_like(mask)
    with captures() as found:
        for _ in range(2):
            options = {"attention_mask": mask, "past_key_values": cache, "do_sample": False}
            out = model.generate(ids, max_new_tokens=3, **options)
            ids = torch.cat([out, torch.randint(2, 128, (2, 4))], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
    return found


@pytest.mark.parametrize(
    ("family", "padded"), (("llama", False), ("llama", True), ("opt", True), ("neox", True), ("opt", False))
)
def test_masks_of_real_models_are_accepted(family: str, padded: bool) -> None:
    """Prefill, decode and extend graphs: accepted, and the captured mask is numerically what the proof says."""
    found = _conversation(family, padded)
    assert [capture.stage for capture in found] == ["prefill", "decode", "extend"]
    for capture in found:
        assert not capture.outcome.skipped
        (mask,) = capture.masks
        proved = prove_causal(mask)
        assert proved.constant == 0 and proved.padding is not None
        assert target_name(proved.offset[0]) == "getitem"
        _check_numerically(mask, proved)


def _check_numerically(mask: fx.Node, proved: CausalMask, repeats: int = 5) -> None:
    """The mask's subgraph on random inputs against causal-plus-padding in plain loops."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        inputs = {}
        for node in tensor_inputs(mask):
            shape = [hint(size) for size in example(node).shape]
            most = 2 if len(shape) == 2 else 7
            inputs[node] = torch.randint(0, most, shape, generator=generator).to(example(node).dtype)
        offset = proved.constant + sum(int(inputs[n.args[0]][n.args[1]]) for n in proved.offset)
        padding = None if proved.padding is None else inputs[proved.padding]
        got = evaluated(mask, inputs)
        if got.is_floating_point():
            assert ((got == 0) | (got <= torch.finfo(got.dtype).min)).all()
            got = got == 0
        assert torch.equal(got, _naive(got.shape, offset, padding))


def _naive(shape: torch.Size, offset: int, padding: torch.Tensor | None) -> torch.Tensor:
    """Causal plus padding, element by element."""
    expected = torch.zeros(shape, dtype=torch.bool)
    batch, heads, queries, keys = shape
    for b in range(batch):
        for q in range(queries):
            for k in range(keys):
                real = padding is None or (k < padding.shape[1] and bool(padding[b, k] != 0))
                expected[b, :heads, q, k] = k <= offset + q and real
    return expected


# What it must refuse, built with transformers' own functions where they exist


def _sdpa_mask(function: Callable[..., Any], *, padded: bool = False, vmap: bool = False) -> Callable[..., Any]:
    def build(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return masking_utils.sdpa_mask(
            ids.shape[0],
            ids.shape[1],
            padding.shape[1],
            q_offset=length[0],
            mask_function=function,
            attention_mask=padding if padded else None,
            use_vmap=vmap,
        )

    return build


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """length [3], ids [2, 5], padding mask [2, 11]."""
    return torch.tensor([6, 6, 6]), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 11, dtype=torch.bool)


def _indices(ids: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = torch.arange(ids.shape[0])[:, None, None, None]
    query = torch.arange(ids.shape[1])[None, None, :, None]
    return batch, query, torch.arange(padding.shape[1])[None, None, None, :]


def _packed(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    function = masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(ids))
    shape = ids.shape[0], ids.shape[1], ids.shape[1]
    return masking_utils.sdpa_mask(*shape, mask_function=function, allow_is_causal_skip=False)


def _additive(write: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`write` turns a condition into numbers; with literals, since Dynamo makes inputs of other floats."""

    def build(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return write(_sdpa_mask(causal, padded=True)(length, ids, padding))

    return build


def _eager_mask(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return masking_utils.eager_mask(
        ids.shape[0], ids.shape[1], padding.shape[1], q_offset=length[0], attention_mask=padding, dtype=torch.bfloat16
    )


def _chosen_by_padding(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    mask = _sdpa_mask(causal, padded=True)(length, ids, padding)
    return torch.where(mask, padding[:, None, None, :].to(torch.float32), -torch.inf)


def _cast_to_float(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    return _sdpa_mask(causal)(length, ids, padding).to(torch.float32)


def _shifted_keys(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    return (key + 1) <= (query + length[0])


def _swapped_axes(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    query = torch.arange(ids.shape[1])[None, None, None, :]
    key = torch.arange(ids.shape[1])[None, None, :, None]
    return key <= query


def _anti_causal(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    return query <= key


def _padding_at_queries(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, query, key = _indices(ids, padding)
    return (key <= query) & padding[batch, query]


def _padding_of_first_row(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    first = torch.arange(1)[:, None, None, None]
    return ((key <= query) & padding[first, key]).expand(ids.shape[0], 1, ids.shape[1], padding.shape[1])


def _padding_only(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, _, key = _indices(ids, padding)
    return padding[batch, key].expand(ids.shape[0], 1, ids.shape[1], padding.shape[1])


def _padding_in_front(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, query, key = _indices(ids, padding)
    return (key <= query) & torch.nn.functional.pad(padding, (2, 0))[batch, key]


def _padded_with_true(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, query, key = _indices(ids, padding)
    return (key <= query) & torch.nn.functional.pad(padding, (0, 2), value=True)[batch, key]


def _one_query_for_all(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, _, key = _indices(ids, padding)
    mask = key <= torch.arange(1)[None, None, :, None] + length[0]
    return mask.expand(ids.shape[0], 1, ids.shape[1], padding.shape[1])


def _half_precision_positions(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    key = torch.arange(padding.shape[1], dtype=torch.bfloat16)
    return key[None, None, None, :] <= torch.arange(ids.shape[1])[None, None, :, None]


def _narrow_positions(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    return key.to(torch.int8) <= query


def _doubled_offset(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    return key <= torch.add(query, length[0], alpha=2)


def _every_other(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    query = torch.arange(0, 2 * ids.shape[1], 2)[None, None, :, None]
    return torch.arange(padding.shape[1])[None, None, None, :] <= query


def _half_of_the_keys(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, _ = _indices(ids, padding)
    return torch.arange(padding.shape[1])[2:][None, None, None, :] <= query


def _bits(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, query, key = _indices(ids, padding)
    return ((key <= query) & ids.new_ones(2, 11)[batch, key]).bool()


def _bits_of_the_input(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch = torch.arange(ids.shape[0])[:, None, None, None]
    position = torch.arange(ids.shape[1])
    return ((position[None, None, None, :] <= position[None, None, :, None]) & ids[batch, position]).bool()


def _changed_afterwards(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    mask = key <= query + length[0]
    mask[..., :2] = False
    return mask


def _changed_through_a_view(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    mask = key <= query + length[0]
    mask[0].logical_not_()
    return mask


def _changed_length(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    _, query, key = _indices(ids, padding)
    offset = length[0]
    length.add_(1)
    return key <= query + offset


def _changed_padding(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch, query, key = _indices(ids, padding)
    mask = (key <= query + length[0]) & padding[batch, key]
    padding[:, 0] = False
    return mask


def _two_paddings(length: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    batch = torch.arange(ids.shape[0])[:, None, None, None]
    query, key = torch.arange(ids.shape[1])[None, None, :, None], torch.arange(ids.shape[1])
    return (key <= query) & padding[batch, key] & ids[batch, key].bool()


UNKNOWN = "which is not part of a causal or padding mask"
REFUSED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "sliding window": (_sdpa_mask(masking_utils.sliding_window_causal_mask_function(4)), "'sub', " + UNKNOWN),
    "chunked": (
        lambda n, i, p: _sdpa_mask(masking_utils.chunked_causal_mask_function(4, i[:, 0]))(n, i, p),
        UNKNOWN,
    ),
    "bidirectional": (
        _sdpa_mask(masking_utils.bidirectional_mask_function),
        "compares something else than key positions with query positions",
    ),
    "prefix-LM": (
        _sdpa_mask(masking_utils.or_masks(causal, lambda b, h, q, k: k < 3)),
        UNKNOWN,
    ),
    "prefix-LM by vmap": (
        _sdpa_mask(masking_utils.or_masks(causal, lambda b, h, q, k: k < 3), vmap=True),
        UNKNOWN,
    ),
    "packed sequences": (_packed, "'eq', " + UNKNOWN),
    "additive, too little": (_additive(lambda m: torch.where(m, 0.0, -1e4)), "only adds -10000.0 to what it hides"),
    "additive, inverted": (_additive(lambda m: torch.where(m, -torch.inf, 0.0)), "not 0 where it lets attend"),
    "additive, converted": (
        _additive(lambda m: torch.where(m, 0.0, -3.4028234663852886e38).to(torch.bfloat16)),
        "converted to torch.bfloat16",
    ),
    "additive, a tensor of 1 where it attends": (
        _additive(lambda m: torch.where(m, torch.tensor(1.0), -torch.inf)),
        "uses the constant 1.0",
    ),
    "additive, 1 where it attends": (_additive(lambda m: torch.where(m, 1.0, -torch.inf)), "not 0 where"),
    "additive, plus the padding": (_chosen_by_padding, "made of numbers"),
    "cast to float": (_cast_to_float, "made of numbers (torch.float32)"),
    "key positions shifted": (_shifted_keys, "shifts the key positions"),
    "swapped axes": (_swapped_axes, "something else than key positions with query positions"),
    "anti-causal": (_anti_causal, "something else than key positions with query positions"),
    "padding at query positions": (_padding_at_queries, "at other positions than the keys'"),
    "padding of the first sequence": (_padding_of_first_row, "repeats one position along a dimension"),
    "padding only": (_padding_only, "not causal plus padding (found padding)"),
    "padding moved": (_padding_in_front, "something else than the end of the padding mask"),
    "padded with True": (_padded_with_true, "something else than the end of the padding mask"),
    "two padding masks": (_two_paddings, "found causal and padding and padding"),
    "one query for all": (_one_query_for_all, "repeats one position along a dimension"),
    "bfloat16 positions": (_half_precision_positions, "counts positions in torch.bfloat16"),
    "int8 positions": (_narrow_positions, "converts positions to torch.int8"),
    "offset times two": (_doubled_offset, "arguments that are not understood"),
    "every other position": (_every_other, "arguments that are not understood"),
    "part of the keys": (_half_of_the_keys, "takes part of the positions"),
    "bits of a new tensor": (_bits, "uses 'new_ones'|starts from ones of torch.int64"),
    "bits of numbers": (_bits_of_the_input, "combines the bits of numbers"),
    "changed in place": (_changed_afterwards, "the graph writes to"),
    "changed through a view": (_changed_through_a_view, "the graph writes to"),
    "length changed first": (_changed_length, "after the graph has written to it"),
    "padding changed later": (_changed_padding, "the graph writes to 'l_padding_'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_masks_are_refused(kind: str) -> None:
    """Each kind of mask that is not causal plus padding is refused, and the reason names what is in the way."""
    build, reason = REFUSED[kind]
    mask = mask_of(build, *_inputs())
    with pytest.raises(Refusal) as refusal:
        prove_causal(mask)
    assert any(part in str(refusal.value) for part in reason.split("|"))


ACCEPTED: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "plain": (_sdpa_mask(causal), 0),
    "padded": (_sdpa_mask(causal, padded=True), 0),
    "strictly causal": (_sdpa_mask(lambda b, h, q, k: k < q), -1),
    "length + 1": (_sdpa_mask(lambda b, h, q, k: k <= q + 1), 1),
    "written as ge": (_sdpa_mask(lambda b, h, q, k: q >= k), 0),
    "written as gt": (_sdpa_mask(lambda b, h, q, k: q + 1 > k), 0),
    "additive, padded": (_additive(lambda m: torch.where(m, 0.0, -torch.inf)), 0),
    "additive with a tensor of zeros, padded": (
        _additive(lambda m: torch.where(m, torch.zeros(()), -3.4028234663852886e38)),
        0,
    ),
    "additive with a number in a tensor (transformers 5.17), padded": (
        _additive(lambda m: torch.where(m, torch.tensor(0.0), -3.4028234663852886e38)),
        0,
    ),
    "transformers' eager mask, padded": (_eager_mask, 0),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_shifts_are_part_of_the_proof(kind: str) -> None:
    """A causal mask that is shifted is accepted with its shift, which the rewrite then refuses; the rest is exact."""
    build, shift = ACCEPTED[kind]
    mask = mask_of(build, *_inputs())
    proved = prove_causal(mask)
    assert proved.constant == shift
    assert (proved.padding is not None) == ("padded" in kind)
    _check_numerically(mask, proved)


def test_prepared_masks_are_refused() -> None:
    """4-D masks that come into the graph from outside, and a 2-D one that was never looked up."""
    four = dynamo_graph(lambda m: m & m, torch.ones(2, 1, 5, 11, dtype=torch.bool))
    with pytest.raises(Refusal, match="prepared outside the graph"):
        prove_causal(returned(four))
    two = dynamo_graph(lambda m: m.contiguous(), torch.ones(5, 11, dtype=torch.bool))
    with pytest.raises(Refusal, match="is not boolean"):
        prove_causal(returned(two))


def test_keyword_spellings_do_not_crash() -> None:
    """Arguments given by name end in a refusal, never in an exception of another kind."""
    spellings: list[Callable[..., torch.Tensor]] = [
        lambda n, i, p: torch.le(input=torch.arange(5)[None], other=torch.arange(5)[:, None])[None, None],
        lambda n, i, p: torch.add(torch.arange(5), other=3) <= torch.arange(5)[:, None],
        lambda n, i, p: torch.nn.functional.pad(input=p, pad=(0, 3)),
        lambda n, i, p: torch.clone(input=p),
        lambda n, i, p: torch.arange(end=5) <= torch.arange(start=0, end=5)[:, None],
        lambda n, i, p: torch.le(torch.arange(5), torch.arange(5)[:, None], out=torch.empty(5, 5, dtype=torch.bool)),
    ]
    for spelling in spellings:
        with pytest.raises(Refusal):
            prove_causal(mask_of(spelling, *_inputs()))


# Soundness: random graphs of the supported kinds of node, executed while they are built


class Program:
    """A graph under construction whose nodes are executed at once, so that in-place writes happen in graph order."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.start: dict[fx.Node, torch.Tensor] = {}

    def placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        """An input; its value before any write is remembered."""
        node = self.graph.placeholder(name)
        self.start[node] = value.clone()
        return self._record(node, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A function, or a method by its name."""
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda node: self.values[node])
        if isinstance(target, str):
            value = getattr(real_args[0], target)(*real_args[1:], **real_kwargs)
            return self._record(self.graph.call_method(target, args, kwargs), value)
        value = target(*real_args, **real_kwargs)
        return self._record(self.graph.call_function(target, args, kwargs), value)

    def _record(self, node: fx.Node, value: Any) -> fx.Node:
        self.values[node] = node.meta["example_value"] = value
        return node


def _random_mask(chance: random.Random) -> tuple[Program, fx.Node]:
    """Mostly what transformers builds, with a few random departures, most of them wrong."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    rarely = chance.choice((0.0, 0.0, 0.03, 0.1))

    def odd(probability: float = 1.0) -> bool:
        return chance.random() < min(1.0, rarely * probability)

    batch, queries, keys = (chance.choice((1, 2, 3)) for _ in range(3))
    keys += chance.choice((0, 2))
    program = Program()
    length = program.placeholder("length", torch.randint(0, 4, (2,), generator=generator))
    width = chance.choice((keys, keys, max(1, keys - 1), keys + 1))
    real = torch.randint(0, 2, (chance.choice((batch, batch, 1)), width), generator=generator)
    dtype = chance.choice((torch.bool, torch.int64))
    scale = 1 if dtype == torch.bool or chance.random() < 0.5 else chance.choice((2, 256, -1))
    padding = program.placeholder("padding", (real * scale).to(dtype))

    def disturb() -> None:
        """Sometimes write in place to something made so far, or to a view of it."""
        if not odd():
            return
        victim = chance.choice([n for n in program.values if isinstance(program.values[n], torch.Tensor)])
        if chance.random() < 0.5:
            victim = program.call(operator.getitem, victim, (..., slice(0, 1)))
        write = chance.choice(("zero_", "setitem", "add", "not", "out"))
        if write == "zero_":
            program.call("zero_", victim)
        elif write == "setitem":
            program.call(operator.setitem, victim, ..., 1)
        elif write == "add":
            program.call(operator.iadd, victim, 1)
        elif write == "not":
            program.call("logical_not_", victim)
        else:
            program.call(torch.neg, victim, out=victim)

    def index(size: int, axis: int, offsets: bool) -> fx.Node:
        size = chance.choice((1, batch, queries, keys)) if odd() else size
        kinds = (torch.int32, torch.int8, torch.float32, torch.bfloat16)
        extra = {"dtype": chance.choice(kinds)} if odd(2) else {}
        node = program.call(torch.arange, size, **extra)
        shaped = False
        for step in chance.sample(("shape", "offset", "constant", "cast", "copy", "disturb"), 6):
            if step == "shape":
                place = chance.choice((-1, -2, -3, -4)) if odd() else axis
                spread = [None] * 4
                spread[place] = slice(None)  # type: ignore[call-overload]
                node, shaped = program.call(operator.getitem, node, tuple(spread)), True
            elif step == "offset" and ((offsets and chance.random() < 0.7) or odd()):
                read = program.call(operator.getitem, length, chance.choice((0, 1, -1)))
                disturb()
                options = {"alpha": 2} if odd() else {}
                node = program.call(
                    chance.choice((torch.add, "add")) if options else operator.add, node, read, **options
                )
            elif step == "constant" and chance.random() < 0.3:
                amount = chance.choice((1, -1, 2)) if odd() or (offsets and chance.random() < 0.3) else 0
                node = program.call(operator.add, *chance.sample((node, amount), 2))
            elif step == "cast" and chance.random() < 0.3:
                wrong = (torch.bool, torch.int8, torch.float16)
                node = program.call("to", node, chance.choice(wrong) if odd() else torch.int64)
            elif step == "copy" and chance.random() < 0.3:
                node = program.call(chance.choice(("contiguous", "clone")), node)
                if shaped and chance.random() < 0.3:
                    sizes = [
                        s if s > 1 else chance.choice((1, t))
                        for s, t in zip(program.values[node].shape, (batch, 1, queries, keys), strict=True)
                    ]
                    node = program.call("expand", node, *sizes)
            elif step == "disturb":
                disturb()
        return node

    at_query, at_key, at_batch = index(queries, -2, True), index(keys, -1, False), index(batch, -4, False)
    conditions = []
    for _ in range(2 if odd() else 1):
        swapped = odd()
        left, right = (at_query, at_key) if swapped else (at_key, at_query)
        name = chance.choice(("le", "le", "lt")) if not odd() else chance.choice(("le", "lt", "ge", "gt", "eq", "ne"))
        if name in ("le", "lt") and chance.random() < 0.3:
            left, right, name = right, left, {"le": "ge", "lt": "gt"}[name]
        conditions.append(program.call(chance.choice((getattr(operator, name), name)), left, right))
        disturb()
    if chance.random() < 0.6:
        mask = padding
        if chance.random() < 0.9:
            mask = program.call("to", mask, chance.choice((torch.int8, torch.uint8)) if odd(3) else torch.bool)
        disturb()
        missing = keys - program.values[mask].shape[1]
        if missing > 0 or odd():
            widths = (missing, 0) if odd() else (0, missing)
            mask = program.call(torch.nn.functional.pad, mask, widths, "constant", True if odd() else None)
        if odd():
            mask = program.call("expand", mask, batch, -1)
        if chance.random() < 0.3:
            looked_up = program.call(operator.getitem, mask, (slice(None), None, None, slice(None)))
        else:
            places = (at_batch, at_query if odd() else at_key)
            looked_up = program.call(operator.getitem, mask, places[::-1] if odd() else places)
        if chance.random() < 0.5:
            looked_up = program.call("bool", looked_up)
        conditions.append(looked_up)
    if chance.random() < 0.5:
        shape = (chance.choice((1, queries)), chance.choice((1, keys))) if odd() else ()
        conditions.insert(0, program.call("new_ones", at_query, shape, dtype=torch.bool))
    mask = conditions[0]
    for condition in conditions[1:]:
        both = (
            chance.choice((operator.or_, operator.xor)) if odd() else chance.choice((operator.and_, torch.logical_and))
        )
        mask = program.call(both, mask, condition)
        disturb()
    if chance.random() < 0.8:
        mask = program.call("expand", mask, batch, -1, queries, keys)
    if odd():
        mask = program.call("bool", mask)
    disturb()
    return program, mask


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_accepted_is_causal_plus_padding(seed: int) -> None:
    """3,000 random masks a seed: the proof of each accepted one equals its value, element by element.

    Values are computed as the graph is built, in place where it is in place; the proof speaks of the inputs as they
    were at the start, because that is what the rewritten graph would use.
    """
    chance = random.Random(seed)
    accepted = refused = shifted = padded = 0
    while accepted + refused < 3000:
        try:
            program, mask = _random_mask(chance)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue  # shapes that do not go together
        try:
            proved = prove_causal(mask)
        except Refusal:
            refused += 1
            continue
        offset = proved.constant
        for node in proved.offset:
            offset += int(program.start[node.args[0]][node.args[1]])
        padding = None if proved.padding is None else program.start[proved.padding]
        got = program.values[mask]
        assert got.dtype == torch.bool
        assert torch.equal(got, _naive(got.shape, offset, padding)), f"wrong: {proved} of\n{program.graph}"
        accepted += 1
        shifted += bool(proved.constant)
        padded += padding is not None
    assert min(accepted, refused) > 600 and min(shifted, padded) > 100, (accepted, refused, shifted, padded)
