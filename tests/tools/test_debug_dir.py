"""torch's own channels and ALISA_DEBUG_DIR: what a developer finds after a compilation, and after one that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from alisa_compile import AlisaCache
from alisa_compile.backend import alisa
from alisa_compile.channels import repro_script
from tests.passes.graphs import dynamo_graph
from tests.support import compiled, left_padded, tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALISA_DEBUG_DIR", str(tmp_path / "debug"))
    return tmp_path / "debug"


def test_stages_are_numbered_and_the_plan_is_beside_them(folder: Path) -> None:
    """One folder a graph; a pass that changed nothing has no file; names sort as the passes ran."""
    model = tiny_model("llama")
    ids, mask = left_padded(2, 200)
    candidate = compiled(model, inner="eager", device_kv_budget="100KiB", host_kv_budget="1MiB")
    candidate.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert sorted(path.name for path in folder.iterdir()) == ["00_prefill", "01_decode"]
    decode = folder / "01_decode"
    names = sorted(path.name for path in decode.iterdir())
    assert [name.partition("_")[2] for name in names if name.endswith(".txt")] == [
        "dynamo.txt",
        "alisa_fold_eager_attention.txt",  # it also drops what the model left without users
        "alisa_fold_repeated_heads.txt",
        "alisa_rewrite_attention.txt",
    ]
    diff = next(decode.glob("*_alisa_rewrite_attention.diff")).read_text()
    assert "-kv_read_tiered = alisa.kv_read.tiered(store.pool" in diff
    assert "+swa_attention_tiered = alisa.swa_attention.tiered(q_embed, store.pool" in diff
    passes = json.loads((decode / "passes.json").read_text())
    assert [row["layer"] for each in passes["passes"] for row in each["rewrites"]] == [0, 1, 0, 1]
    plan = json.loads((decode / "plan.json").read_text())
    assert plan["max_new_tokens"] >= 3 and len(plan["step_ms"]) > 1
    assert not list(folder.rglob("repro.py"))


def _twice(cache: Any, states: torch.Tensor) -> torch.Tensor:
    """Appends to one layer twice, which breaks a rule that ALISA_CHECK=1 checks."""
    keys, values = cache.update(states, states, 0)
    keys, values = cache.update(states, states, 0)
    return F.scaled_dot_product_attention(states, keys, values)


def _failing_checks(**_: Any) -> None:
    model = tiny_model("llama", layers=1)
    cache = AlisaCache(model.config)
    cache.allocate(1, capacity=32, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.compile(_twice, backend=alisa, options={"inner_compiler": "eager"})(cache, torch.randn(1, 2, 3, 16))


def _failing_compiler(dynamic: bool = True) -> None:
    function = torch.compile(lambda x: (x[:, None] + x.shape[0]).relu(), backend=alisa, mode="fastest", dynamic=dynamic)
    function(torch.randn(7, 5))


@pytest.mark.parametrize(
    ("fail", "message"),
    [(_failing_checks, "appended to 2 times"), pytest.param(_failing_compiler, "fastest", marks=pytest.mark.slow)],
)
def test_a_failing_compilation_leaves_a_script_that_fails_the_same_way(folder: Path, fail: Any, message: str) -> None:
    """In a process of its own, which knows nothing but the script: same type, same message."""
    with pytest.raises(Exception, match=message) as failure:
        fail()
    original = failure.value.inner_exception
    (script,) = folder.rglob("repro.py")
    assert message in (script.parent / "error.txt").read_text()
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TORCHINDUCTOR_CACHE_DIR") if name in os.environ}
    command = [sys.executable, str(script)]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=script.parent)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    kind, _, text = last.partition(": ")
    assert kind.rpartition(".")[2] == type(original).__name__
    # A traced graph names its inputs after the variables they are read from.
    assert [word for word in text.split() if not word.startswith("l_")] == [
        word for word in str(original).split() if not word.startswith("l_")
    ]


def test_a_script_keeps_sizes_unknown_that_were(tmp_path: Path) -> None:
    """The graph that it compiles again has the symbols of the original: none has become a number."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.expand(y.shape[0], -1) + torch.arange(x.shape[1]) + y

    graph = dynamo_graph(function, torch.randn(1, 6), torch.randn(4, 6))
    script = repro_script(graph, None, {"inner_compiler": "eager"})
    caught: list[Any] = []
    script = script.replace('print("compiled without an error")', "caught.append(gm)")
    with pytest.raises(SystemExit):
        exec(compile(script, "repro.py", "exec"), {"caught": caught})
    symbols = [
        {
            str(size)
            for n in g.graph.nodes
            for size in getattr(n.meta.get("example_value"), "shape", ())
            if not isinstance(size, int)
        }
        for g in (graph, caught[0])
    ]
    assert len(symbols[0]) == len(symbols[1]) > 0


def test_tlparse_and_torch_logs_show_passes_and_plan(tmp_path: Path) -> None:
    """A reader of the structured trace finds our artifacts, each readable; `TORCH_LOGS` takes the module's name."""
    script = (
        "import torch\n"
        "from alisa_compile.runtime.profile import profile_path\n"
        "from tests.runtime.test_placer import PROFILE\n"
        "from tests.support import compiled, left_padded, tiny_model\n"
        "PROFILE.save(profile_path(torch.device('cpu'), torch.float32))\n"  # without one there is no plan
        "ids, mask = left_padded(2, 200)\n"
        "model = compiled(tiny_model('llama'), inner='eager', device_kv_budget='100KiB', host_kv_budget='1MiB')\n"
        "model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)\n"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "TORCH_LOGS": "+alisa_compile", "PYTHONPATH": str(ROOT)}
    environment["ALISA_CACHE_DIR"] = str(tmp_path / "profiles")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = tmp_path.glob("*.log")
    artifacts = _artifacts(log)
    assert artifacts.keys() >= {"alisa_passes_prefill", "alisa_passes_decode", "alisa_diff_decode", "alisa_plan"}
    passes = json.loads(artifacts["alisa_passes_decode"])
    assert [row["layer"] for each in passes["passes"] for row in each["rewrites"]] == [0, 1, 0, 1]
    assert "+kv_wait_default = alisa.kv_wait.default" in artifacts["alisa_diff_decode"]
    assert json.loads(artifacts["alisa_plan"])["phases"]
    assert "decode graph, alisa_rewrite_attention: 2 rewrites" in done.stderr


def _artifacts(log: Path) -> dict[str, str]:
    """As tlparse reads them: a line of metadata ends in JSON, and its payload is the lines after it behind tabs."""
    found: dict[str, str] = {}
    name = None
    for line in log.read_text().splitlines():
        if line.startswith("\t"):
            if name is not None:
                found[name] += line[1:] + "\n"
            continue
        metadata = json.loads(line[line.index("{") :])
        name = metadata.get("artifact", {}).get("name")
        if name is not None:
            found[name] = ""
    return found
