"""What is measured: one declarative `Row` each. The code that measures is in `benchmarks/rows/`.

A row names the function that runs it, in a process of its own, with its parameters; `quick` replaces some of these by
tiny ones, for tests and to see that everything runs. Every contender of a row is measured in that one process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One case of a table.

    group: the table. name: of the case, short enough for its first column. work: `module:function` in
    `benchmarks.rows`. limit_s: seconds after which the row is given up. gate: what must hold before any number is
    printed, in words.
    """

    group: str
    name: str
    work: str
    parameters: Mapping[str, Any]
    gate: str
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limit_s: int = 90

    @property
    def id(self) -> str:
        """Of the results file, and for `--only`."""
        return f"{self.group}: {self.name}"

    def arguments(self, quick: bool) -> dict[str, Any]:
        """What `work` is called with."""
        return {**self.parameters, **(self.quick if quick else {})}

    def definition(self, quick: bool) -> str:
        """Changes with whatever decides the numbers, apart from code and machine."""
        return json.dumps([self.work, self.arguments(quick)], sort_keys=True)


TITLES = {
    "attention": "Decode attention, one layer, by context and sparsity: 8 KV heads, group 4, head_dim 128",
    "select": "Scores and selection of one layer and step",
    "quantise": "INT8 rows of one layer's block: 8 KV heads, head_dim 64",
    "move": "Gather and scatter of 4096 rows at random slots, by bytes of a row",
    "planner": "Planning a generation of Llama-3.2-1B, by tokens of the prompt and new ones",
    "compile": "First generate of an 8-layer model, compilation included",
    "overhead": "Host overhead of a decode step: 16 layers so small that a step is nearly all overhead",
    "phases": "Decode step by policy and share of K and V on the device: novel-7m, prompt 900, the rest on the host",
    "recompute": "Decode step of an OPT (2 layers, hidden 512, 8 heads) where K and V of all tokens do not fit",
    "phase-1": "Everything fits, sparsity 0: alisa beside Inductor alone",
    "decode": "Decode step of a 4-layer Llama (hidden 1024, 16 heads, 4 KV heads), bf16, by context and batch",
    "paper": "The paper's workload at a small OPT: prompt 128, 512 new tokens, room for half of K and V on the device",
    "fixed-rows": "Working set capped by max_rows: cost of a token by context",
    "llama-1b": "Llama-3.2-1B shapes, random weights, 16k tokens of context, bf16",
}

_DECODE_GATE = "alisa's logits are those of stock transformers attending to the same rows"
_TINY = {"shape": "tiny", "tokens": 256, "seconds": 0.05}


def _attention() -> list[Row]:
    cases = [(0.8, 16384), (0.0, 16384), (0.5, 16384), (0.9, 16384), (0.8, 4096), (0.8, 65536)]
    return [
        Row(
            "attention",
            f"{tokens // 1024}k, {sparsity:.0%}, {'int8' if dtype == 'int8' else 'bf16'}",
            "attention:decode",
            {"dtype": dtype, "sparsity": sparsity, "tokens": tokens, "batch": 1},
            "output and mass are those of the plain-torch reference in float64",
            quick={"tokens": 1024, "seconds": 0.05, "cache": 1 << 20},
        )
        for sparsity, tokens in cases
        for dtype in ("bfloat16", "int8")
    ]


def _select() -> list[Row]:
    return [
        Row(
            "select",
            f"{tokens // 1024}k, batch {batch}",
            "selection:select",
            {"tokens": tokens, "batch": batch, "sparsity": 0.8},
            "scores and index sets are those of the plain-torch reference",
            quick={"tokens": 512, "seconds": 0.05},
        )
        for tokens, batch in ((4096, 1), (16384, 1), (32768, 1), (65536, 1), (16384, 8))
    ]


def _move() -> list[Row]:
    quantise = [
        Row(
            "quantise",
            f"{tokens} tokens",
            "moving:quantise",
            {"tokens": tokens, "heads": 8, "head_dim": 64},
            "every value comes back within half a step of its scale",
            quick={"tokens": 64, "seconds": 0.05},
        )
        for tokens in (1, 512, 8192)
    ]
    move = [
        Row(
            "move",
            f"{what}, {row_bytes} B",
            f"moving:{what}",
            {"row_bytes": row_bytes, "rows": 4096},
            "the same bytes as torch's own indexing",
            quick={"rows": 64, "seconds": 0.05, "cache": 1 << 20},
        )
        for what in ("gather", "scatter")
        for row_bytes in (256, 1024, 4096, 16384)
    ]
    return [*quantise, *move]


