"""What a developer can see of a compilation: ALISA_DEBUG_DIR, torch's structured trace (tlparse), and the debug log.

`ALISA_DEBUG_DIR=folder` makes a numbered folder for each graph: its text before and after each pass, `passes.json`,
`plan.json` where the step was planned, and `repro.py`, which repeats a compilation that failed.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import logging
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import compat
from .passes import fuel
from .passes.base import example
from .passes.record import GraphRecord, recording
from .runtime.forecast import Forecast

logger = logging.getLogger(__name__)

#: Variables that decide how a graph is compiled; folders and logs of this machine are none of them.
_SETTINGS = re.compile(r"(ALISA|TORCHINDUCTOR|TORCHDYNAMO|AOT|TRITON)_\w+|CC|CXX")
_NO_SETTINGS = re.compile(r"ALISA_(DEBUG_DIR|FUEL)|\w*(_DIR|_DIRS|_PATH|_HOST|_TOKEN|_KEY|_PASSWORD|_SECRET)")


@contextlib.contextmanager
def published(
    gm: fx.GraphModule, stage: str, mode: str | None, options: dict[str, Any] | None
) -> Iterator[Path | None]:
    """Around the compilation of Dynamo's graph `gm`: what the passes do goes to whoever asked for it.

    Yields this graph's folder under ALISA_DEBUG_DIR, if there is one.
    """
    top = os.environ.get("ALISA_DEBUG_DIR")
    folder = _new_folder(Path(top), stage) if top else None
    if folder is None and not compat.is_tracing_structured() and not logger.isEnabledFor(logging.DEBUG):
        yield None
        return
    used = fuel.used()
    with recording() as records:
        try:
            yield folder
        except Exception as error:
            if folder is not None:
                _write_repro(folder, gm, mode, options, used, error)
            raise
        finally:
            for record in records:
                _publish(record, folder)


def publish_plan(forecasts: Sequence[Forecast | None], folder: Path | None) -> None:
    """The plan of the generation that a graph is first called in, if there is one. forecasts: of its stores."""
    if folder is None and not compat.is_tracing_structured():
        return  # making a plan takes a while
    plan = next((forecast.plan for forecast in forecasts if forecast is not None), None)
    if plan is None:
        return
    if folder is not None:
        (folder / "plan.json").write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
    compat.trace_artifact("alisa_plan", "json", plan.to_dict)


def _new_folder(top: Path, stage: str) -> Path:
    for number in itertools.count():
        folder = top / f"{number:02}_{stage}"
        taken = any(top.glob(f"{number:02}_*"))
        with contextlib.suppress(FileExistsError):  # another process was faster
            if not taken:
                folder.mkdir(parents=True)
                return folder
    raise AssertionError("unreachable")


def _publish(record: GraphRecord, folder: Path | None) -> None:
    diffs = [
        "".join(
            difflib.unified_diff(
                each.before.text().splitlines(keepends=True),
                each.after.text().splitlines(keepends=True),
                each.before.title,
                each.after.title,
                n=1,
            )
        )
        for each in record.passes
    ]
    changed = "".join(diffs)
    for each, text in zip(record.passes, diffs, strict=True):
        logger.debug("%s graph, %s: %d rewrites\n%s", record.stage, each.name, len(each.rewrites), text)
    compat.trace_artifact(f"alisa_passes_{record.stage}", "json", record.to_dict)
    compat.trace_artifact(f"alisa_diff_{record.stage}", "string", lambda: changed)
    if folder is None:
        return
    (folder / "00_dynamo.txt").write_text(record.before.text(), encoding="utf-8")
    for number, (each, text) in enumerate(zip(record.passes, diffs, strict=True), 1):
        if text:
            (folder / f"{number:02}_{each.name}.txt").write_text(each.after.text(), encoding="utf-8")
            (folder / f"{number:02}_{each.name}.diff").write_text(text, encoding="utf-8")
    (folder / "passes.json").write_text(json.dumps(record.to_dict()), encoding="utf-8")


def _write_repro(
    folder: Path, gm: fx.GraphModule, mode: str | None, options: dict[str, Any] | None, used: int, error: Exception
) -> None:
    (folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    try:
        script = repro_script(gm, mode, options, used)
    except Exception as problem:  # the error that is being reported matters more
        logger.error("cannot write a script for the compilation that failed: %s", problem)
        return
    path = folder / "repro.py"
    path.write_text(script, encoding="utf-8")
    logger.error("the compilation failed; `python %s` repeats it", path)


_SCRIPT = '''"""Repeats one compilation that failed. Its inputs have the shapes of the original's, and no values."""

