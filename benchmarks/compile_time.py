"""Cold and warm compile time of a 16-layer model's first `generate`, each in a fresh process.

    python -m benchmarks.compile_time [--layers 16] [--recording] [--json FILE]

The first process starts with an empty cache folder, the second with what the first left. Counted from the call of
`generate` to its end (two new tokens), so tracing, passes, Inductor and the C++ compiler are all in it. With
--recording both start with an empty one, and the second records what the passes do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLD_LIMIT_S, WARM_LIMIT_S = 120, 25
RECORDING_LIMIT = 1.15  # of a cold compilation


def run_once(layers: int, *, recording: bool = False) -> dict[str, Any]:
    """In a process of its own: compile and generate, with one line of progress per graph."""
    import torch
    import transformers as hf
    from torch._dynamo.utils import counters
    from transformers.utils import logging

    from alisa_compile import backend, record

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096, max_position_embeddings=4096, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = torch.compile(hf.LlamaForCausalLM(config).eval(), backend="alisa")
    graphs: list[str] = []
    backend.compile_start_listeners.append(lambda stage: print(f"compiling the {stage} graph ...", file=sys.stderr))
    backend.compile_listeners.append(
        lambda row: print(f"  {row.stage}: {row.rewritten} layers, {row.seconds:.1f} s", file=sys.stderr)
    )
    backend.compile_listeners.append(lambda row: graphs.append(row.stage))
    started = time.perf_counter()
    with record() if recording else contextlib.nullcontext():
        out = model.generate(torch.randint(1, 4096, (1, 64)), max_new_tokens=3, do_sample=False)
    return {
        "seconds": time.perf_counter() - started,
        "graphs": graphs,
        "fx_cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "fx_cache_misses": counters["inductor"]["fxgraph_cache_miss"],
        "aot_cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "tokens": out[0, -3:].tolist(),
    }


def _in_a_process(layers: int, cache: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--child", "--layers", str(layers), *flags]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "HF_HUB_OFFLINE": "1"}
    environment.pop("TORCH_WARM_POOL", None)  # the suite's; a user's process starts the pool
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(layers: int) -> list[dict[str, Any]]:
    """The cold process and the warm one, over one new cache folder."""
    with tempfile.TemporaryDirectory() as cache:
        rows = []
        for name, limit in (("cold", COLD_LIMIT_S), ("warm", WARM_LIMIT_S)):
            print(f"{name} process", file=sys.stderr)
            rows.append({"process": name, **_in_a_process(layers, cache), "limit_s": limit})
    return rows


def measure_recording(layers: int) -> list[dict[str, Any]]:
    """Two cold processes, each with a new cache folder; the second records what the passes do."""
    rows = []
    for name, *flags in (("cold",), ("recording", "--recording")):
        with tempfile.TemporaryDirectory() as cache:
            print(f"{name} process", file=sys.stderr)
            rows.append({"process": name, **_in_a_process(layers, cache, *flags), "limit_s": COLD_LIMIT_S})
    rows[1]["limit_s"] = RECORDING_LIMIT * rows[0]["seconds"]
    return rows


def main() -> None:
    """Measure both and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--recording", action="store_true", help="what it costs to record what the passes do")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_once(arguments.layers, recording=arguments.recording)))
        return
    from benchmarks.machine import machine_line

    rows = (measure_recording if arguments.recording else measure)(arguments.layers)
    if rows[0]["tokens"] != rows[1]["tokens"]:
        raise SystemExit("the second process generated other tokens than the first: no number is printed")
    print(machine_line())
    columns = ("process", "seconds", "limit_s", "fx_cache_misses", "fx_cache_hits", "aot_cache_hits")
    print(tabulate([[row[column] for column in columns] for row in rows], headers=columns, floatfmt=".1f"))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
