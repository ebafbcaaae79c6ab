"""`alisa bisect`: which rewrite makes a model's output wrong.

Decodes a text once without alisa, then again and again with fewer rewrites, each time on the same tokens, until one
rewrite is left between a right and a wrong run.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .. import compat
from ..backend import alisa
from ..config import AlisaConfig
from ..errors import AlisaError
from ..passes import fuel, pipeline
from ..passes.record import GraphRecord, PassRecord, Rewrite, recording
from .graph_diff import diff
from .loading import Loaded, load
from .options import given_options
from .progress import Progress

# Nats. Rounding of float32 stays below 1e-9; half precision is given what its fewer digits explain.
_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-2}


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 if something is wrong."""
    options = {"sparsity": 0.0, **given_options(arguments)}
    if AlisaConfig.from_options(options).is_sparse and arguments.tolerance is None:
        raise AlisaError(
            "sparse attention differs from dense on purpose",
            got=f"sparsity {options['sparsity']}",
            fix="leave out --sparsity to compare exactly, or say with --tolerance which KL divergence is right",
        )
    text = arguments.prompt if arguments.text is None else _read(arguments.text)
    with Progress(quiet=True):
        # Dense attention in a compiled graph and out of fuel is what this is about, so nobody needs a warning.
        logger, level = logging.getLogger("alisa_compile"), logging.getLogger("alisa_compile").level
        logger.setLevel(logging.ERROR)
        try:
            loaded = load(arguments.model, arguments.dtype, arguments.device)
            tokens = _tokens(loaded, text, arguments.prompt_tokens, arguments.max_new_tokens)
            print(f"{tokens.shape[1]} tokens of prompt, {arguments.max_new_tokens} decoded, {loaded.model.dtype}")
            found = bisect(
                loaded.model, tokens, arguments.max_new_tokens, options, arguments.tolerance, loaded.padding(), print
            )
        finally:
            logger.setLevel(level)
    print(f"\n{found}")
    return 1 if found.is_wrong else 0


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is to blame. is_wrong: whether anything is. The others are None, or empty, where they are not known.

    before, after: KL divergence from dense, in nats, the largest of all tokens, without and with the rewrite.
    """

    is_wrong: bool
    text: str
    graph: GraphRecord | None = None
    pass_name: str = ""
    rewrite: Rewrite | None = None
    before: float = 0.0
    after: float = 0.0

    def __str__(self) -> str:
        return self.text


def bisect(
    model: Any,
    tokens: torch.Tensor,
    new_tokens: int,
    options: dict[str, Any],
    tolerance: float | None = None,
    padding: dict[str, int] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finding:
    """Compare with the model's own generation on `tokens [1, n]` and the `new_tokens` that it continues them with.

    tolerance: the KL divergence up to which a run is right. say: is told about each run. No rows are deleted, whatever
    the options say of recompute: without rewrites nothing could make them again.
    """
    options = {**options, "recompute": "off"}
    trials = _Trials(model, tokens, new_tokens, options, tolerance, padding or {}, say)
    # Without Inductor a run takes seconds, and most faults of rewrites show there too.
    inner = AlisaConfig.from_options(options).inner_compiler
    for compiler in dict.fromkeys(("eager", inner)):
        everything = trials.run(compiler)
        if not everything.is_right:
            return _narrow(trials, compiler, everything)
    return Finding(
        False, f"nothing is wrong: with all rewrites the output is that of dense attention (KL {everything.kl:.1e})"
    )


@dataclasses.dataclass(frozen=True)
class _Outcome:
    kl: float
    is_right: bool
    rewrites: int
    graphs: tuple[GraphRecord, ...]


class _Trials:
    """Runs of one model on one text, compared with its dense logits."""

    def __init__(
        self,
        model: Any,
        tokens: torch.Tensor,
        new_tokens: int,
        options: dict[str, Any],
        tolerance: float | None,
        padding: dict[str, int],
        say: Callable[[str], None],
    ) -> None:
        self._model, self._tokens, self._options, self._say = model, tokens, options, say
        self._tolerance = _TOLERANCE.get(model.dtype, 1e-6) if tolerance is None else tolerance
        # The model decides what comes next once; every run is then led along the same tokens.
        self._settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, **padding}
        self._next, self._logits = self._generate(model, None)

    def run(self, compiler: str, rewrites: int | None = None, off: str = "") -> _Outcome:
        """One run with at most so many rewrites, or without one pass."""
        options = {**self._options, "inner_compiler": compiler}
        with fuel.limited(rewrites), compat.disabled_pass(off), recording() as graphs:
            compiled = torch.compile(self._model, backend=alisa, options=options)
            _, logits = self._generate(compiled, self._next)
            used = fuel.used()
        dense, ours = self._logits.double().log_softmax(-1), logits.double().log_softmax(-1)
        kl = float((dense.exp() * (dense - ours)).sum(-1).max())
        agree = float((dense.argmax(-1) == ours.argmax(-1)).double().mean())
        is_right = kl <= self._tolerance  # not for NaN
        what = f"without {off}" if off else f"{used} rewrites"
        verdict = "right" if is_right else "wrong"
        self._say(f"{compiler:9} {what:34} KL {kl:8.1e}  top-1 {agree:5.0%}  {verdict}")
        return _Outcome(kl, is_right, used, tuple(graphs))

    @torch.no_grad()
    def _generate(self, model: Any, forced: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens [N], and the logits [N, V] they were chosen from, before `forced` replaced the choice."""
        processors = LogitsProcessorList([] if forced is None else [_Forced(forced, self._tokens.shape[1])])
        out = model.generate(
            self._tokens,
            attention_mask=torch.ones_like(self._tokens),
            logits_processor=processors,
            output_logits=True,
            return_dict_in_generate=True,
            **self._settings,
        )
        return out.sequences[0, self._tokens.shape[1] :], torch.cat(out.logits).float()


