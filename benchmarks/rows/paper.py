"""The paper's workload: short prompts, 512 new tokens, many sequences, end to end, everybody within one budget."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf

import alisa_compile
from alisa_compile import InfeasibleError
from alisa_compile.backend import alisa
from alisa_compile.kernels import native
from benchmarks.contenders import quiet_transformers
from benchmarks.outcome import GateFailed, Measure, Outcome
from benchmarks.rows.decode import LEFT_OUT
from benchmarks.schedulers.block_lru import BlockLRU
from benchmarks.schedulers.static_split import StaticSplit
from benchmarks.timing import Times, steps

_CHECKED = 32  # tokens


def opt(layers: int, hidden: int, heads: int, length: int) -> Any:
    """A random OPT in float32 that never stops by itself."""
    config = hf.OPTConfig(
        hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=2048,
        word_embed_proj_dim=hidden, max_position_embeddings=length, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.OPTForCausalLM(config).eval()
    with torch.no_grad():  # a fresh model is so close to undecided that its tokens say little
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its prompts `[B, S]`, how many tokens it adds, and what compiles it for our own schedulers."""

    model: Any
    ids: torch.Tensor
    new: int
    inner_compiler: str = "inductor"

    @classmethod
    def of(
        cls, batch: int, prompt: int, new: int, layers: int, hidden: int, heads: int, inner_compiler: str = "inductor"
    ) -> Workload:
        """Random prompts for a random model."""
        quiet_transformers()
        native.register_native()
        ids = torch.randint(2, 2048, (batch, prompt), generator=torch.Generator().manual_seed(0))
        return cls(opt(layers, hidden, heads, prompt + new), ids, new, inner_compiler)

    @property
    def kv_bytes(self) -> int:
        """Of K and V of all tokens, in the model's dtype."""
        config = self.model.config
        row = 2 * config.hidden_size * self.model.dtype.itemsize * config.num_hidden_layers
        return int(row * self.ids.numel() // self.ids.shape[1] * (self.ids.shape[1] + self.new))

    def run(self, who: Any, tokens: int | None = None, **options: Any) -> Any:
        """Greedy `generate` of exactly so many tokens (default: all)."""
        count = self.new if tokens is None else tokens
        return who.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0, **options,
        )  # fmt: skip

    def compiled(self, **options: Any) -> Any:
        """The model under alisa."""
        return torch.compile(self.model, backend=alisa, options={"inner_compiler": self.inner_compiler, **options})

    def static_split(self, **options: Any) -> StaticSplit:
        """The model with FlexGen's placement."""
        return StaticSplit(self.model, **{"inner_compiler": self.inner_compiler, **options})

    def blocks(self, budget: int) -> BlockLRU:
        """The model with vLLM's blocks."""
        return BlockLRU(self.model, budget, self.inner_compiler)

    def check(self, who: str, found: torch.Tensor) -> None:
        """Refuse a dense scheduler's tokens `[B, S + T]` that are not those of stock transformers."""
        count = min(_CHECKED, found.shape[1] - self.ids.shape[1])
        if not torch.equal(found[:, : self.ids.shape[1] + count], self.run(self.model, count)):
            raise GateFailed(f"the tokens of {who}, which is dense, are not those of stock transformers")

    def check_alisa(self, **budgets: int) -> None:
        """The same for alisa at sparsity 0 within these budgets; without Inductor, which takes long to compile."""
        ours = self.compiled(sparsity=0.0, inner_compiler="eager", **budgets)
        self.check("alisa", self.run(ours, min(_CHECKED, self.new)))
        release(ours)


