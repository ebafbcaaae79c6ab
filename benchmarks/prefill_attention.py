"""Attention of a whole prompt on CPU, with the mass that seeds the selection, beside torch's attention alone.

A round times, one after the other, `alisa::prefill_attention` with the default policy, the same op without a policy (no
mass), and torch's causal attention of the same prompt. No time is printed unless the output is torch's and the mass is
that of the plain-torch reference in float64.

    python -m benchmarks.prefill_attention [--rounds 5] [--threads 2] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

from alisa_compile import kernels
from alisa_compile.config import AlisaConfig
from alisa_compile.kernels import native
from alisa_compile.runtime.policies import head_groups, selection_spec
from benchmarks.machine import machine_line

RESULTS = Path(__file__).parent / "results" / "prefill_attention.json"
HEADS, GROUP, HEAD_DIM = 8, 4, 128
LIMIT = 1.1  # times torch's attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: torch.dtype
    tokens: int
    batch: int = 1

    @property
    def name(self) -> str:
        """As the table prints it."""
        return f"{str(self.dtype).removeprefix('torch.')}, {self.tokens} tokens, batch {self.batch}"


CASES = tuple(Case(dtype, tokens) for dtype in (torch.float32, torch.bfloat16) for tokens in (512, 2048, 8192))
QUICK = (Case(torch.float32, 96), Case(torch.bfloat16, 96, batch=2))


class Attention:
    """A prompt's query, key and value as models make them, the op's other arguments, and torch's attention."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)

        def states(heads: int) -> torch.Tensor:
            drawn = torch.randn((case.batch, case.tokens, heads, HEAD_DIM), generator=generator)
            return drawn.to(case.dtype).transpose(1, 2)

        self.query, self.key, self.value = states(HEADS * GROUP), states(HEADS), states(HEADS)
        config = AlisaConfig()
        policy = selection_spec(config)
        assert policy is not None
        self.groups, self.spec, self.scale = head_groups(config, HEADS), policy.encode(), 1 / math.sqrt(HEAD_DIM)

    def run(self, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The op that is measured."""
        out, mass = torch.ops.alisa.prefill_attention.default(
            self.query, self.key, self.value, None, self.groups, spec, self.scale
        )
        return out, mass

    def with_mass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As a sparse model calls it."""
        return self.run(self.spec)

    def without_mass(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As a dense model calls it."""
        return self.run("")

    def torch_attention(self) -> torch.Tensor:
        """Torch's attention of the same prompt."""
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=True, scale=self.scale, enable_gqa=True
        )


def check(case: Case, attention: Attention) -> None:
    """Refuse to measure what is not torch's output, or not the mass of the reference in float64."""
    out, mass = attention.with_mass()
    rows = mass.shape[2]
    exact = kernels.prefill_attention.reference.last_rows_mass(
        attention.query.double(), attention.key.double(), None, attention.groups, rows, query_start=0,
        scale=attention.scale,
    )  # fmt: skip
    try:
        torch.testing.assert_close(out, attention.torch_attention(), rtol=2.0**-7, atol=2.0**-10)
        torch.testing.assert_close(mass.double(), exact, rtol=1e-4, atol=1e-6)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"{case.name}: not the reference's result, so no time is printed: {reason}") from None


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row: medians over rounds, after one that warms up."""
    attention = Attention(case)
    check(case, attention)
    calls = {"ms": attention.with_mass, "no mass ms": attention.without_mass, "SDPA ms": attention.torch_attention}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(_seconds(call))
    middle = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    return {
        "case": case.name,
        **{name: seconds * 1e3 for name, seconds in middle.items()},
        "ratio": statistics.median(a / b for a, b in zip(times["ms"][1:], times["SDPA ms"][1:], strict=True)),
        "best ratio": min(times["ms"][1:]) / min(times["SDPA ms"][1:]),
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="short prompts and one round, only to see that it runs")
    parser.add_argument("--json", type=Path, help=f"where the numbers go; default {RESULTS.name}, none with --quick")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        cases, rounds = (QUICK, 1) if options.quick else (CASES, options.rounds)
        machine = machine_line()
        rows = [measure(case, rounds) for case in cases]
    finally:
        torch.set_num_threads(before)
    print(machine + ("" if native.register_native() else ", no native kernels"))
    print(
        f"{HEADS} KV heads, group {GROUP}, head_dim {HEAD_DIM}, default policy; median of {rounds} rounds; "
        "no mass = the op without a policy; ratio to torch's attention"
    )
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if options.quick:
        print("--quick: these times say nothing about the kernel")
    else:
        for row in rows:
            verdict = "met" if row["ratio"] <= LIMIT else "NOT met"
            print(f"{row['case']}: {row['ratio']:.2f} times torch's attention, at most {LIMIT:g} wanted: {verdict}")
    target = options.json or (None if options.quick else RESULTS)
    if target:
        target.write_text(json.dumps({"machine": machine, "rounds": rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
