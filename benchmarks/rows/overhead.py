"""What a decode step costs besides arithmetic, and what compilation costs before the first."""

from __future__ import annotations

from typing import Any

import torch

from alisa_compile.kernels import native
from benchmarks import compile_time
from benchmarks.contenders import Alisa, Transformers, quiet_transformers
from benchmarks.models import History, llama
from benchmarks.outcome import GateFailed, Measure, Outcome, Verdict
from benchmarks.rows.decode import check
from benchmarks.timing import Times, alternate

_PROMPT, _ROOM = 64, 448
_MOST = 60  # steps of a turn: five turns and the warm-up fit the room


@torch.no_grad()
def host(shape: str, sparsity: float, seconds: float = 1.0) -> Outcome:
    """float32 on one thread: at this size a second one only adds noise, to both sides."""
    quiet_transformers()
    native.register_native()
    torch.set_num_threads(1)
    model = llama(shape, torch.float32, 1024)
    config = model.config
    history = History(1, _PROMPT, config.num_key_value_heads, config.head_dim, torch.float32)
    ours = Alisa(model, history, _ROOM, sparsity=sparsity)
    ours.fill()
    check(ours)
    static = Transformers(model, history, _ROOM, "static", compiled=True)
    static.fill()
    times = alternate({"alisa": ours.step, "hf static, Inductor": static.step}, seconds=seconds, most=_MOST)
    compiled = Times.of([ms / 1e3 for ms in ours.store.statistics.decode_ms[-times["alisa"].calls :]])
    parts = alternate(_host_parts(ours), seconds=min(seconds, 0.3))
    own = times["alisa"].p50 - compiled.p50
    ratio = times["alisa"].p50 / times["hf static, Inductor"].p50
    return Outcome(
        [
            *(Measure(who, found) for who, found in times.items()),
            Measure("of alisa: compiled code", compiled),
            Measure("of alisa: all else", Times(own, own, own, own, times["alisa"].calls)),
            *(Measure(who, found) for who, found in parts.items()),
        ],
        [Verdict(f"{ratio:.2f} x static cache with Inductor, at most 1.5 wanted", ratio <= 1.5)],
    )


def _host_parts(ours: Alisa) -> dict[str, Any]:
    """begin_step + end_step, and one call of each decode op, on a copy of this store."""
    store, twin = ours.store, ours.store.copy()
    ops, layer = torch.ops.alisa, store.last_layer
    key = torch.randn(1, store.shape.kv_heads, 1, store.shape.head_dim)
    query = torch.randn(1, 2 * store.shape.kv_heads, 1, store.shape.head_dim)
    length = twin.length.clone()

    def append() -> None:
        twin.length.copy_(length)
        ops.kv_append.default(twin.pool, None, twin.table, twin.length, twin.valid, key, key, None, None, None, layer)

    def attend() -> None:
        ops.swa_attention.default(query, twin.pool, None, twin.table, length, None, twin.rows, twin.counts, layer, 0.25)

    def steps() -> None:
        twin.host_length = store.host_length
        twin.begin_step(1)
        twin.end_step(1)

    return {"begin_step and end_step": steps, "one kv_append call": append, "one swa_attention call": attend}


def compile_times(layers: int) -> Outcome:
    """Two processes over one new cache folder: the second finds what the first left."""
    cold, warm = compile_time.measure(layers)
    if cold["tokens"] != warm["tokens"]:
        raise GateFailed("the warm process generated other tokens than the cold one")
    return Outcome(
        [
            Measure(
                f"alisa, {name} caches",
                Times.of([row["seconds"]]),
                f"{row['fx_cache_hits']} of {row['fx_cache_hits'] + row['fx_cache_misses']} graphs from the cache",
            )
            for name, row in (("cold", cold), ("warm", warm))
        ]
    )
