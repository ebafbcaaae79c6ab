"""`alisa diff`: what each pass did to a model's graphs."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..api import report
from ..backend import alisa
from ..errors import AlisaError
from ..passes.record import GraphRecord, recording
from .diff_text import wants_color
from .graph_diff import WIDTH, diff
from .loading import load
from .options import given_options
from .progress import Progress


def run(arguments: argparse.Namespace) -> None:
    """Generate two tokens after a short prompt: every graph goes through the passes, none to Inductor."""
    options = {"inner_compiler": "eager", **given_options(arguments)}
    for path in (arguments.html, arguments.dot):
        if path is not None and not path.parent.is_dir():
            raise AlisaError("there is no such folder", got=path.parent, fix="create it, or write elsewhere")
    with Progress(quiet=arguments.quiet) as progress:
        progress.stage(f"loading {arguments.model}")
        loaded = load(arguments.model, arguments.dtype, arguments.device)
        records = record_graphs(loaded.model, options, arguments.prompt_tokens, loaded.padding())
    chosen = _chosen(records, arguments.stage)
    found = diff(chosen, pass_name=arguments.pass_name, layer=arguments.layer)
    if arguments.html is not None:
        from .diff_html import page

        _write(arguments.html, page([diff(record) for record in records], title=Path(arguments.model).name))
    if arguments.dot is not None:
        _write(arguments.dot, found.to_dot())
    if arguments.json:
        print(json.dumps(found.to_dict()))
    elif arguments.explain:
        from .advice import explain

        sys.stdout.write(explain(records, width=_width()))
    elif arguments.html is None and arguments.dot is None:
        sys.stdout.write(found.text(color=wants_color(), width=max(WIDTH, _width())))


def record_graphs(
    model: Any, options: dict[str, Any], prompt_tokens: int, padding: dict[str, int]
) -> list[GraphRecord]:
    """The graphs of one `generate` call: the prompt's and that of a decode step."""
    room = model.config.get_text_config().vocab_size
    tokens = (torch.arange(prompt_tokens, device=model.device) % room).unsqueeze(0)
    compiled: Any = torch.compile(model, backend=alisa, options=options)
    with recording() as records:
        compiled.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            **padding,
        )
    if not records:
        reasons = "; ".join(dict.fromkeys(row.reason for row in report(compiled).skipped))
        raise AlisaError("alisa leaves this model alone, so there is no graph to show", got=reasons)
    return records


def _chosen(records: list[GraphRecord], stage: str) -> GraphRecord:
    """The first graph of a stage."""
    for record in records:
        if record.stage == stage:
            return record
    present = ", ".join(dict.fromkeys(record.stage for record in records))
    raise AlisaError(f"there is no {stage} graph", expected=f"one of {present}", fix=f"give --stage {records[0].stage}")


def _width() -> int:
    return shutil.get_terminal_size((WIDTH, 24)).columns


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AlisaError(f"cannot write the file: {error.strerror}", got=path) from error
    print(f"wrote {path}", file=sys.stderr)
