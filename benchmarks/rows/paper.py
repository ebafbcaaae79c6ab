"""The paper's workload: short prompts, 512 new tokens, many sequences, end to end."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import alisa_compile
from alisa_compile import InfeasibleError
from alisa_compile.backend import alisa
from alisa_compile.kernels import native
from benchmarks.contenders import quiet_transformers
from benchmarks.memory import allocated
from benchmarks.outcome import GateFailed, Measure, Outcome
from benchmarks.timing import Times, seconds_of

_CHECKED = 32  # tokens
_RUNS = 2


def _model(layers: int, hidden: int, heads: int, length: int) -> Any:
    config = hf.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=2048,
        word_embed_proj_dim=hidden, max_position_embeddings=length, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.OPTForCausalLM(config).eval()
    with torch.no_grad():  # a fresh model is so close to undecided that its tokens say little
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


@torch.no_grad()
def workload(batch: int, prompt: int, new: int, layers: int, hidden: int, heads: int) -> Outcome:
    """float32, greedy. Memory is what the allocator handed out in a whole `generate`, activations included."""
    quiet_transformers()
    native.register_native()
    model = _model(layers, hidden, heads, prompt + new)
    ids = torch.randint(2, 2048, (batch, prompt), generator=torch.Generator().manual_seed(0))
    kv = 2 * hidden * 4 * layers * (prompt + new) * batch

    def generator(who: Any, tokens: int = new, **options: Any) -> Callable[[], torch.Tensor]:
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return lambda: who.generate(ids, attention_mask=torch.ones_like(ids), **fixed, **options)

    def ours(**options: Any) -> Any:
        return torch.compile(model, backend=alisa, options=options)

    count = min(_CHECKED, new)
    if not torch.equal(generator(ours(sparsity=0.0), count)(), generator(model, count)()):
        raise GateFailed("at sparsity 0, alisa's tokens are not those of stock transformers")
    compiled = type(model)(model.config).eval()
    compiled.load_state_dict(model.state_dict())
    compiled.forward = torch.compile(compiled.forward)
    half = {"device_kv_budget": kv // 2, "host_kv_budget": 2 * kv}
    contenders: dict[str, tuple[Any, dict[str, Any]]] = {
        "alisa, 80 %": (ours(sparsity=0.8), {}),
        "alisa, 80 %, int8": (ours(sparsity=0.8, kv_dtype="int8"), {}),
        "alisa, int8, 50 % on device": (ours(sparsity=0.8, kv_dtype="int8", **half), {}),
        "alisa, 50 % on device": (ours(sparsity=0.8, **half), {}),
        # As FlexGen does: dense, a fixed share on the device, and in each step the rest comes from the host.
        "static split, 50 % on device": (ours(sparsity=0.0, **half), {}),
        "alisa, dense": (ours(sparsity=0.0), {}),
        "hf dynamic (default)": (model, {}),
        "hf dynamic, Inductor": (compiled, {}),
        "hf static": (model, {"cache_implementation": "static"}),
        "hf static, Inductor": (compiled, {"cache_implementation": "static"}),
    }
    measures = []
    for who, (runner, options) in contenders.items():
        run = generator(runner, **options)
        try:
            run()  # compiles
            run()  # the first call after a compilation clears up what it has left
        except InfeasibleError as error:
            measures.append(Measure(who, None, str(error).split(";")[0]))
            continue
        times = Times.of([seconds_of(run) for _ in range(_RUNS)])
        release(runner)
        _, memory = allocated(run)
        measures.append(Measure(who, times, peak_bytes=memory.peak, tokens_per_s=batch * new / times.mean * 1e3))
        release(runner)
        gc.collect()
    return Outcome(measures)


def release(runner: Any) -> None:
    """What alisa keeps for the next call would not count as allocated in it."""
    if hasattr(runner, "_orig_mod"):
        alisa_compile.release(runner)
