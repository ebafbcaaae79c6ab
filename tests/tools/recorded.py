"""Records of the embedded model, made once a process."""

from __future__ import annotations

import functools

import torch

import alisa_compile
from alisa_compile.passes.record import GraphRecord
from tests.support import compiled, novel, passage


@functools.cache
def graphs() -> dict[str, GraphRecord]:
    """By stage, with rows on the host, so that the graphs move some."""
    model, tokenizer = novel()
    tokens = passage(tokenizer, 200)
    candidate = compiled(model, inner="eager", device_kv_budget="200KiB", host_kv_budget="4MiB")
    with alisa_compile.record() as found:
        candidate.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    return {graph.stage: graph for graph in found}
