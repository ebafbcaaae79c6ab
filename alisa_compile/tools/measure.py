"""Measure one model on one text, cell by cell: perplexity, and recall in two forms."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import __version__
from ..config import AlisaConfig
from ..errors import AlisaError
from ..runtime.policies import head_groups, selection_spec
from .accuracy import Row
from .emulation import Decoder
from .loading import Loaded
from .progress import Progress
from .recall import FORMS, Plan, Trial, ask, make_trials
from .results import Results

#: Entries of a config that differ between two copies of the same model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype")


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table: a configuration and how to call it."""

    label: str
    config: AlisaConfig
    asks_recall: bool

    @property
    def policy(self) -> str:
        """As it is measured: sparsity 0 is dense whatever the policy."""
        return self.config.policy if self.config.is_sparse else "dense"

    @property
    def sparsity(self) -> float:
        """As it is measured."""
        return self.config.sparsity if self.config.is_sparse else 0.0

    @property
    def selection(self) -> dict[str, Any]:
        """Everything about a configuration that decides its numbers, defaults written out."""
        spec = selection_spec(self.config)
        return {
            "policy": self.policy,
            "sparsity": self.sparsity,
            "selection": "" if spec is None else spec.encode(),
            "head_mode": "per_kv_head" if spec and head_groups(self.config, 2) == 2 else "shared",
            "kv_dtype": self.config.kv_dtype,
        }


