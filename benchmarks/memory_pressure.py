"""What less device memory costs: `generate` with all of the KV cache on the device, with part of it, and with disk.

All settings of a policy run in this process in alternating rounds, compiled by Inductor, on the embedded novel-7m. No
time is printed unless a setting gives the tokens that the same policy gives with everything on the device. The
prediction is the plan's, from this machine's profile, which was measured at other shapes; the floor is the time that
the step's bytes take at the profile's bandwidth.

    python -m benchmarks.memory_pressure [--rounds 3] [--prompt 900] [--new 100] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import alisa_compile
from alisa_compile.backend import alisa
from alisa_compile.runtime.profile import MachineProfile, measure, profile_path
from benchmarks.machine import machine_line

ASSETS = Path(__file__).parent / "assets"
LIMIT = 1.03  # of an unlimited budget, where everything fits
NEAR = 0.25  # prediction against measurement

POLICIES: dict[str, dict[str, Any]] = {
    "swa": {},
    "churn": {"policy": "churn"},
    "dense": {"sparsity": 0.0},
}
ROW_BYTES, LAYERS = 1024, 8  # of novel-7m in float32


@dataclasses.dataclass
class Setting:
    """One policy under one set of budgets."""

    policy: str
    name: str
    model: Any
    step_ms: list[float]


def budgets_of(capacity: int) -> dict[str, dict[str, Any]]:
    """Options by setting; `unlimited` comes first."""
    kv = capacity * LAYERS * ROW_BYTES
    return {
        "unlimited": {},
        "fits": {"device_kv_budget": int(1.1 * kv)},
        "quarter on device": {"device_kv_budget": kv // 4},
        "quarter on device, rest mostly on disk": {
            "device_kv_budget": kv // 4,
            "host_kv_budget": kv // 4,
            "disk_kv_budget": kv,
        },
    }


def run(setting: Setting, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Generate once; the decode steps' milliseconds are kept."""
    out: torch.Tensor = setting.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    setting.step_ms.append(alisa_compile.report(setting.model).to_dict()["step_ms"]["p50"])
    return out


def row_of(setting: Setting, unlimited_ms: float, profile: MachineProfile, new_tokens: int) -> dict[str, Any]:
    """One row of the table."""
    report = alisa_compile.report(setting.model).to_dict()
    measured, predicted = statistics.median(setting.step_ms), report["predicted_step_ms"]
    moved = report["bytes_moved"]
    up = moved["host_to_device"] / new_tokens
    return {
        "policy": setting.policy,
        "budget": setting.name,
        "p50_ms": measured,
        "of_unlimited": measured / unlimited_ms,
        "predicted_ms": predicted,
        "measured_of_predicted": None if predicted is None else measured / predicted,
        "up_KiB_a_step": up / 1024,
        "floor_ms": 1e3 * up / float(profile.host_to_device.at(ROW_BYTES)),
        "disk_read_KiB_a_step": moved["disk_read"] / new_tokens / 1024,
        "device_MiB": report["peak_bytes"]["device"] / 2**20,
        "phases": "+".join(phase["phase"] for phase in report["phases"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=900)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "novel-7m", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "novel-7m")
    text = (ASSETS / "moby-dick-excerpt.txt").read_text(encoding="utf-8")
    prompt = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : arguments.prompt]
    profile = measure(model.device, model.dtype)
    profile.save(profile_path(model.device, model.dtype))
    rows = []
    for policy, options in POLICIES.items():
        settings = []
        for name, budgets in budgets_of(arguments.prompt + arguments.new).items():
            compiled = torch.compile(model, backend=alisa, options={**options, **budgets})
            settings.append(Setting(policy, name, compiled, []))
        expected = run(settings[0], prompt, arguments.new)
        for setting in settings[1:]:
            if not torch.equal(run(setting, prompt, arguments.new), expected):
                raise SystemExit(f"{policy}, {setting.name}: other tokens than with everything on the device")
        for setting in settings:
            setting.step_ms.clear()  # the first run compiles
        for _ in range(arguments.rounds):
            for setting in settings:
                run(setting, prompt, arguments.new)
        unlimited = statistics.median(settings[0].step_ms)
        rows += [row_of(setting, unlimited, profile, arguments.new) for setting in settings]
    print(machine_line())
    print(f"novel-7m, float32, prompt {arguments.prompt}, {arguments.new} new tokens; {arguments.rounds} rounds")
    print(tabulate(rows, headers={name: name.replace("_", " ") for name in rows[0]}, floatfmt=".3g"))
    worst = max(row["of_unlimited"] for row in rows if row["budget"] == "fits")
    print(f"everything fits: at most {worst:.3f} x unlimited (limit {LIMIT}): {'met' if worst <= LIMIT else 'NOT met'}")
    ratios = [row["measured_of_predicted"] for row in rows if row["measured_of_predicted"] is not None]
    near = [ratio for ratio in ratios if abs(ratio - 1) <= NEAR]
    print(f"measured within {NEAR:.0%} of predicted: {len(near)} of {len(ratios)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
