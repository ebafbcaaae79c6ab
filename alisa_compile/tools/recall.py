"""Secret numbers: is a number that was told once, somewhere in a long text, still there when it is asked for?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from ..config import AlisaConfig
from ..errors import AlisaError
from .emulation import Decoder

#: `prompt`: the dense prefill sees the question. `later`: the question arrives token by token, in decode.
FORMS = ("prompt", "later")
_NAMES = "Anna Boris Clara David Edith Frank Grace Henry Irene James Kate Louis Mary Nora Oscar Paul Rose Simon".split()
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which trials are made: `trials` of each length (tokens in all) and depth (0 = told first, 1 = told last)."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """A text `tokens [n]` that ends with the answer. question: its tokens of question; digits `[answer]`: which tokens
    of the answer hold a digit."""

    tokens: torch.Tensor
    question: int
    digits: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Recall:
    """Per trial: whether the whole number came back, and the share of its digits that did."""

    exact: list[bool]
    digits: list[float]


def make_trials(
    tokenizer: Any, filler: torch.Tensor, length: int, depth: float, plan: Plan, prefix: torch.Tensor
) -> list[Trial]:
    """`plan.trials` texts of `length` tokens out of `filler [n]`, after `prefix [p]`; the same ones for every policy.

    The wording is that of novel-7m's training. Greedy decoding writes the number exactly if and only if, given the
    digits before, each next token is the likeliest: so the answer may stand in the text, and nothing is generated.
    """
    rng = np.random.default_rng((plan.seed, length, round(depth * 1000)))
    trials = []
    for _ in range(plan.trials):
        name = _NAMES[int(rng.integers(len(_NAMES)))]
        number = "-".join(str(digit) for digit in rng.integers(0, 10, size=_DIGITS))
        told = _encode(tokenizer, f" The secret number of {name} is {number}.\n")
        asked = _encode(tokenizer, f" What is the secret number of {name}? It is {number}")
        question = _common_prefix(asked, _encode(tokenizer, f" What is the secret number of {name}? It is"))
        room = length - len(told) - len(asked)
        if room < 0 or room > len(filler):
            raise AlisaError(
                "this length does not fit the recall test",
                got=f"{length} tokens, {len(told) + len(asked)} of them for a number and its question, and a text of "
                f"{len(filler)} tokens to fill the rest",
                fix="change --recall-lengths, or give a longer --text",
            )
        start = int(rng.integers(0, len(filler) - room + 1))
        cut = start + round(depth * room)
        parts = prefix, filler[start:cut], torch.tensor(told), filler[cut : start + room], torch.tensor(asked)
        digits = [any(letter.isdigit() for letter in tokenizer.decode([token])) for token in asked[question:]]
        trials.append(Trial(torch.cat(parts), question, torch.tensor(digits)))
    return trials


def ask(decoder: Decoder, trials: list[Trial], form: str, config: AlisaConfig) -> Recall:
    """Recall of a batch of trials of one length.

    A batch has one prompt length. Where names or numbers differ in tokens, the prompt ends where the longest needs
    it to, so that a text with a shorter one reads its last few prompt tokens in decode.
    """
    in_decode = max(len(trial.digits) + (trial.question if form == "later" else 0) for trial in trials)
    tokens = torch.stack([trial.tokens for trial in trials])
    hit = decoder.predict(tokens, tokens.shape[1] - in_decode, config).hit
    answers = [(row[-len(trial.digits) :], trial.digits) for row, trial in zip(hit, trials, strict=True)]
    return Recall(
        [bool(answer.all()) for answer, _ in answers],
        [float(answer[digits].float().mean()) for answer, digits in answers],
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
