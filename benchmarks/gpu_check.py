"""What alisa does on an NVIDIA GPU, in under 8 minutes: its GPU tests, its kernels against the memory's limits, models.

Rows run in order of importance. Each has a time budget and its own `try`: a row that fails is a row with its error, and
the others go on; what no time is left for says so. On a GPU rows run in a process of their own, which is replaced when
a row ends it, hangs in it, or leaves the GPU's context dead. Kernels are timed only after their results have been
compared with the plain-torch references. Models have random weights: their step times do not depend on them.

    python -m benchmarks.gpu_check [--minutes 8] [--only NAME] [--json FILE] [--dry]

Writes `benchmarks/results/<gpu>-<date>.json` after each row, and `python -m benchmarks.readme` its table into the
README. `--dry` runs every row on the CPU with tiny shapes, to see that it runs; its numbers mean nothing, and it writes
none.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import transformers as hf
from tabulate import tabulate

import alisa_compile
from alisa_compile.config import AlisaConfig
from alisa_compile.kernels.cuda_transfers import HostMemory
from alisa_compile.kernels.quantize_row import quantize_row
from alisa_compile.kernels.swa_attention.reference import swa_attention as attention_reference
from alisa_compile.runtime.policies import selection_spec
from alisa_compile.runtime.tiers import Pool, RowForm, RowShape, Tier
from benchmarks.machine import machine_line
from benchmarks.results_file import write_whole

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).resolve().parent.parent
DECODE_SHARE = 0.85  # of the measured copy bandwidth, on the bytes of the working set
GATHER_SHARE = 0.80  # of the measured copy from pinned memory, for rows of 256 B and more
SELECT_SHARE = 0.05  # of a decode step, at 32k tokens
PHASE_ONE = 0.03  # more time than without tiers, while everything fits
GRACE = 20.0  # seconds over its budget after which a row is killed
RESTART = 75  # exit status: the rows that are left need another process
ops = torch.ops.alisa


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    device: torch.device
    dtype: torch.dtype
    copied_bytes: int
    tokens: int
    layers: int  # of the kernel benchmarks, rotated so that rows come from memory
    repeats: int
    batches: tuple[int, ...]
    shares: tuple[float, ...]  # of the dense KV bytes, on the device
    opt_batches: tuple[int, ...]
    opt_prompt: int
    opt_new: int
    steps: int
    llama: dict[str, int]
    opt: dict[str, int]


GPU = Setting(
    torch.device("cuda"), torch.bfloat16, 1 << 30, 32768, 8, 20, (1, 8), (1.0, 0.5, 0.2), (4, 16, 64), 128, 512, 24,
    {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    {
        "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
    },
)  # fmt: skip
DRY = Setting(
    torch.device("cpu"), torch.float32, 1 << 16, 320, 2, 2, (1,), (1.0, 0.2), (2,), 200, 12, 6,
    {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    {
        "vocab_size": 64, "hidden_size": 128, "ffn_dim": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
        "word_embed_proj_dim": 128,
    },
)  # fmt: skip

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. seconds: its time budget. goal: on one of its values, and whether that meets it."""

    name: str
    seconds: float
    run: Callable[[Setting], Values]
    goal: tuple[str, Callable[[float], bool]] | None = None


class _NeedsGpuError(Exception):
    """A row that the CPU cannot run."""


class _OutOfTimeError(Exception):
    """The budget of a row is spent."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise inside when the time is over; as soon as Python runs again."""

    def interrupt(*_: object) -> None:
        raise _OutOfTimeError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Kernels.