import os

{environment}
import torch
from torch import device, inf, nan, tensor  # noqa: F401  (the graph may use them)

from alisa_compile.backend import alisa
from alisa_compile.compat import mark_dynamic

torch.set_grad_enabled({grad_enabled})

{module}

class Step(torch.nn.Module):
    """The graph with the sizes among its inputs read from its tensors, as Dynamo does."""

    def __init__(self):
        super().__init__()
        self.graph = Repro()

    def forward(self, {parameters}):
        return self.graph({arguments})


def empty(shape, stride, dtype, device, requires_grad, *dynamic):
    value = torch.empty_strided(shape, stride, dtype=dtype, device=device, requires_grad=requires_grad)
    for dim in dynamic:
        mark_dynamic(value, dim)
    return value


inputs = [
{inputs}
]


def backend(gm, example_inputs):
    alisa(gm, example_inputs, mode={mode!r}, options={options!r})
    print("compiled without an error")
    raise SystemExit(0)  # without values there is nothing to run


try:
    torch.compile(Step(), backend=backend)(*inputs)
except Exception as error:  # torch wraps what a backend raises
    raise getattr(error, "inner_exception", error) from None
'''


def repro_script(gm: fx.GraphModule, mode: str | None, options: dict[str, Any] | None, used_fuel: int = 0) -> str:
    """A Python script that compiles Dynamo's graph `gm` again. used_fuel: rewrites before this graph."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    parameters, inputs = [], []
    sizes: dict[Any, str] = {}  # where to read each unknown size
    for node in placeholders:
        value = example(node)
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                sizes.setdefault(compat.symbolic_expression(size), f"{node.name}.shape[{dim}]")
    arguments = []
    for node in placeholders:
        value = example(node)
        known = sizes.get(compat.symbolic_expression(value)) if isinstance(value, torch.SymInt) else None
        arguments.append(known or node.name)
        if known is None:
            parameters.append(node.name)
            inputs.append(f"    {_input(value)},  # {node.name}")
    environment = {
        name: value
        for name, value in os.environ.items()
        if _SETTINGS.fullmatch(name) and not _NO_SETTINGS.fullmatch(name)
    }
    limit = fuel.limit()
    if limit is not None:
        environment["ALISA_FUEL"] = str(max(0, limit - used_fuel))
    return _SCRIPT.format(
        environment="".join(f"os.environ.setdefault({n!r}, {v!r})\n" for n, v in sorted(environment.items())),
        grad_enabled=torch.is_grad_enabled(),
        module=compat.module_source(gm),
        parameters=", ".join(parameters),
        arguments=", ".join(arguments),
        inputs="\n".join(inputs),
        mode=mode,
        options=options,
    )


def _input(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(compat.traced_size(value) if isinstance(value, torch.SymInt) else value)
    shape, stride = (tuple(map(compat.traced_size, sizes)) for sizes in (value.shape, value.stride()))
    dynamic = "".join(f", {dim}" for dim, size in enumerate(value.shape) if not isinstance(size, int))
    return f"empty({shape}, {stride}, {value.dtype}, {str(value.device)!r}, {value.requires_grad}{dynamic})"