class _Forced(LogitsProcessor):
    """Leads a generation along given tokens."""

    def __init__(self, tokens: torch.Tensor, prompt: int) -> None:
        self._tokens, self._prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, self._tokens[input_ids.shape[1] - self._prompt]] = 0.0
        return chosen


def _narrow(trials: _Trials, compiler: str, everything: _Outcome) -> Finding:
    """From a wrong run to the one rewrite behind it."""
    nothing = trials.run(compiler, 0)
    if not nothing.is_right:
        return _blame_a_pass(trials, compiler, nothing)
    right, wrong = nothing, everything
    low, high = 0, everything.rewrites
    while high - low > 1:
        middle = (low + high) // 2
        outcome = trials.run(compiler, middle)
        if outcome.is_right:
            low, right = middle, outcome
        else:
            high, wrong = middle, outcome
    found = _rewrite(wrong.graphs, high)
    if found is None:
        raise AlisaError(
            "the rewrites differ from run to run, so none can be found",
            got=f"no rewrite {high} among {wrong.rewrites}",
            fix="set torch.use_deterministic_algorithms(True), or report this with the model's class",
        )
    graph, each, rewrite = found
    where = "" if rewrite.layer is None else f", layer {rewrite.layer}"
    lines = [
        f"wrong: pass {each.name}, rule '{rewrite.rule}'{where}, in the {graph.stage} graph",
        f"  rewrite {high} of {everything.rewrites}; its code: {rewrite.source.file}:{rewrite.source.line}",
        f"  KL from dense without it {right.kl:.1e}, with it {wrong.kl:.1e}",
        f"  to work without this pass: TORCHINDUCTOR_DISABLED_PASSES={each.name}",
        "",
        diff(graph, pass_name=each.name, layer=rewrite.layer).text(whole_graph=False).rstrip(),
    ]
    return Finding(True, "\n".join(lines), graph, each.name, rewrite, right.kl, wrong.kl)


def _rewrite(graphs: tuple[GraphRecord, ...], number: int) -> tuple[GraphRecord, PassRecord, Rewrite] | None:
    every = ((graph, each, rewrite) for graph in graphs for each in graph.passes for rewrite in each.rewrites)
    return next((found for found in every if found[2].number == number), None)


def _blame_a_pass(trials: _Trials, compiler: str, nothing: _Outcome) -> Finding:
    """Wrong without any rewrite: a pass changes the graph outside of its rewrites, or it is none of them."""
    for name in (graph_pass.name for graph_pass in pipeline.PIPELINE):
        outcome = trials.run(compiler, 0, off=name)
        if outcome.is_right:
            text = f"wrong: pass {name}, which changes the graph outside of its rewrites, so its layer is not known"
            return Finding(True, text, pass_name=name, before=outcome.kl, after=nothing.kl)
    what = "the KV store" if compiler == "eager" else f"{compiler}, or the KV store"
    text = f"wrong, and no rewrite is to blame: without any it is wrong as well (KL {nothing.kl:.1e}), so it is {what}"
    return Finding(True, text, before=nothing.kl, after=nothing.kl)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AlisaError(f"cannot read the text: {error}", got=path) from error


def _tokens(loaded: Loaded, text: str, prompt_tokens: int, new_tokens: int) -> torch.Tensor:
    """The beginning of the text [1, n]."""
    # Only the beginning is needed; a token is seldom longer than 16 characters.
    tokens = loaded.encode(text[: 16 * prompt_tokens], 0)[:, :prompt_tokens]
    room = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and tokens.shape[1] + new_tokens > room:
        raise AlisaError(
            "the prompt and the new tokens do not fit the model",
            got=f"{tokens.shape[1]} + {new_tokens} tokens",
            expected=f"at most {room} (max_position_embeddings)",
            fix="lower --prompt-tokens or --max-new-tokens",
        )
    return tokens
