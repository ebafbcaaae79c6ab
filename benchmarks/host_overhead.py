"""Host overhead of one decode step: 16 layers so small that a step is nearly all overhead.

Both sides run in this process, compiled by Inductor, in alternating rounds: alisa over its store, and transformers'
StaticCache. No time is printed unless both produce the stock model's tokens. Parts of alisa's step: Dynamo's guards and
call, begin_step/end_step, the compiled code, and what one op call costs.

    python -m benchmarks.host_overhead [--rounds 7] [--steps 20] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tabulate import tabulate

from alisa_compile import AlisaCache, compat
from alisa_compile.backend import alisa
from benchmarks.machine import machine_line

LAYERS, PROMPT, CAPACITY = 16, 64, 512
LIMIT = 1.5  # of transformers' static cache with Inductor, at sparsity 0


class AlisaStep:
    """Decode steps of a compiled model over an AlisaCache."""

    def __init__(self, model: Any, sparsity: float) -> None:
        self.model = model
        self.cache = AlisaCache(model.config, batch_size=1, dtype=torch.float32, max_length=CAPACITY, sparsity=sparsity)
        self.store = self.cache.stores[0]
        self.store.padded = False
        self.forward = torch.compile(lambda m, **inputs: m(**inputs), backend=alisa, options={"sparsity": sparsity})

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        start, new = self.cache.get_seq_length(), token.shape[1]
        mask = torch.ones((1, start + new), dtype=torch.int64)
        positions = torch.arange(start, start + new)[None]
        for tensor in (token, mask, positions):
            if tensor.shape[1] > 1:
                compat.mark_dynamic(tensor, 1)
        return self.forward(
            self.model,
            input_ids=token,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
        ).logits[:, -1]

    def host_parts(self) -> dict[str, float]:
        """Milliseconds of begin_step + end_step, and of one call of each decode op, on this store's own tensors."""
        store, twin = self.store, self.store.copy()
        ops = torch.ops.alisa
        key = torch.randn(1, store.shape.kv_heads, 1, store.shape.head_dim)
        query = torch.randn(1, 2 * store.shape.kv_heads, 1, store.shape.head_dim)
        length = twin.length.clone()

        def append() -> None:
            twin.length.copy_(length)
            ops.kv_append.default(twin.pool, None, twin.table, twin.length, twin.valid, key, key, None, None, None, 3)

        def steps() -> None:
            twin.host_length = store.host_length
            twin.begin_step(1)
            twin.end_step(1)

        reset = _per_call(lambda: twin.length.copy_(length))
        return {
            "begin_step + end_step": _per_call(steps),
            "kv_append call": _per_call(append) - reset,
            "swa_attention call": _per_call(
                lambda: ops.swa_attention.default(
                    query, twin.pool, None, twin.table, length, None, twin.rows, twin.counts, 3, 0.25
                )
            ),
        }


class StaticStep:
    """Decode steps of a compiled model over transformers' StaticCache."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, 0
        self.cache = hf.StaticCache(config=model.config, max_cache_len=CAPACITY)
        self.forward = torch.compile(lambda m, **inputs: m(**inputs), dynamic=False)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.seen, self.seen + token.shape[1])[None]
        self.seen += token.shape[1]
        run = self.forward if token.shape[1] == 1 else (lambda m, **inputs: m(**inputs))
        return run(self.model, input_ids=token, position_ids=positions, past_key_values=self.cache).logits[:, -1]


def _per_call(call: Callable[[], Any], calls: int = 2000) -> float:
    for _ in range(200):
        call()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls * 1e3


def _dispatch_us() -> float:
    """Microseconds that our way of defining an op costs per call, beside a C++ op of torch's own: an op that does
    nothing, with as many arguments as `swa_attention`."""
    library = torch.library.Library("alisa_benchmark", "DEF")
    arguments = "Tensor a, Tensor b, Tensor? c, Tensor d, Tensor e, Tensor? f, Tensor? g, Tensor? h, int i, float j"
    library.define(f"nothing({arguments}) -> ()")
    library.impl("nothing", lambda *args: None, "CompositeExplicitAutograd")
    x = torch.zeros(4)
    call = torch.ops.alisa_benchmark.nothing.default
    return _per_call(lambda: call(x, x, None, x, x, None, x, x, 3, 0.5), 20000) * 1e3


def _round(step: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step(token)
    return (time.perf_counter() - started) / steps * 1e3


@torch.no_grad()
def measure(sparsity: float, rounds: int, steps: int) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=2048,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    prompt, tokens = torch.randint(1, 128, (1, PROMPT)), torch.randint(1, 128, (16, 1, 1))
    ours, static = AlisaStep(model, sparsity), StaticStep(model)
    differences = []
    for block in (prompt, *tokens):
        expected, got, peer = _stock(model, block), ours(block), static(block)
        differences.append((float((got - expected).abs().max()), float((peer - expected).abs().max())))
    _stock(model, None)
    if sparsity == 0 and max(max(pair) for pair in differences) > 1e-4:
        raise SystemExit(f"the logits differ from stock transformers by {max(differences)}: no number is printed")
    ours_ms, static_ms = [], []
    for _ in range(rounds):
        ours_ms.append(_round(ours, tokens[0], steps))
        static_ms.append(_round(static, tokens[0], steps))
    total, peer = statistics.median(ours_ms), statistics.median(static_ms)
    compiled = statistics.median(ours.store.statistics.decode_ms[-rounds * steps :])
    parts = ours.host_parts()
    return {
        "sparsity": sparsity,
        "alisa_ms": total,
        "static_ms": peer,
        "ratio": total / peer,
        "compiled_code_ms": compiled,
        "begin_end_ms": parts["begin_step + end_step"],
        "guards_ms": total - compiled - parts["begin_step + end_step"],
        "kv_append_us": parts["kv_append call"] * 1e3,
        "swa_attention_us": parts["swa_attention call"] * 1e3,
    }


_history: list[torch.Tensor] = []


def _stock(model: Any, block: torch.Tensor | None) -> torch.Tensor:
    """Logits of the stock model on everything seen so far; None forgets it."""
    if block is None:
        _history.clear()
        return torch.empty(0)
    _history.append(block.view(1, -1))
    logits: torch.Tensor = model(torch.cat(_history, dim=1)).logits[:, -1]
    return logits


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # at this size a second thread only adds noise, to both sides
    machine, dispatch = machine_line(), _dispatch_us()
    rows = [measure(sparsity, arguments.rounds, arguments.steps) for sparsity in (0.0, 0.8)]
    print(machine)
    shape = f"{LAYERS} layers, hidden 64, prompt {PROMPT}"
    print(f"{shape}; median of {arguments.rounds} rounds of {arguments.steps} steps")
    headers = {name: name.replace("_", " ") for name in rows[0]}
    print(tabulate(rows, headers=headers, floatfmt=".3f"))
    print(f"dispatch of an op that does nothing: {dispatch:.2f} us a call")
    print(f"limit at sparsity 0: {LIMIT} x the static cache step: {'met' if rows[0]['ratio'] <= LIMIT else 'NOT met'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "dispatch_us": dispatch, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
