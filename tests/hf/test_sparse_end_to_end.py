"""Sparse decode end to end: the compiled model with its kernels against eager attention with plain-torch references.

The references run in a process of their own, where the native kernels are switched off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import AlisaCache
from tests import support

NEW = 64
PROMPT = 300
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "swa, float32": (torch.float32, {"sparsity": 0.8}),
    "swa, bfloat16": (torch.bfloat16, {"sparsity": 0.8}),
    "swa, int8 rows": (torch.float32, {"sparsity": 0.8, "kv_dtype": "int8"}),
    "swa per KV head, frequent refresh": (torch.float32, {"sparsity": 0.9, "head_mode": "per_kv_head", "refresh": 4}),
    "Algorithm 1": (torch.float32, {"sparsity": 0.8, "paper": True}),
    "h2o": (torch.float32, {"sparsity": 0.8, "policy": "h2o"}),
    "strided": (torch.float32, {"sparsity": 0.8, "policy": "strided"}),
    "local": (torch.float32, {"sparsity": 0.8, "policy": "local"}),
}


def _prompts(tokenizer: Any) -> torch.Tensor:
    return torch.cat([support.passage(tokenizer, PROMPT, start) for start in (0, 700)])


def _generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def reference_run(path: Path) -> None:
    """Tokens and top-1 margins of every case, to a file."""
    results = {}
    for name, (dtype, options) in CASES.items():
        model, tokenizer = support.novel(dtype)
        model.set_attn_implementation("alisa")
        out = _generate(model, _prompts(tokenizer), past_key_values=AlisaCache(model.config, **options))
        top = torch.stack(out.logits, 1).float().topk(2).values
        results[name] = (out.sequences, top[..., 0] - top[..., 1])
    torch.save(results, path)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    path = tmp_path_factory.mktemp("references") / "tokens.pt"
    code = f"""if True:
        from pathlib import Path
        from tests.hf import {Path(__file__).stem} as this
        this.reference_run(Path({str(path)!r}))"""
    environment = {**os.environ, "ALISA_NATIVE": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
    loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = torch.load(path)
    return loaded


_BY_DEFAULT = ("swa, bfloat16", "swa, int8 rows")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in _BY_DEFAULT else pytest.mark.slow) for case in CASES]
)
def test_kernels_against_references(case: str, references: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The same tokens; where they part, the reference was undecided to within what the dtype resolves."""
    dtype, options = CASES[case]
    model, tokenizer = support.novel(dtype)
    expected, margins = references[case]
    with support.recorded_compiles() as rows:
        got = _generate(support.compiled(model, **options), _prompts(tokenizer)).sequences
    assert all(row.rewritten == model.config.num_hidden_layers for row in rows)
    bound = 0.1 if dtype == torch.bfloat16 else support.MARGIN
    for row in range(2):
        parted = (got[row] != expected[row]).nonzero().flatten().tolist()
        # What follows a parting is another text.
        assert not parted or float(margins[row, parted[0] - PROMPT]) <= bound, (
            f"token {parted[0] - PROMPT} of row {row}"
        )
    dense = _generate(model, _prompts(tokenizer)).sequences
    assert not torch.equal(got, dense), "sparsity changes nothing here, so this shows nothing"