class Bench:
    """One model and one text; measures lines cell by cell: perplexity, and recall in two forms."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, loaded: Loaded, text: str, results: Results) -> None:
        self._arguments, self._plan, self._loaded, self._results = arguments, plan, loaded, results
        ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self._tokens = torch.tensor(ids, dtype=torch.int64)
        # What the tokenizer puts before a text (a beginning-of-text token): each window starts as a text does.
        self._prefix = torch.tensor(loaded.tokenizer("", verbose=False)["input_ids"], dtype=torch.int64)
        self._check_lengths()
        self._windows = _windows(self._tokens, self._prefix, arguments.samples, arguments.sample_tokens)
        self._decoder = Decoder(loaded.model, arguments.method)
        self._shared = {
            "alisa": __version__,
            "model": model_fingerprint(loaded.model),
            "text": hashlib.sha256(self._tokens.numpy().tobytes()).hexdigest()[:16],
            "prefix": self._prefix.tolist(),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": loaded.model.device.type,
            "method": arguments.method,
        }
        #: How many tokens the text has.
        self.tokens = len(ids)

    def _check_lengths(self) -> None:
        arguments, longest = self._arguments, 0
        if arguments.samples:
            longest = arguments.sample_tokens
            needed = arguments.samples * (arguments.sample_tokens - len(self._prefix))
            if needed > len(self._tokens):
                raise AlisaError(
                    "the text is too short",
                    got=f"{len(self._tokens)} tokens",
                    expected=f"at least {needed} ({arguments.samples} windows of {arguments.sample_tokens})",
                    fix="give a longer --text, or lower --samples or --sample-tokens",
                )
        if arguments.trials:
            longest = max(longest, len(self._prefix) + max(arguments.recall_lengths))
            for length in arguments.recall_lengths:
                self._trials(length, 0.0)  # refuses a length that does not fit
        room = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest > room:
            raise AlisaError(
                "a window does not fit the model",
                got=f"{longest} tokens",
                expected=f"at most {room} (max_position_embeddings)",
                fix="lower --sample-tokens or --recall-lengths",
            )

    def cells(self, line: Line) -> Iterator[tuple[str, dict[str, Any], int]]:
        """What a line needs: the measure, the settings that decide its result, and how many samples it takes."""
        arguments = self._arguments
        if arguments.samples:
            settings = {"samples": arguments.samples, "sample_tokens": arguments.sample_tokens}
            settings |= {"prompt_tokens": arguments.prompt_tokens}
            yield "perplexity", self._settings("perplexity", line, settings), arguments.samples
        if arguments.trials and line.asks_recall:
            plan = dataclasses.asdict(self._plan)
            for form in FORMS:
                count = len(self._plan.lengths) * len(self._plan.depths) * self._plan.trials
                yield form, self._settings(f"recall, {form}", line, plan), count

    def _settings(self, measure: str, line: Line, more: dict[str, Any]) -> dict[str, Any]:
        return {"measure": measure, **line.selection, **more, **self._shared}

    def samples_left(self, lines: Sequence[Line]) -> int:
        """Samples of all cells that no earlier run has finished."""
        missing = {
            str(settings): count
            for line in lines
            for _, settings, count in self.cells(line)
            if self._results.find(settings) is None
        }
        return sum(missing.values())

    def measure(self, line: Line, progress: SampleProgress) -> None:
        """All cells of a line that are not finished."""
        for measure, settings, _ in self.cells(line):
            if self._results.find(settings) is not None:
                continue
            kind = measure if measure == "perplexity" else f"recall ({measure})"
            progress.cell(f"{line.policy} {line.sparsity * 100:g} %{' ' * bool(line.label)}{line.label}: {kind}")
            began = time.perf_counter()
            if measure == "perplexity":
                result: dict[str, Any] = {"loss": self._losses(line.config, progress)}
            else:
                result = {"places": self._recall(line.config, measure, progress)}
            self._results.add(settings, result, time.perf_counter() - began)

    def _losses(self, config: AlisaConfig, progress: SampleProgress) -> list[float]:
        """Mean loss of each window's tokens after the prompt, in nats."""
        losses: list[float] = []
        for batch in self._windows.split(self._arguments.batch_size):
            found = self._decoder.predict(batch, self._arguments.prompt_tokens, config)
            losses += [round(float(loss), 6) for loss in found.loss.double().mean(1)]
            progress.samples(len(batch))
        return losses

    def _recall(self, config: AlisaConfig, form: str, progress: SampleProgress) -> list[list[dict[str, Any]]]:
        """By length and depth, what came back in each trial."""
        by_length: list[list[dict[str, Any]]] = []
        size = self._arguments.batch_size
        for length in self._plan.lengths:
            by_length.append([])
            for depth in self._plan.depths:
                trials = self._trials(length, depth)
                exact: list[int] = []
                digits: list[float] = []
                for start in range(0, len(trials), size):
                    found = ask(self._decoder, trials[start : start + size], form, config)
                    exact += [int(whole) for whole in found.exact]
                    digits += [round(share, 4) for share in found.digits]
                    progress.samples(len(found.exact))
                by_length[-1].append({"exact": exact, "digits": digits})
        return by_length

    def _trials(self, length: int, depth: float) -> list[Trial]:
        return make_trials(self._loaded.tokenizer, self._tokens, length, depth, self._plan, self._prefix)

    def rows(self, lines: Sequence[Line]) -> list[Row]:
        """The finished cells, the reference first."""
        rows = []
        for line in lines:
            done = {measure: self._results.find(settings) for measure, settings, _ in self.cells(line)}
            loss = done.pop("perplexity", None)
            recall = {form: result["places"] for form, result in done.items() if result is not None}
            if loss is not None or recall:
                losses = None if loss is None else loss["loss"]
                rows.append(Row(line.policy, line.sparsity, line.label, losses, recall))
        return rows


class SampleProgress(Progress):
    """A bar over the samples of all cells."""

    _LAYOUT = "{desc} |{bar}| {n_fmt}/{total_fmt} samples [{elapsed}<{remaining}]"

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(quiet=quiet)
        self._total = 0

    def count_samples(self, total: int) -> None:
        """How many there are in all."""
        self._total = total

    def cell(self, label: str) -> None:
        """The next cell begins."""
        self._draw(label, self._total, self._LAYOUT)
        if not self._on_terminal and not self._quiet:
            self.line(f"{label} ({self._done} of {self._total} samples done)")

    def samples(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        with self._lock:
            if self._bar is not None:
                self._bar.update(count)


def _windows(tokens: torch.Tensor, prefix: torch.Tensor, samples: int, length: int) -> torch.Tensor:
    """`[samples, length]` pieces that do not overlap, spread evenly over the whole text."""
    own = length - len(prefix)
    stride = len(tokens) // samples if samples else 0
    pieces = [torch.cat((prefix, tokens[i * stride : i * stride + own])) for i in range(samples)]
    return torch.stack(pieces) if pieces else tokens.new_empty((0, length))


def model_fingerprint(model: Any) -> str:
    """Of the architecture and a thousand values of each weight: enough to tell checkpoints apart, at any size."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        values = weight.flatten()
        step = max(1, values.numel() // 1000)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
