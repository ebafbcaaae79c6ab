"""Log-likelihoods of continuations, token by token as in decoding, for test suites that compare answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..config import AlisaConfig
from ..errors import AlisaError
from .emulation import Decoder

#: A context and its continuation, as token ids.
Pair = tuple[list[int], list[int]]


def score(
    decoder: Decoder,
    pairs: Sequence[Pair],
    config: AlisaConfig,
    *,
    dense_tokens: int,
    length: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """For each pair: nats of log-likelihood of the continuation, and whether each of its tokens was the likeliest.

    Of a context the first `dense_tokens` are read in one dense block, everything after them in decode steps, so that
    the policy has a say in all of it. length: the most tokens that the model reads; a longer context loses its
    beginning. A batch holds pairs of equal dense beginnings, padded on the right, where nothing looks back from.
    advance: told how many pairs are done.
    """
    texts = [_cut(context, continuation, length) for context, continuation in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    groups: dict[int, list[int]] = {}
    for place, (tokens, answer) in enumerate(texts):
        groups.setdefault(min(dense_tokens, len(tokens) - answer), []).append(place)
    for prompt, places in sorted(groups.items()):
        places.sort(key=lambda place: (-len(texts[place][0]), place))
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            padded = torch.zeros((len(batch), len(texts[batch[0]][0])), dtype=torch.int64)
            for row, place in zip(padded, batch, strict=True):
                row[: len(texts[place][0])] = torch.tensor(texts[place][0])
            predictions = decoder.predict(padded, prompt, config)
            for row, place in enumerate(batch):
                tokens, answer = texts[place]
                scored = slice(len(tokens) - answer - prompt, len(tokens) - prompt)
                loss = predictions.loss[row, scored].double().sum()
                found[place] = -float(loss), bool(predictions.hit[row, scored].all())
            advance(len(batch))
    return found


def _cut(context: list[int], continuation: list[int], length: int) -> tuple[list[int], int]:
    """All tokens that are read or predicted, and how many of them are the continuation's."""
    if not context or not continuation or len(continuation) > length:
        raise AlisaError(
            "a continuation cannot be scored",
            got=f"{len(context)} tokens of context, {len(continuation)} of continuation",
            expected=f"at least one of each, and a continuation of at most {length} tokens",
        )
    return (context + continuation)[-(length + 1) :], len(continuation)
