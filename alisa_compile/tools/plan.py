"""`alisa plan`: where the rows of a generation would be and how long its steps would take, without weights."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .. import api
from ..errors import AlisaError
from ..runtime.plan import TIERS, Plan
from ..runtime.profile import MachineProfile
from .options import given_options
from .plotting import can_plot, check_plot
from .progress import Progress

_COLORS = {"device": "tab:blue", "host": "tab:orange", "disk": "tab:gray"}
_SHADES = {"I": "white", "II": "whitesmoke", "III": "mistyrose"}


def run(arguments: argparse.Namespace) -> None:
    """Options and files are checked before the machine is measured."""
    options = given_options(arguments)
    check_plot(arguments.plot)
    profile = None if arguments.profile is None else MachineProfile.load(arguments.profile)
    with Progress(quiet=arguments.quiet) as progress:
        drawn = can_plot(arguments.plot, progress)
        progress.stage(f"reading the config of {arguments.model}")
        config = _config(arguments.model)
        progress.stage("planning" if profile else "planning (the first time, this machine's speed is measured)")
        plan = api.plan(
            config,
            batch_size=arguments.batch_size,
            prompt_length=arguments.prompt_length,
            max_new_tokens=arguments.max_new_tokens,
            objective=arguments.objective,
            profile=profile,
            device=arguments.device,
            dtype=None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
            **options,
        )
    if arguments.json:
        print(json.dumps(plan.to_dict()))
    else:
        _print(plan)
    if drawn:
        _plot(plan, f"{Path(arguments.model).name}: {_setting(plan)}", arguments.plot)


def _config(name: str) -> Any:
    """Of a folder or a config.json, without any network, or by a name on the Hub."""
    path = Path(name).expanduser()
    is_local = path.exists()
    if not is_local and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise AlisaError("no such model folder", got=name, expected="a folder, a config.json, or a name on the Hub")
    try:
        return AutoConfig.from_pretrained(str(path) if is_local else name, local_files_only=is_local)
    except Exception as error:  # a bad file, an unknown model type, no network: many types, one meaning here
        text = str(error).strip().split("\n")[0]
        raise AlisaError(
            f"cannot read the config ({type(error).__name__}: {text})",
            got=name,
            expected="a folder, config.json or Hub name of a model that transformers knows",
            fix="--debug shows the whole error",
        ) from error


def _setting(plan: Plan) -> str:
    return f"batch {plan.batch_size}, prompt {plan.prompt_length}, {plan.max_new_tokens} new tokens"


def _print(plan: Plan) -> None:
    width = shutil.get_terminal_size((79, 24)).columns
    print(f"{_setting(plan)}; step 0 is the prefill\n")
    print(plan.table(min(width, 110)))


def _plot(plan: Plan, title: str, path: Path) -> None:
    """Bytes by tier and step time over the steps, phases shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = range(len(plan.step_ms))
    for tier in TIERS:
        sizes = plan.bytes_by_tier[tier]
        if any(sizes):
            upper.plot(steps, [size / 2**30 for size in sizes], label=tier, color=_COLORS[tier])
            if plan.budget_bytes[tier] < 2 * max(sizes):  # a budget far above would flatten everything else
                budget = plan.budget_bytes[tier] / 2**30
                upper.axhline(budget, color=_COLORS[tier], linestyle=":", linewidth=0.8)
    upper.set(ylabel="GiB (dotted: budget)", ylim=(0, None))
    upper.legend(fontsize=8)
    # The prefill is another kind of step, and would hide the others.
    lower.plot(steps[1:], plan.step_ms[1:], color="black", linewidth=0.8, label="step")
    lower.plot(steps[1:], plan.transfer_ms[1:], color="tab:orange", linewidth=0.8, label="of it transfers")
    lower.set(xlabel="step", ylabel="predicted ms", ylim=(0, None))
    lower.legend(fontsize=8)
    for axes in (upper, lower):
        for phase in plan.phases:
            axes.axvspan(phase["first_step"] - 0.5, phase["last_step"] + 0.5, color=_SHADES[phase["phase"]], zorder=-1)
    for phase in plan.phases:
        upper.annotate(phase["phase"], (phase["first_step"], 1.01), xycoords=("data", "axes fraction"), fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
