"""How long a plan takes: it is made before the first token of every `generate` that has a profile."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import alisa_compile
from alisa_compile.runtime.profile import MachineProfile, Table
from benchmarks.models import SHAPES
from benchmarks.outcome import GateFailed, Measure, Outcome
from benchmarks.timing import alternate

_RATES = Table(((256.0, 1e10), (4096.0, 2e10)))
#: Round numbers, so that the plan is the same on every machine.
_PROFILE = MachineProfile(
    machine="benchmark",
    device="cpu",
    dtype="bfloat16",
    device_to_host=_RATES,
    host_to_device=_RATES,
    disk_write=Table(((4096.0, 1e9),)),
    disk_read=Table(((4096.0, 1e9),)),
    attention=Table(((1e4, 1e-6), (1e8, 1e-2)), grows=True),
    linear=Table(((1.0, 1e-10), (64.0, 1e-10)), grows=True),
    layer_seconds=1e-5,
)


def plan(prompt: int, new: int, fraction: float, seconds: float = 0.3) -> Outcome:
    """Of Llama-3.2-1B with `fraction` of its K and V on the device; making the model's shapes is part of it."""
    config = hf.LlamaConfig(**SHAPES["llama-3.2-1b"], max_position_embeddings=1 << 17, tie_word_embeddings=True)
    row = 2 * config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers
    kv = row * (prompt + new)

    def run(share: float, objective: str = "overlapped") -> Any:
        return alisa_compile.plan(
            config, prompt_length=prompt, max_new_tokens=new, profile=_PROFILE, device="cpu", dtype=torch.bfloat16,
            objective=objective,
            device_kv_budget=int(share * kv), host_kv_budget=2 * kv,
        )  # fmt: skip

    short, roomy = run(fraction), run(2.0)
    for tier, sizes in short.bytes_by_tier.items():
        if max(sizes) > short.budget_bytes[tier]:
            raise GateFailed(f"{tier} holds {max(sizes)} bytes in a step, of {short.budget_bytes[tier]}")
    if roomy.p1 is not None or short.p1 is None:
        raise GateFailed(f"phase II starts at {roomy.p1} with room for everything, at {short.p1} with {fraction:.0%}")
    times = alternate(
        {
            f"alisa, {fraction:.0%} on device": lambda: run(fraction),
            "paper's objective": lambda: run(fraction, "paper"),
            "everything fits": lambda: run(2.0),
        },
        seconds=seconds,
    )
    return Outcome([Measure(who, found) for who, found in times.items()])