def _planner() -> list[Row]:
    return [
        Row(
            "planner",
            f"{prompt} + {new} tokens",
            "planning:plan",
            {"prompt": prompt, "new": new, "fraction": 0.25},
            "no tier is above its budget in any step, and with a budget for everything there is no phase II",
            quick={"prompt": 200, "new": 50, "seconds": 0.05},
        )
        for prompt, new in ((128, 512), (4096, 1024), (32768, 4096))
    ]


def _overhead() -> list[Row]:
    return [
        Row(
            "compile",
            "8 layers, hidden 256",
            "overhead:compile_times",
            {"layers": 8},
            "the second process generates the first one's tokens",
            quick={"layers": 1},
            limit_s=400,
        ),
        Row(
            "overhead",
            "80 %",
            "overhead:host",
            {"shape": "overhead", "sparsity": 0.8},
            _DECODE_GATE,
            quick={"shape": "tiny", "seconds": 0.05},
            limit_s=300,
        ),
    ]


def _phases() -> list[Row]:
    return [
        Row(
            "phases",
            policy,
            "phases:step_by_budget",
            {"policy": policy, "shares": [0.5, 0.25], "prompt": 900, "new": 64},
            "the tokens that the same policy gives with everything on the device",
            quick={"shares": [0.5], "prompt": 300, "new": 8, "rounds": 1},
            limit_s=400,
        )
        for policy in ("swa", "dense")
    ]


def _recompute() -> list[Row]:
    return [
        Row(
            "recompute",
            "swa",
            "recompute:within_equal_budgets",
            {"batch": 2, "prompt": 500, "new": 48, "layers": 2, "hidden": 512, "heads": 8},
            "the tokens that the same policy gives with everything on the device",
            quick={"prompt": 400, "new": 8, "layers": 2, "hidden": 128, "heads": 4, "rounds": 1},
            limit_s=300,
        )
    ]


def _decode() -> list[Row]:
    inductor = ["hf dynamic, Inductor", "hf static, Inductor"]
    grid = [
        (2048, 1, []),
        (32768, 1, []),
        (2048, 4, inductor),
        (32768, 4, inductor),
        (2048, 16, inductor),
        (32768, 16, [*inductor, "hf quantized fp8"]),
    ]
    rows = [
        Row(
            "decode",
            f"{tokens // 1024}k, batch {batch}",
            "decode:side_by_side",
            {"shape": "small", "tokens": tokens, "batch": batch, "left_out": left_out},
            _DECODE_GATE,
            quick=_TINY,
            limit_s=400,
        )
        for tokens, batch, left_out in grid
    ]
    phase_one = Row(
        "phase-1",
        "2k, batch 1",
        "decode:phase_one",
        {"shape": "small", "tokens": 2048, "batch": 1},
        _DECODE_GATE,
        quick=_TINY,
        limit_s=300,
    )
    fixed = Row(
        "fixed-rows",
        "4k to 32k",
        "decode:fixed_rows",
        {"shape": "small", "lengths": [4096, 8192, 16384, 32768], "max_rows": 512},
        _DECODE_GATE,
        quick={"shape": "tiny", "lengths": [256, 512], "max_rows": 32, "seconds": 0.05},
        limit_s=300,
    )
    llama = [
        Row(
            "llama-1b",
            f"16k, batch {batch}",
            "decode:of_ceiling",
            {"shape": "llama-3.2-1b", "tokens": 16384, "batch": batch, "left_out": left_out},
            _DECODE_GATE,
            quick=_TINY,
            limit_s=600,
        )
        for batch, left_out in ((1, inductor[:1]), (4, inductor))
    ]
    return [phase_one, *rows, fixed, *llama]


def _paper() -> list[Row]:
    return [
        Row(
            "paper",
            f"batch {batch}",
            "paper:workload",
            {
                "batch": batch,
                "prompt": 128,
                "new": 512,
                "layers": 2,
                "hidden": 256,
                "heads": 4,
                "device_share": 0.5,
                "left_out": left_out,
            },
            "the first 32 tokens of alisa at sparsity 0, and of both other schedulers, are those of stock transformers",
            quick={"prompt": 200, "new": 8, "layers": 4, "hidden": 64, "batch": min(batch, 4)},
            limit_s=400,
        )
        for batch, left_out in ((4, []), (16, []), (64, ["hf quantized fp8"]))
    ]


def all_rows() -> list[Row]:
    """In the order of the tables."""
    return [
        *_attention(),
        *_select(),
        *_move(),
        *_planner(),
        *_overhead(),
        *_phases(),
        *_recompute(),
        *_decode(),
        *_paper(),
    ]
