"""A second process finds the compiled code, which works there; another version of the package does not find it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alisa_compile import compat
from alisa_compile.passes import pipeline
from alisa_compile.passes.uuid import package_fingerprint

ROOT = Path(__file__).resolve().parent.parent

# Generates twice with one model; the second time on the store that the first has filled and reset.
SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(1)
import alisa_compile
from torch._dynamo.utils import counters
from tests.support import compiled, left_padded, tiny_model

options = json.loads(sys.argv[1])
layers = options.pop("layers")
stock = tiny_model("llama", layers=layers)
model = compiled(stock, inner="inductor", **options)
ids, mask = left_padded(2, 9)
started = time.perf_counter()
tokens = [model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False).tolist() for n in (3, 24)]
seconds = time.perf_counter() - started
expected = stock.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False).tolist()
print(json.dumps({
    "package": alisa_compile.__file__,
    "tokens": tokens,
    "expected": expected,
    "seconds": seconds,
    "report": alisa_compile.report(model).to_dict(),
    "inductor": dict(counters["inductor"]),
    "aot": dict(counters["aot_autograd"]),
}))
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a process reports."""

    data: dict[str, Any]

    def caches(self) -> dict[str, int]:
        """Hits, misses and bypasses of both caches, zeros left out."""
        names = [("inductor", f"fxgraph_cache_{kind}") for kind in ("hit", "miss", "bypass")]
        names += [("aot", f"autograd_cache_{kind}") for kind in ("hit", "miss", "bypass")]
        return {name: self.data[part][name] for part, name in names if self.data[part].get(name)}


def _run(cache: Path, root: Path = ROOT, **options: Any) -> Run:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("ALISA_CHECK", None)
    command = [sys.executable, "-c", SCRIPT, json.dumps({"layers": 1, **options})]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(json.loads(done.stdout.splitlines()[-1]))
    assert Path(run.data["package"]).is_relative_to(root)
    print(f"{options}: {run.data['seconds']:.1f} s, {run.caches()}")
    return run


COLD = {"fxgraph_cache_miss": 2, "autograd_cache_miss": 2}
WARM = {"fxgraph_cache_hit": 2, "autograd_cache_hit": 2}


def _copy_of_the_package(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("alisa_compile", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def _compare(first: Run, second: Run) -> None:
    """The second process found both graphs and computed the same with them."""
    assert (first.caches(), second.caches()) == (COLD, WARM)
    assert first.data["tokens"] == second.data["tokens"]
    assert second.data["report"]["rewritten"] == {"prefill": 1, "decode": 1}
    assert second.data["report"]["tokens"] == 9 + 23
    assert second.data["seconds"] < first.data["seconds"]


def test_a_second_process_compiles_nothing_and_another_version_everything(tmp_path: Path) -> None:
    """Two misses; two hits in a fresh process; two misses again after one more comment in a Triton kernel's file.

    The tokens after the hits are stock's, over two runs on one store, so the cached code mutates the store in place
    and reads what it wrote.
    """
    root, cache = _copy_of_the_package(tmp_path / "root"), tmp_path / "cache"
    first, second = (_run(cache, root, sparsity=0.0) for _ in range(2))
    _compare(first, second)
    assert second.data["tokens"][1] == second.data["expected"]
    with (root / "alisa_compile/kernels/swa_attention/triton.py").open("a") as file:
        file.write("# another version\n")
    third = _run(cache, root, sparsity=0.0)
    assert third.caches() == COLD
    assert third.data["tokens"] == first.data["tokens"]


def test_every_kernel_and_lowering_is_in_the_key(tmp_path: Path) -> None:
    """What Inductor's key gets of this package changes with each file that a graph's code may come from."""
    root = tmp_path / "alisa_compile"
    shutil.copytree(ROOT / "alisa_compile", root, ignore=shutil.ignore_patterns("__pycache__"))
    before = package_fingerprint(root)
    files = [*root.glob("kernels/*/triton.py"), *root.glob("kernels/*.py"), *root.glob("kernels/**/*.cpp")]
    assert root / "kernels/inlining.py" in files and len({path.parent for path in files}) > 8
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        assert package_fingerprint(root) != before, path
        path.write_bytes(content)
    assert package_fingerprint(root) == before


def test_inductor_asks_for_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that carries the fingerprint is among the options that every graph of ours is compiled with."""
    patches: list[dict[str, Any]] = []

    def compile_inductor(gm: Any, inputs: Any, mode: Any, options: dict[str, Any]) -> Any:
        patches.append(options)
        return gm.forward

    monkeypatch.setattr(compat, "compile_inductor", compile_inductor)
    x = torch.ones(3)
    assert torch.equal(torch.compile(lambda x: x + 1, backend="alisa")(x), x + 1)
    present = patches[0]["post_grad_custom_post_pass"]
    passes = present if isinstance(present, tuple) else (present,)
    assert package_fingerprint(extra=pipeline.identity()) in [each.uuid() for each in passes]


@pytest.mark.slow
def test_a_sparse_int8_store_works_from_the_cache(tmp_path: Path) -> None:
    """The same with scores, index sets and scales to mutate."""
    _compare(*(_run(tmp_path, sparsity=0.8, kv_dtype="int8") for _ in range(2)))


@pytest.mark.slow
def test_sixteen_layers_start_quickly(tmp_path: Path) -> None:
    """A 16-layer model: at most 120 s cold, at most 25 s in a second process, on 2 cores."""
    first, second = (_run(tmp_path, layers=16) for _ in range(2))
    assert (first.caches(), second.caches()) == (COLD, WARM)
    assert first.data["seconds"] <= 120
    assert second.data["seconds"] <= 25