@torch.no_grad()
def workload(
    batch: int,
    prompt: int,
    new: int,
    layers: int,
    hidden: int,
    heads: int,
    device_share: float,
    left_out: Sequence[str] = (),
    inner_compiler: str = "inductor",
) -> Outcome:
    """float32, greedy; prefill included.

    left_out: peers that would take a minute or more.
    device_share: of K and V of all tokens, that the device may hold; the host may hold all of them twice. Memory is
    what a cache holds in the end, tables and staging of alisa's store included.
    """
    work = Workload.of(batch, prompt, new, layers, hidden, heads, inner_compiler)
    budget = int(device_share * work.kv_bytes)
    below = {"device_kv_budget": budget, "host_kv_budget": 2 * work.kv_bytes}
    work.check_alisa(**below)
    ours: dict[str, Callable[[], Any]] = {
        "alisa, 80 %": lambda: work.compiled(sparsity=0.8, **below),
        "alisa, 80 %, int8": lambda: work.compiled(sparsity=0.8, kv_dtype="int8", **below),
        "static split (FlexGen)": lambda: work.static_split(**below),
        "blocks (vLLM)": lambda: work.blocks(budget),
    }
    inductor = type(work.model)(work.model.config).eval()
    inductor.load_state_dict(work.model.state_dict())
    inductor.forward = torch.compile(inductor.forward)
    peers: dict[str, tuple[Any, dict[str, Any]]] = {
        "hf quantized fp8": (work.model, {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}),
        "hf offloaded": (work.model, {"cache_implementation": "offloaded"}),
        "hf dynamic (default)": (work.model, {}),
        "hf static": (work.model, {"cache_implementation": "static"}),
        "hf static, Inductor": (inductor, {"cache_implementation": "static"}),
    }
    measures = []
    for who, make in ours.items():
        runner = make()
        try:
            found = work.run(runner)  # compiles
            gc.collect()  # what that has left
            if isinstance(runner, (StaticSplit, BlockLRU)):
                work.check(who, found)
            times = _timed(lambda runner=runner: work.run(runner))
            measures.append(_measure(who, work, times, _held(runner), budget))
        except InfeasibleError as error:
            measures.append(Measure(who, None, str(error).split(";")[0]))
        if isinstance(runner, BlockLRU) and measures[-1].times is not None:
            done = runner.scheduler
            note = f"{done.preemptions} sequences preempted, {done.recomputed} tokens again"
            measures[-1] = dataclasses.replace(measures[-1], note=note)
        release(runner)
        gc.collect()
    for who, (model, options) in peers.items():
        if who in left_out:
            measures.append(Measure(who, None, LEFT_OUT))
            continue
        if who == "hf offloaded" and not torch.accelerator.is_available():
            measures.append(Measure(who, None, "offloads from a GPU, and there is none"))
            continue
        work.run(model, work.new if model is inductor else min(_CHECKED, work.new), **options)
        gc.collect()
        results: list[Any] = []
        run = functools.partial(work.run, model, return_dict_in_generate=True, **options)
        times = _timed(lambda run=run, results=results: results.append(run()))
        measures.append(_measure(who, work, times, _cache_bytes(results[0].past_key_values), budget))
    return Outcome(measures)


def _timed(generation: Callable[[], Any]) -> Times:
    """Three of them, if they are quick."""
    return steps(generation, fewest=1, most=3, seconds=5.0)


def _measure(who: str, work: Workload, times: Times, held: int, budget: int) -> Measure:
    """A line of the table."""
    note = "" if held <= budget else "over the device budget"
    speed = work.ids.shape[0] * work.new / times.p50 * 1e3
    return Measure(who, times, note, kv_bytes=held, tokens_per_s=speed)


def _held(runner: Any) -> int:
    """Bytes on the device of one of our own stores, tables and staging included."""
    if isinstance(runner, BlockLRU):
        return runner.nbytes
    if isinstance(runner, StaticSplit):
        return runner.store.bytes_by_tier()["device"]
    return int(alisa_compile.report(runner).to_dict()["peak_bytes"]["device"])


def _cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache of transformers holds."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for part in value:
                visit(part)

    for layer in cache.layers:
        for value in vars(layer).values():
            visit(value)
    return sum(storages.values())


def release(runner: Any) -> None:
    """What alisa keeps for the next call would not count as allocated in it."""
    if isinstance(runner, (StaticSplit, BlockLRU)):
        runner.release()
    elif hasattr(runner, "_orig_mod"):
        alisa_compile.release(runner)
