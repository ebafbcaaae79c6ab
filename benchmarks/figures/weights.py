"""Attention weights of the embedded model on a held-out text, dense or under a policy, every row of every head.

The reference, slow and plain: a layer's steps run one after the other over the reference of `alisa::kv_select`, so what
a policy sees is what it would have seen in decoding. Sums in float64 on one thread: the same bits on every run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask

from alisa_compile.config import AlisaConfig
from alisa_compile.kernels import kv_select
from alisa_compile.runtime.policies import selection_spec
from benchmarks.contenders import quiet_transformers
from benchmarks.machine import ASSETS

_NAME = "alisa_figures"

#: Options by the names that plots use; sparsity comes on top.
POLICIES: dict[str, dict[str, Any]] = {
    "local": {"policy": "local"},
    "strided": {"policy": "strided"},
    "h2o": {"policy": "h2o"},
    "swa, paper": {"policy": "swa", "paper": True},
    "swa": {"policy": "swa"},
}


@dataclasses.dataclass
class _Run:
    """One forward pass: its prompt, its policy, and the weights of each layer so far, `[H, T, T]` float32."""

    prompt: int
    config: AlisaConfig
    layers: int
    weights: list[torch.Tensor] = dataclasses.field(default_factory=list)


class Novel:
    """The embedded model and the beginning of a text that it has not seen."""

    def __init__(self, tokens: int) -> None:
        quiet_transformers()
        self.model = AutoModelForCausalLM.from_pretrained(ASSETS / "novel-7m", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(ASSETS / "novel-7m")
        text = (ASSETS / "moby-dick-evaluation.txt").read_text(encoding="utf-8")
        self.ids = tokenizer(text[: 20 * tokens], return_tensors="pt", verbose=False)["input_ids"][:, :tokens]
        assert self.ids.shape[1] == tokens

    def weights(self, prompt: int, sparsity: float = 0.0, **options: Any) -> torch.Tensor:
        """`[L, H, T, T]`: row t is what token t attends to; rows from `prompt` on come from decode steps."""
        return self.run(prompt, AlisaConfig(sparsity=sparsity, **options))[0]

    @torch.no_grad()
    def run(self, prompt: int, config: AlisaConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights, and the logits `[T, V]` that the model makes of them."""
        run = _Run(prompt, config, int(self.model.config.num_hidden_layers))
        with _one_thread(), _attending(self.model, run):
            logits: torch.Tensor = self.model(self.ids, use_cache=False).logits[0]
        return torch.stack(run.weights), logits


def spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Rank correlation; equal values share the mean of their ranks. 0 where one of them is constant."""
    first, second = _ranks(a), _ranks(b)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray[Any, Any] = (ends - (counts - 1) / 2)[place]
    return ranks


_run: _Run | None = None


@contextlib.contextmanager
def _attending(model: Any, run: _Run) -> Iterator[None]:
    """transformers hands an attention function nothing but the module and its tensors, hence a global."""
    global _run
    before, _run = model.config._attn_implementation, run
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _run = None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """All steps of one layer: query `[1, Hq, T, D]`, key and value `[1, Hkv, T, D]`."""
    assert _run is not None and query.shape[0] == 1
    heads, tokens = query.shape[1], query.shape[2]
    key, value = (states.repeat_interleave(heads // states.shape[1], dim=1)[0] for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (query[0].double() @ key.double().transpose(1, 2)) * scale
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    spec = selection_spec(_run.config)
    if spec is None:
        weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    else:
        weights = _sparse(logits, causal, _run, len(_run.weights), spec)
    out = (weights @ value.double()).to(query.dtype)
    _run.weights.append(weights.float())
    return out.transpose(0, 1)[None].contiguous(), None


def _sparse(logits: torch.Tensor, causal: torch.Tensor, run: _Run, layer: int, spec: Any) -> torch.Tensor:
    """The prompt dense, then each token over the rows that the policy has chosen for it."""
    tokens, prompt, text = logits.shape[-1], run.prompt, spec.encode()
    weights = torch.zeros_like(logits)
    weights[:, :prompt] = logits[:, :prompt].masked_fill(~causal[:prompt], float("-inf")).softmax(-1)
    leading = (run.layers, 1, 1)
    scores = torch.zeros((*leading, spec.score_rows(tokens + 1), tokens), dtype=torch.float64)
    rows = torch.zeros((*leading, spec.rows_capacity(tokens + 1)), dtype=torch.int32)
    counts = torch.full(leading, -1, dtype=torch.int32)
    length, origin = torch.full((run.layers,), prompt), torch.tensor([prompt, 0])
    last = int(spec.seed_rows(prompt))
    if spec.rank == "sum":
        mass = weights[:, :prompt, :prompt].sum((0, 1))[None, None, None]
    else:
        mass = weights[:, prompt - last : prompt, :prompt].sum(0)[None, None]
    kv_select.reference.kv_seed(scores, rows, counts, mass, length, origin, None, prompt, layer, text)
    for step in range(prompt, tokens):
        length[layer] = step + 1
        count = int(counts[layer, 0, 0])
        chosen = torch.arange(step + 1) if count < 0 else rows[layer, 0, 0, :count].long()
        attended = logits[:, step, chosen].softmax(-1)
        weights[:, step, chosen] = attended
        mass = torch.zeros((1, 1, tokens), dtype=torch.float64)
        mass[0, 0, : len(chosen)] = attended.sum(0)
        kv_select.reference.kv_select(scores, rows, counts, mass, length, origin, None, layer, text)
    return weights


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)
