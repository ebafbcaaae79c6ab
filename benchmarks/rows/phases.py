"""Where the phases cross: what a step costs as less and less of K and V fits the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alisa_compile
from alisa_compile.kernels import native
from benchmarks.contenders import quiet_transformers
from benchmarks.machine import ASSETS
from benchmarks.outcome import GateFailed, Measure, Outcome
from benchmarks.rows.paper import Workload
from benchmarks.timing import Times

_POLICIES: dict[str, dict[str, Any]] = {"swa": {}, "dense": {"sparsity": 0.0}}


def step_by_budget(policy: str, shares: list[float], prompt: int, new: int, rounds: int = 3) -> Outcome:
    """Beside a store without any budget; the rest is on the host.

    One thread: the model is small, and transfers have a thread of their own.
    """
    quiet_transformers()
    native.register_native()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "novel-7m", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "novel-7m")
    text = (ASSETS / "moby-dick-excerpt.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :prompt]
    config = model.config
    kv = 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_hidden_layers * (prompt + new)
    budgets: dict[str, dict[str, Any]] = {"alisa, no budget": {}}
    budgets |= {f"alisa, room for {share:.0%}": {"device_kv_budget": int(share * kv)} for share in shares}
    work = Workload(model, ids, new)
    models = {who: work.compiled(**_POLICIES[policy], **budget) for who, budget in budgets.items()}
    times = decode_steps(work, models, "alisa, no budget", rounds)
    return Outcome([_measure(who, models[who], times[who], new) for who in models])


def decode_steps(work: Workload, models: Mapping[str, Any], reference: str, rounds: int) -> dict[str, Times]:
    """Of whole generations, in turns; the first compiles. The tokens of all have to be those of `reference`."""
    steps: dict[str, list[float]] = {who: [] for who in models}
    outputs: dict[str, torch.Tensor] = {}
    for turn in range(rounds + 1):
        for who, compiled in models.items():
            outputs[who] = work.run(compiled)
            if turn:
                steps[who] += [ms / 1e3 for ms in alisa_compile.report(compiled).decode_ms]
    for who, found in outputs.items():
        if not torch.equal(found, outputs[reference]):
            raise GateFailed(f"{who}: other tokens than with everything on the device")
    return {who: Times.of(seconds) for who, seconds in steps.items()}


def _measure(who: str, compiled: Any, times: Times, new: int) -> Measure:
    report = alisa_compile.report(compiled).to_dict()
    phases = "+".join(phase["phase"] for phase in report["phases"])
    up = report["bytes_moved"]["host_to_device"] / new / 1024
    return Measure(
        who,
        times,
        f"phases {phases}, {up:.0f} KiB up a step",
        kv_bytes=report["peak_bytes"]["device"],
        tokens_per_s=1e3 / times.mean,
    )
