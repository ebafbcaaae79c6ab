"""The package as a whole, in processes of its own: what importing it does, by name, and without transformers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import alisa_compile

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, folder: Path) -> str:
    """Standard output of a script in a fresh interpreter started in `folder`, which Python then searches first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_backend_by_name_needs_no_import_of_ours() -> None:
    """The entry point alone: a script that never imports us generates through us.

    It runs where the top-level links are in reach: they must stay unused (but transformers looks into `kernels`).
    """
    out = run(
        """
        import sys, torch, transformers
        assert "alisa_compile" not in sys.modules
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, eos_token_id=None, pad_token_id=0)
        torch.manual_seed(0)
        stock = transformers.AutoModelForCausalLM.from_config(config).eval()
        ids = torch.randint(2, 60, (1, 9))
        expected = stock.generate(ids, max_new_tokens=4, do_sample=False)
        model = torch.compile(stock, backend="alisa", options={"sparsity": 0.0, "inner_compiler": "eager"})
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        import alisa_compile
        report = alisa_compile.report(model).to_dict()
        assert report["rewritten"] == {"prefill": 1, "decode": 1}, report
        taken = [name for name in sys.modules if name.split(".")[0] in ("passes", "runtime")]
        assert not taken, taken
        assert "alisa" in torch._dynamo.list_backends()
        print("good")
        """,
        ROOT,
    )
    assert out.endswith("good\n")


def test_without_transformers(tmp_path: Path) -> None:
    """transformers missing: plain modules compile under the backend; what needs it says so, the rest does nothing."""
    out = run(
        """
        import sys
        sys.modules["transformers"] = None  # importing it raises ModuleNotFoundError
        import torch
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        model = torch.compile(module, backend="alisa", options={"inner_compiler": "aot_eager"})
        x = torch.ones(2, 3)
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x))
        assert not hasattr(model, "generate")

        import alisa_compile
        from alisa_compile import AlisaConfig, AlisaError
        alisa_compile.disable(), alisa_compile.enable(), alisa_compile.release(model)
        for use in (lambda: alisa_compile.report(model), lambda: alisa_compile.AlisaCache):
            try:
                use()
            except AlisaError as error:
                print(error)
            else:
                raise SystemExit("no error")
        print("good")
        """,
        tmp_path,
    )
    report, cache, good = out.splitlines()
    assert report.startswith("there is nothing to report for this model; got: OptimizedModule")
    assert cache == "AlisaCache needs transformers; to fix: pip install 'alisa-compile[hf]'"
    assert good == "good"


def test_public_names() -> None:
    """Everything in `__all__` exists; nothing else is promised; unknown names are an AttributeError."""
    for name in alisa_compile.__all__:
        assert getattr(alisa_compile, name) is not None
    assert {"AlisaCache", "AlisaConfig", "disable", "release", "report"} <= set(alisa_compile.__all__)
    assert not hasattr(alisa_compile, "no_such_name")


def test_version_is_that_of_the_project() -> None:
    """`__version__`, pyproject.toml and the installed metadata agree."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert found is not None and found[1] == alisa_compile.__version__
    assert importlib.metadata.version("alisa-compile") == alisa_compile.__version__


def test_private_names_stay_in_compat() -> None:
    """Only compat.py may import a private name of torch or transformers."""
    private = re.compile(r"^\s*(from|import) (torch|transformers)\.(\w+\.)*_\w+", re.MULTILINE)
    offenders = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "alisa_compile").rglob("*.py"))
        if path.name != "compat.py" and private.search(path.read_text(encoding="utf-8"))
    ]
    assert not offenders