def _seconds(setting: Setting, work: Callable[[int], Any]) -> float:
    """Median time of `work(i)`, called for i = 0, 1, 2 and so on, after as many calls to warm up."""
    times = []
    for i in range(setting.repeats):
        work(i)
    _synchronize(setting.device)
    for i in range(setting.repeats):
        if setting.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work(i)
            end.record()
            times.append((start, end))
        else:
            begin = time.perf_counter()
            work(i)
            times.append(time.perf_counter() - begin)
    _synchronize(setting.device)
    if setting.device.type == "cuda":
        times = [start.elapsed_time(end) / 1e3 for start, end in times]
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(setting: Setting) -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.ones(setting.copied_bytes, dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(setting, lambda _: target.copy_(source))


def _copy_bandwidth(setting: Setting) -> Values:
    return {"GB/s": copy_bandwidth(setting) / 1e9}


def decode_attention(setting: Setting, batch: int, is_int8: bool) -> Values:
    """`swa_attention` at 80 % sparsity, heads of Llama 3.1, layer after layer: bytes of the working set a second."""
    heads, group, dim, tokens = 8, 4, 128, setting.tokens
    kept, device = tokens // 5, setting.device
    form = RowForm.KV_INT8 if is_int8 else RowForm.KV
    generator = torch.Generator(device).manual_seed(0)
    lists = (setting.layers, batch, 1)
    slots = setting.layers * batch * tokens
    pool = Pool.allocate(Tier.DEVICE, RowShape(heads, dim, setting.dtype, form), slots, device)
    for part in pool.rows.split(1 << 16):
        states = torch.randn(part.shape, generator=generator, dtype=setting.dtype, device=device)
        part.copy_(quantize_row(states)[0] if is_int8 else states)
    if pool.scales is not None:
        pool.scales.fill_(0.02)
    table = torch.randperm(slots, generator=generator, device=device).int().view(*lists, tokens)
    order = torch.rand((*lists, tokens), generator=generator, device=device).argsort(-1)[..., :kept]
    rows = order.sort(-1).values.int()
    counts = torch.full(lists, kept, dtype=torch.int32, device=device)
    length = torch.full((setting.layers,), tokens, dtype=torch.int64, device=device)
    query = torch.randn((batch, heads * group, 1, dim), generator=generator, dtype=setting.dtype, device=device)

    def attend(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = (query, pool.rows, pool.scales, table, length, None, rows, counts, layer % setting.layers)
        out: tuple[torch.Tensor, torch.Tensor] = ops.swa_attention(*arguments, 1 / math.sqrt(dim))
        return out

    out, mass = attend(0)
    near = 3e-2 if setting.dtype == torch.bfloat16 else 1e-4
    taken = table[0].long().flatten()
    stored = pool.rows[taken].float()
    if pool.scales is not None:
        stored *= pool.scales[taken].unsqueeze(-1)
    inverse = torch.arange(len(taken), dtype=torch.int32, device=device).view(1, batch, 1, tokens)
    exact = attention_reference(
        query.float(), stored, None, inverse, length[:1], None, rows[:1], counts[:1], 0, 1 / math.sqrt(dim)
    )
    torch.testing.assert_close(out.float(), exact[0], rtol=near, atol=near)
    torch.testing.assert_close(mass[..., :kept], exact[1][..., :kept], rtol=near, atol=near)
    del stored, exact
    seconds = _seconds(setting, attend)
    moved = batch * kept * pool.shape.bytes_per_row
    bandwidth = moved / seconds
    share = bandwidth / copy_bandwidth(setting)
    return {"us": seconds * 1e6, "MiB": moved / 2**20, "GB/s": bandwidth / 1e9, "share of copy": share}


def _pinned(setting: Setting, nbytes: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Host memory, the same as the device sees it, and what keeps it pinned."""
    host = torch.ones(nbytes, dtype=torch.int8)
    if setting.device.type == "cpu":
        return host, host, None
    memory = HostMemory(host, None, torch.device("cuda", torch.cuda.current_device()))
    return host, memory.pool[0], memory


def gather_over_link(setting: Setting, row_bytes: int) -> Values:
    """Scattered rows of pinned memory, read in place by a kernel, against one copy of as many bytes; and written."""
    nbytes = setting.copied_bytes // 4
    host, alias, memory = _pinned(setting, nbytes)
    pool = alias.view(-1, row_bytes)
    slots = torch.randperm(pool.shape[0], device=setting.device)[: max(1, pool.shape[0] // 2)].int()
    packed = torch.randint(0, 100, (slots.shape[0], row_bytes), dtype=torch.int8, device=setting.device)
    ops.scatter_rows(pool, slots, packed)
    if not torch.equal(ops.gather_rows(pool, slots), packed):
        raise AssertionError("rows were not read as they had been written")
    piece, target = host[: packed.nbytes], torch.empty(packed.nbytes, dtype=torch.int8, device=setting.device)
    up = packed.nbytes / _seconds(setting, lambda _: target.copy_(piece, non_blocking=True))
    down = packed.nbytes / _seconds(setting, lambda _: piece.copy_(target, non_blocking=True))
    gathered = packed.nbytes / _seconds(setting, lambda _: ops.gather_rows(pool, slots))
    scattered = packed.nbytes / _seconds(setting, lambda _: ops.scatter_rows(pool, slots, packed))
    if memory is not None:
        _synchronize(setting.device)
        memory.release()
    return {
        "copy up GB/s": up / 1e9, "gather GB/s": gathered / 1e9, "share of copy": gathered / up,
        "copy down GB/s": down / 1e9, "scatter GB/s": scattered / 1e9, "share of copy down": scattered / down,
    }  # fmt: skip


def select(setting: Setting) -> Values:
    """`kv_select` of one layer of the default policy."""
    config = AlisaConfig.from_options({"refresh": 0, "max_rows": None})
    policy = selection_spec(config)
    assert policy is not None
    tokens, device = setting.tokens, setting.device
    width, lists = policy.rows_capacity(tokens + 2), (setting.layers, 1, 1)
    scores = torch.rand((*lists, 1, tokens + 1), device=device)
    rows = torch.zeros((*lists, width), dtype=torch.int32, device=device)
    counts = torch.full(lists, -1, dtype=torch.int32, device=device)
    mass = torch.rand((1, 1, tokens + 1), device=device)
    length = torch.full((setting.layers,), tokens, dtype=torch.int64, device=device)
    origin = torch.tensor([1, 0], device=device)
    spec = policy.encode()
    seconds = _seconds(
        setting,
        lambda i: ops.kv_select(scores, rows, counts, mass, length, origin, None, i % setting.layers, spec),
    )
    return {"us a layer": seconds * 1e6, "ms in 32 layers": 32 * seconds * 1e3}


# Models.


class _Clock(hf.StoppingCriteria):
    """Notes when each token is there, and stops after enough of them."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self._device, self._tokens = device, tokens
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _synchronize(self._device)
        self.times.append(time.perf_counter())
        done = len(self.times) >= self._tokens
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> list[float]:
        """Decode steps but the first ones, in which graphs are compiled."""
        return [(b - a) * 1e3 for a, b in zip(self.times[3:], self.times[4:], strict=False)]


@contextlib.contextmanager
def _model(setting: Setting, family: str, tokens: int) -> Iterator[Any]:
    """A model of random weights, freed behind the block."""
    sizes = {"max_position_embeddings": tokens + 64, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
    config = hf.LlamaConfig(**setting.llama, **sizes) if family == "llama" else hf.OPTConfig(**setting.opt, **sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            model = hf.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    try:
        yield model
    finally:
        alisa_compile.release(model)
        torch._dynamo.reset()
        del model
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _kv_bytes(model: Any, batch: int, tokens: int) -> int:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize * batch * tokens


def _generate(
    setting: Setting, model: Any, runner: Any, batch: int, prompt: int, new_tokens: int, tokens: int, **options: Any
) -> Values:
    """Step times of `generate`. new_tokens: that the call asks for; tokens: after which it is stopped."""
    ids = torch.randint(2, model.config.vocab_size, (batch, prompt), device=setting.device)
    clock = _Clock(setting.device, tokens)
    started = time.perf_counter()
    with torch.inference_mode():
        runner.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            stopping_criteria=hf.StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
    steps = clock.step_ms()
    return {
        "step ms": statistics.median(steps), "p99 ms": sorted(steps)[math.ceil(0.99 * len(steps)) - 1],
        "tokens/s": batch * 1e3 / statistics.median(steps), "first token s": clock.times[0] - started,
    }  # fmt: skip


def stock(setting: Setting, family: str, cache: str, batch: int, prompt: int, new_tokens: int) -> Values:
    """transformers' own caches; `static` is dense attention through Inductor with CUDA graphs."""
    if cache == "offloaded" and setting.device.type == "cpu":
        raise _NeedsGpuError("transformers offloads from a GPU only")
    with _model(setting, family, prompt + new_tokens) as model:
        options = {} if cache == "dynamic" else {"cache_implementation": cache}
        if prompt > 4096 and cache != "static":
            options["prefill_chunk_size"] = 4096
        return _generate(setting, model, model, batch, prompt, new_tokens, setting.steps, **options)


def ours(
    setting: Setting,
    family: str,
    share: float,
    batch: int,
    prompt: int,
    new_tokens: int,
    *,
    horizon: int = 0,
    cuda_graphs: bool = False,
    **options: Any,
) -> Values:
    """The alisa backend with `share` of the dense KV bytes on the device. horizon: tokens that the call asks for.

    cuda_graphs: as `mode="reduce-overhead"` says, which torch.compile does not take beside options.
    """
    if cuda_graphs and setting.device.type == "cpu":
        raise _NeedsGpuError("CUDA graphs are of GPUs")
    asked = max(new_tokens, horizon)
    with _model(setting, family, prompt + asked) as model:
        dense = _kv_bytes(model, batch, prompt + asked)
        if share < 1:
            options |= {"device_kv_budget": int(share * dense), "host_kv_budget": int(1.1 * dense) + (1 << 20)}
        if setting.device.type == "cpu":
            options |= {"inner_compiler": "eager"}
        compiled = torch.compile(model, backend="alisa", options=options)
        with torch._inductor.config.patch({"triton.cudagraphs": cuda_graphs}):
            values = _generate(setting, model, compiled, batch, prompt, asked, setting.steps)
        report = alisa_compile.report(compiled).to_dict()
        moved = report["bytes_moved"]
        alisa_compile.release(compiled)
        return values | {
            "MiB up": moved["host_to_device"] / 2**20, "MiB down": moved["device_to_host"] / 2**20,
            "phases": "".join(f"{phase['phase']} " for phase in report["phases"]).strip(),
            "left dense": len(report["skipped"]),
        }  # fmt: skip


def phase_one(setting: Setting) -> Values:
    """Steps while everything fits, in a store with tiers and in one without."""
    prompt = min(4096, setting.tokens)
    common = {"sparsity": 0.8}
    plain = ours(setting, "llama", 1.0, 1, prompt, setting.steps + 8, **common)
    # Asked for three times the prompt, of which the device holds 60 %: what is generated until the stop fits.
    tiered = ours(setting, "llama", 0.6, 1, prompt, setting.steps + 8, horizon=2 * prompt, **common)
    if "II" in tiered["phases"]:
        raise AssertionError(f"not everything fitted: phases {tiered['phases']}")
    return {
        "without tiers ms": plain["step ms"], "with tiers ms": tiered["step ms"],
        "more": tiered["step ms"] / plain["step ms"] - 1, "phases": tiered["phases"], "MiB up": tiered["MiB up"],
    }  # fmt: skip


def gpu_tests(setting: Setting) -> Values:
    """The tests that need a GPU, in a process of their own; on the CPU they are only found."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", "-p", "no:cacheprovider", "tests"]
    if setting.device.type == "cpu":
        command = [*command[:-1], "--collect-only", "tests/gpu"]
    with tempfile.TemporaryFile("w+") as output:
        # A session of its own, so that tests which start processes do not leave them on the GPU.
        pytest = subprocess.Popen(command, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = pytest.wait()
        except _OutOfTimeError as error:
            _kill(pytest)
            status = str(error)
        output.seek(0)
        text = output.read().strip()
    if status != 0:
        raise AssertionError(f"{status}: {text.count(' PASSED')} passed\n{text[-3000:]}")
    return {"tests": text.splitlines()[-1].strip("= ")}


def _kill(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(setting: Setting) -> list[Row]:
    """All of them, the most important first: budgets are limits, and add up to more than the whole run may take."""
    short, new = setting.tokens, setting.steps + 8
    listed = [
        Row("GPU tests", 150, gpu_tests),
        Row("copy on the device", 10, _copy_bandwidth),
    ]
    for batch in setting.batches:
        for is_int8 in (False, True):
            listed.append(
                Row(
                    f"decode attention, {'int8' if is_int8 else 'model dtype'}, batch {batch}", 45,
                    lambda s, b=batch, i=is_int8: decode_attention(s, b, i),
                    ("share of copy", lambda value: value >= DECODE_SHARE),
                )
            )  # fmt: skip
    listed += [
        Row(f"gather over the link, rows of {size} B", 20, lambda s, n=size: gather_over_link(s, n),
            ("share of copy", lambda value: value >= GATHER_SHARE))
        for size in (256, 4096)
    ]  # fmt: skip
    listed.append(Row("selection, one list", 20, select))
    opt = {batch: _opt_rows(setting, batch) for batch in setting.opt_batches}
    first_opt = next(iter(opt))
    for place, batch in enumerate(setting.batches):
        listed += _llama_rows(setting, batch, short, new)
        if place == 0:
            listed.append(Row("phase I overhead", 100, phase_one, ("more", lambda value: value <= PHASE_ONE)))
            listed += opt[first_opt]
    return [*listed, *(row for batch, each in opt.items() if batch != first_opt for row in each)]


def _llama_rows(setting: Setting, batch: int, prompt: int, new_tokens: int) -> list[Row]:
    name = f"Llama-3.1-8B shapes, {prompt} tokens, batch {batch}"

    def alisa(share: float, where: str, seconds: float = 60, **options: Any) -> Row:
        def run(s: Setting) -> Values:
            return ours(s, "llama", share, batch, prompt, new_tokens, **options)

        return Row(f"{name}: alisa, {where}", seconds, run)

    def theirs(cache: str) -> Row:
        return Row(
            f"{name}: transformers, {cache} cache", 60,
            lambda s: stock(s, "llama", cache, batch, prompt, new_tokens),
        )  # fmt: skip

    # The first of each kind of graph is compiled in its row, the others mostly come from Inductor's cache.
    first, *others = setting.shares
    return [
        alisa(first, f"{first:.0%} of KV on the device", 120),
        theirs("static"),
        alisa(others[-1], f"{others[-1]:.0%} of KV on the device", 120),
        theirs("offloaded"),
        alisa(1.0, "all of KV on the device, CUDA graphs", cuda_graphs=True),
        theirs("dynamic"),
        *(alisa(share, f"{share:.0%} of KV on the device") for share in others[:-1]),
    ]


def _opt_rows(setting: Setting, batch: int) -> list[Row]:
    name = f"OPT-6.7B shapes, s {setting.opt_prompt}, n {setting.opt_new}, batch {batch}"
    return [
        Row(f"{name}: alisa, 20% of KV on the device", 90,
            lambda s: ours(s, "opt", 0.2, batch, s.opt_prompt, s.opt_new)),
        Row(f"{name}: transformers, dynamic cache", 30,
            lambda s: stock(s, "opt", "dynamic", batch, s.opt_prompt, s.opt_new)),
    ]  # fmt: skip


def run_row(row: Row, setting: Setting, left: float) -> Values:
    """What came out of a row: its values, or why there are none."""
    if left <= 0:
        return {"row": row.name, "status": "skipped", "reason": "no time was left"}
    started = time.perf_counter()
    result: Values = {"row": row.name}
    try:
        with _at_most(min(row.seconds, left)):
            values = row.run(setting)
        result |= {"status": "ok", "values": values}
        if row.goal is not None:
            key, is_met = row.goal
            result["goal met"] = is_met(values[key])
    except _NeedsGpuError as reason:
        result |= {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # one broken row must not cost the others
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
    result["seconds"] = round(time.perf_counter() - started, 1)
    gc.collect()
    if setting.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an error of the device nothing works any more
            torch.cuda.empty_cache()
    return result


def _context_is_dead(device: torch.device) -> bool:
    """Whether an error has left the GPU's context unusable for this process."""
    try:
        _synchronize(device)
    except RuntimeError:
        return True
    return False


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _print(result: Values) -> None:
    values = result.get("values", {})
    shown = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in values.items()]
    goal = {True: ", goal met", False: ", GOAL MISSED"}.get(result.get("goal met"), "")  # type: ignore[arg-type]
    print(f"{result['row']}: {result['status']}{goal}", flush=True)
    print(tabulate(shown, tablefmt="plain") if values else f"  {result['reason']}", flush=True)


def _read(path: Path) -> Values:
    record: Values = json.loads(path.read_text(encoding="utf-8"))
    return record


def run_rows(listed: list[Row], setting: Setting, path: Path | None, deadline: float) -> bool:
    """Run the rows that the record at `path` lacks, and write it after each. deadline: by `time.time`.

    Returns whether all have run; a row after which the GPU cannot be used ends it.
    """
    record: Values = {"rows": []} if path is None or not path.exists() else _read(path)
    done = {result["row"] for result in record["rows"]}
    if "versions" not in record:
        name = "cpu" if setting.device.type == "cpu" else torch.cuda.get_device_name()
        record = {
            "device": name, "date": datetime.date.today().isoformat(), "machine": machine_line(),
            "versions": _versions(), **record,
        }  # fmt: skip
    for row in listed:
        if row.name in done:
            continue
        left = deadline - time.time()
        if path is not None:
            write_whole(
                path, {**record, "running": {"row": row.name, "until": time.time() + max(0.0, min(row.seconds, left))}}
            )
        record["rows"].append(run_row(row, setting, left))
        _print(record["rows"][-1])
        if path is not None:
            write_whole(path, record)
        if record["rows"][-1]["status"] == "failed" and _context_is_dead(setting.device):
            return False
    return True


def supervise(command: list[str], path: Path) -> None:
    """Run `command` until it returns 0, again when it dies or a row hangs in it; that row's result is so written down.

    It must go on where the record at `path` ends, as `run_rows` does.
    """
    while True:
        before = len(_read(path)["rows"]) if path.exists() else 0
        child = subprocess.Popen(command, start_new_session=True)
        while (status := child.poll()) is None:
            running = _read(path).get("running") if path.exists() else None
            # Python takes a row's time limit itself, where it gets to run.
            if running is not None and time.time() > running["until"] + GRACE:
                _kill(child)
                break
            time.sleep(0.2)
        if status == 0:
            return
        record = _read(path) if path.exists() else {"rows": []}
        running = record.pop("running", None)
        if running is not None:
            reason = "hung, and was killed" if status is None else f"the process ended with status {status}"
            record["rows"].append({"row": running["row"], "status": "failed", "reason": reason})
            _print(record["rows"][-1])
            write_whole(path, record)
        if len(record["rows"]) == before:
            raise SystemExit(f"rows cannot be run: the process ended with status {status}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="time for all rows together")
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write here instead of benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; writes nothing into results")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # given to the process that runs rows
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry runs every row on the CPU with tiny shapes, to see that it runs")
    setting = DRY if given.dry else GPU
    listed = [row for row in rows(setting) if given.only.lower() in row.name.lower()]
    deadline = given.until or time.time() + 60 * given.minutes
    if given.dry or given.until:
        if not run_rows(listed, setting, given.json, deadline):
            sys.exit(RESTART)
        return
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = given.json or RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"
    path.unlink(missing_ok=True)
    print(machine_line(), flush=True)
    same = ["--only", given.only, "--json", str(path), "--until", str(deadline)]
    supervise([sys.executable, "-m", "benchmarks.gpu_check", *same], path)
    print(path)


if __name__ == "__main__":
    main()
