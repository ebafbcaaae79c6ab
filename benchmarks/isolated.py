"""One row in a process of its own: a time limit, a memory limit, and an end that no row can keep from the others."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.registry import Row

_SPARE_MEMORY = 1 << 30  # left to the rest of the system
_GRACE_S = 10  # to end, once the result is there


def run(row: Row, quick: bool, limit_s: float | None = None) -> dict[str, Any]:
    """`status` (`ok`, `gate`, `error`, `time`, `died`) with its `reason`, or with what the row's function returned."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preloaded"])
    limit_s = row.limit_s if limit_s is None else limit_s
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(row.work, row.arguments(quick), sender), daemon=False)
    started = time.perf_counter()
    process.start()
    sender.close()
    try:
        result = _receive(receiver, limit_s)
        process.join(0 if result is None else _GRACE_S)
    finally:
        receiver.close()
        if process.is_alive():
            process.kill()
        process.join()
    if result is None:
        result = {"status": "time", "reason": f"not done after {limit_s:.0f} s"}
    elif not result:
        code = process.exitcode
        result = {"status": "died", "reason": f"its process ended with {code}" + (" (killed)" if code == -9 else "")}
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def _receive(receiver: Connection, limit_s: float) -> dict[str, Any] | None:
    """None where the time is over, {} where the process has ended without a word."""
    if not receiver.poll(limit_s):
        return None
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        return {}
    return result


def _work(work: str, arguments: dict[str, Any], sender: Connection) -> None:
    """In the row's process. What it prints goes nowhere: the table says what there is to say."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    # Inductor starts processes that compile Triton, which each import torch beside what is measured.
    os.environ.setdefault("TORCH_WARM_POOL", "0")
    from benchmarks.machine import machine_line
    from benchmarks.memory import available_bytes, limit_process
    from benchmarks.outcome import GateFailed

    with contextlib.suppress(ValueError, OSError):  # a limit of the system's own is lower
        limit_process(available_bytes() - _SPARE_MEMORY)
    module, function = work.split(":")
    try:
        outcome = getattr(importlib.import_module(f"benchmarks.rows.{module}"), function)(**arguments)
        result = {"status": "ok", **outcome.to_dict()}
    except GateFailed as failure:
        result = {"status": "gate", "reason": str(failure)}
    except BaseException as error:
        text = " ".join(str(error).split())
        result = {"status": "error", "reason": f"{type(error).__name__}: {text[:300]}"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send({**result, "machine": machine_line(), "process_bytes": peak})
    sender.close()
