"""The `generate` hook: on for our backend, invisible for everybody else, and gone without a trace afterwards."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import alisa_compile
from alisa_compile import AlisaCache, compat
from alisa_compile.hf import generate as hook
from tests import support
from tests.support import left_padded, recorded_compiles, tiny_model

NEW = 6
SPARSE = {"sparsity": 0.9, "sinks": 0, "refresh": 0}  # visibly other tokens than dense attention's
ROUTES = ("_compiled_call_impl", "_prepare_cache_for_generation", "prepare_inputs_for_generation")


@pytest.fixture
def stock() -> Any:
    return tiny_model("llama", layers=1, seed=3)


@pytest.fixture
def ids() -> torch.Tensor:
    return left_padded(1, 40, seed=4)[0]


def compiled(model: Any, **options: Any) -> Any:
    """Our backend with the rewritten graph run as it is, which compiles fastest."""
    return support.compiled(model, inner="eager", **options)


def generate(model: Any, ids: torch.Tensor, new_tokens: int = NEW, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


class EachToken(BaseStreamer):
    """Calls a function when the n-th token of a running `generate` arrives."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.count, self.at, self.action = 0, at, action

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count == self.at + 1:  # the first call brings the prompt
            self.action()

    def end(self) -> None:
        pass


class Once(LogitsProcessor):
    """Calls a function in the middle of a `generate`, from inside it, and changes no logit."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.calls, self.action = 0, action

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            self.action()
        return scores


class Failing(StoppingCriteria):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("from the user's stopping criterion")


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The model's own attributes are the same objects before and after."""
    before = dict(vars(model))
    yield
    after = vars(model)
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert model._compiled_call_impl is None
    assert not hook._installed


def in_thread(action: Callable[[], Any]) -> Any:
    """The result of `action` in another thread, which does not inherit this one's context."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert results, "the thread hangs"
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# Other backends and modules


@pytest.mark.parametrize("backend", ("alisa", "eager", "inductor"))
def test_plain_modules_get_no_generate(backend: str) -> None:
    """A module that cannot generate still cannot, under any backend."""
    module = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    assert not hasattr(module, "generate")
    assert not hasattr(type(module), "generate")


def test_a_generate_that_is_not_transformers_is_left_alone() -> None:
    """A module with a `generate` of its own keeps it under our backend."""

    class Own(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

        def generate(self) -> str:
            return "mine"

    module = Own()
    assert torch.compile(module, backend="alisa").generate == module.generate


def test_other_backends_keep_the_original_method(stock: Any, ids: torch.Tensor) -> None:
    """`generate` of a model under another backend is the original bound method, and runs eagerly as before."""
    expected = generate(stock, ids)
    for module in (torch.compile(stock, backend="eager"), torch.compiler.disable(stock)):
        assert module.generate == stock.generate
        assert module.generate.__func__ is type(stock).generate
        with recorded_compiles() as rows, unchanged(stock):
            assert torch.equal(generate(module, ids), expected)
        assert not rows


def test_ours_reaches_the_backend(stock: Any, ids: torch.Tensor) -> None:
    """The same call under our backend compiles prefill and decode, with every attention rewritten."""
    expected, model = generate(stock, ids), compiled(stock, sparsity=0.0)
    with recorded_compiles() as rows, unchanged(stock):
        assert torch.equal(generate(model, ids), expected)
    assert [(row.stage, row.rewritten) for row in rows] == [("prefill", 1), ("decode", 1)]


# The original model


@pytest.mark.parametrize("options", ({}, {"use_cache": False}), ids=str)
def test_original_model_is_untouched_before_during_and_after(
    options: dict[str, Any], stock: Any, ids: torch.Tensor
) -> None:
    """Its own generate and forward stay eager, dense and equal, also from another thread in the middle of ours.

    Also while ours stays out of a request, and routes the forward pass only.
    """
    model = compiled(stock, **SPARSE)
    expected = generate(stock, ids)
    logits = in_thread(lambda: stock(ids).logits.detach())
    seen: list[Any] = []

    def elsewhere() -> None:
        count = len(rows)
        seen.append(in_thread(lambda: generate(stock, ids, return_dict_in_generate=True)))
        seen.append(in_thread(lambda: stock(ids).logits.detach()))
        assert len(rows) == count

    with recorded_compiles() as rows, unchanged(stock):
        out = generate(model, ids, streamer=EachToken(3, elsewhere), **options)
    assert rows
    assert torch.equal(out, expected) == bool(options), "sparse tokens must differ, to tell who ran"
    assert torch.equal(seen[0].sequences, expected)
    assert type(seen[0].past_key_values) is DynamicCache
    assert torch.equal(seen[1], logits)
    assert torch.equal(generate(stock, ids), expected)
    assert torch.equal(generate(model, ids, **options), out)


def test_compiled_forward_from_another_thread_meanwhile(stock: Any, ids: torch.Tensor) -> None:
    """A plain forward of the compiled model traced while `generate` runs elsewhere holds nothing of that call."""
    model = compiled(stock, **SPARSE)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    expected = torch.no_grad()(stock)(ids).logits
    seen: list[torch.Tensor] = []
    out = generate(model, ids, streamer=EachToken(2, lambda: seen.append(in_thread(forward))))
    inside: list[torch.Tensor] = []
    again = generate(model, ids, logits_processor=[Once(lambda: inside.append(forward()))])
    assert torch.equal(out, again)
    for logits in (*seen, *inside, forward()):
        torch.testing.assert_close(logits, expected)
    assert len(seen) == len(inside) == 1
    assert not counters["graph_break"]


def test_exceptions_restore_everything(stock: Any, ids: torch.Tensor) -> None:
    """An exception out of generate arrives as it is; afterwards both models work."""
    model = compiled(stock, **SPARSE)
    expected, sparse = generate(stock, ids), generate(model, ids)
    with unchanged(stock):
        with pytest.raises(ZeroDivisionError, match="from the user"):
            generate(model, ids, stopping_criteria=[Failing()])
        with pytest.raises(ZeroDivisionError):
            generate(model, ids, logits_processor=[Once(lambda: 1 // 0)])  # type: ignore[arg-type, return-value]
    assert hook._current.get() is None
    assert torch.equal(generate(stock, ids), expected)
    assert torch.equal(generate(model, ids), sparse)


def test_instance_overrides_survive(stock: Any, ids: torch.Tensor) -> None:
    """A model that carries its own `prepare_inputs_for_generation` (PEFT does) keeps it, and we call it."""
    calls: list[int] = []
    inherited = stock.prepare_inputs_for_generation

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inherited(*args, **kwargs)

    stock.prepare_inputs_for_generation = own
    model = compiled(stock, sparsity=0.0)
    with unchanged(stock):
        generate(model, ids)
    assert stock.prepare_inputs_for_generation is own
    assert len(calls) == NEW


def test_original_compiled_in_place_stays_so(stock: Any, ids: torch.Tensor) -> None:
    """`model.compile(backend="eager")` on the original is still there after our generate."""
    stock.compile(backend="eager")
    mine = stock._compiled_call_impl
    expected = generate(stock, ids)
    with recorded_compiles() as rows:
        assert torch.equal(generate(compiled(stock, sparsity=0.0), ids), expected)
    assert [row.stage for row in rows] == ["prefill", "decode"]
    assert stock._compiled_call_impl is mine


def test_copies_made_meanwhile_are_whole(stock: Any, ids: torch.Tensor) -> None:
    """deepcopy and pickle of the original, before, inside and after: a copy works by itself and carries no route."""
    model = compiled(stock, **SPARSE)
    expected = generate(stock, ids)
    copies: list[Any] = []

    def take() -> None:
        copies.append(copy.deepcopy(stock))
        copies.append(pickle.loads(pickle.dumps(stock)))
        buffer = io.BytesIO()
        torch.save(stock.state_dict(), buffer)

    take()
    generate(model, ids, streamer=EachToken(2, take))
    take()
    for other in copies:
        assert not any(isinstance(vars(other).get(name), hook._Route) for name in ROUTES)
        assert vars(other).get("_compiled_call_impl") is None
        assert other.prepare_inputs_for_generation.__self__ is other
        with recorded_compiles() as rows:
            assert torch.equal(generate(other, ids), expected)
        assert not rows
    assert len(copies) == 6


def test_copy_of_the_compiled_model(stock: Any, ids: torch.Tensor) -> None:
    """deepcopy of the compiled model gives an independent compiled model."""
    model = compiled(stock, **SPARSE)
    out = generate(model, ids)
    other = copy.deepcopy(model)
    assert other._orig_mod is not stock
    with recorded_compiles() as rows:
        assert torch.equal(generate(other, ids), out)
    assert [row.stage for row in rows] == ["prefill", "decode"]
    assert hook.session_of(other) is not hook.session_of(model)


def test_nothing_keeps_a_model_alive(ids: torch.Tensor) -> None:
    """Dropping the compiled model frees it, the original and the storage."""
    stock = tiny_model("llama", layers=1)
    model = compiled(stock)
    generate(model, ids)
    session = hook.session_of(model)
    assert session is not None
    dying = [weakref.ref(thing) for thing in (stock, model, session, session.stores[0])]
    del stock, model, session
    gc.collect()
    assert [reference() for reference in dying] == [None] * 4


# Switching it off and on, and assigning over it


def test_disable_and_enable(stock: Any, ids: torch.Tensor) -> None:
    """Without the hook, generate is PyTorch's again; both switches may be used twice."""
    model = compiled(stock, **SPARSE)
    expected, sparse = generate(stock, ids), generate(model, ids)
    alisa_compile.disable()
    alisa_compile.disable()
    assert "generate" not in vars(compat.OptimizedModule)
    assert model.generate == stock.generate
    assert torch.equal(generate(model, ids), expected)
    alisa_compile.enable()
    alisa_compile.enable()
    assert torch.equal(generate(model, ids), sparse)


def test_assignment_lands_on_the_original(stock: Any, ids: torch.Tensor) -> None:
    """`om.generate = x` sets it on the original model as PyTorch does, is what runs, and can be deleted again."""
    model = compiled(stock, **SPARSE)
    model.generate = lambda *args, **kwargs: "mine"
    assert stock.generate() == "mine" and model.generate() == "mine"
    del model.generate
    assert "generate" not in vars(stock)
    assert generate(model, ids).shape == (1, ids.shape[1] + NEW)


def test_a_wrapper_may_be_assigned_back(stock: Any, ids: torch.Tensor) -> None:
    """The usual way to instrument a method works, and what it wraps still runs compiled."""
    model = compiled(stock, **SPARSE)
    sparse = generate(model, ids)
    inner, calls = model.generate, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.generate = timed
    assert torch.equal(generate(model, ids), sparse)
    assert calls == [1]


# Calls inside calls, and beside each other


def test_generate_inside_generate(stock: Any, ids: torch.Tensor) -> None:
    """A logits processor may generate with the same compiled model; both results are those of separate calls."""
    model = compiled(stock, **SPARSE)
    other = ids.flip(1)
    outer, inner = generate(model, ids), generate(model, other)
    seen: list[torch.Tensor] = []
    with unchanged(stock), recorded_compiles() as rows:
        action = Once(lambda: seen.append(generate(model, other)))
        assert torch.equal(generate(model, ids, logits_processor=[action]), outer)
    assert torch.equal(seen[0], inner)
    assert not rows


def test_original_inside_generate(stock: Any, ids: torch.Tensor) -> None:
    """A logits processor may use the original model: eager, dense, and without effect on the call around it."""
    model = compiled(stock, **SPARSE)
    expected, outer = generate(stock, ids), generate(model, ids)
    cache = DynamicCache(config=stock.config)
    seen: list[Any] = []

    def use_original() -> None:
        seen.append(generate(stock, ids, return_dict_in_generate=True))
        seen.append(stock(ids, past_key_values=cache, use_cache=True).logits)

    with unchanged(stock), recorded_compiles() as rows:
        assert torch.equal(generate(model, ids, logits_processor=[Once(use_original)]), outer)
    assert torch.equal(seen[0].sequences, expected)
    assert type(seen[0].past_key_values) is DynamicCache
    torch.testing.assert_close(seen[1], torch.no_grad()(stock)(ids).logits, rtol=0, atol=0)
    assert not rows


def test_guidance_runs_the_original_with_its_own_cache(stock: Any, ids: torch.Tensor) -> None:
    """Classifier-free guidance calls the model for the unconditional branch: same tokens as stock."""
    expected = generate(stock, ids, guidance_scale=1.5)
    assert torch.equal(generate(compiled(stock, sparsity=0.0), ids, guidance_scale=1.5), expected)


@pytest.mark.parametrize("same_model", (True, False))
def test_two_threads_at_once(stock: Any, ids: torch.Tensor, same_model: bool) -> None:
    """Two threads in step, on one compiled model or on two of the same class: each gets its own tokens."""
    first = compiled(stock, **SPARSE)
    second = first if same_model else compiled(tiny_model("llama", layers=1, seed=5), **SPARSE)
    prompts = (ids, ids.flip(1))
    models = (first, second)
    expected = [generate(model, prompt, 24) for model, prompt in zip(models, prompts, strict=True)]
    limit = torch._dynamo.config.recompile_limit
    barrier = threading.Barrier(2)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(place: int) -> None:
        for _ in range(3):
            barrier.wait(60)
            step = EachToken(5, lambda: barrier.wait(60))  # type: ignore[arg-type, return-value]
            results[place].append(generate(models[place], prompts[place], 24, streamer=step))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    with unchanged(stock):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for place in range(2):
        assert len(results[place]) == 3
        assert all(torch.equal(out, expected[place]) for out in results[place])
    assert torch._dynamo.config.recompile_limit == limit


def test_storage_is_taken_by_one_thread_only(stock: Any, ids: torch.Tensor) -> None:
    """Two threads that look for reusable storage at the same moment do not both get it."""
    model = compiled(stock)
    generate(model, ids)
    used = hook.session_of(model)
    assert used is not None
    meeting = threading.Barrier(2)

    class Meeting(hook.Session):
        """Whoever looks for storage waits for the other one to look too, as long as that can happen."""

        @property  # type: ignore[override]
        def stores(self) -> Any:
            found = self._found
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.5)
            return found

        @stores.setter
        def stores(self, stores: Any) -> None:
            self._found = stores

    session = Meeting(used.config, used.forward, used.kv_shapes, stores=used.stores)
    taken: list[int] = []

    def take() -> None:
        cache = hook._fresh_cache(hook._Call(stock, session), 1, 64)
        taken.append(cache.stores[0].pool.data_ptr())
        caches.append(cache)

    caches: list[AlisaCache] = []
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(taken)) == 2


def test_two_compiled_models_share_an_original(stock: Any, ids: torch.Tensor) -> None:
    """Different options on one original model: each keeps its own, one after the other and one inside the other."""
    dense, sparse = compiled(stock, sparsity=0.0), compiled(stock, **SPARSE)
    expected = generate(stock, ids)
    assert torch.equal(generate(dense, ids), expected)
    other = generate(sparse, ids)
    assert not torch.equal(other, expected)
    seen: list[torch.Tensor] = []
    with unchanged(stock), recorded_compiles() as rows:
        inside = Once(lambda: seen.append(generate(sparse, ids)))
        assert torch.equal(generate(dense, ids, logits_processor=[inside]), expected)
        outside = Once(lambda: seen.append(generate(dense, ids)))
        assert torch.equal(generate(sparse, ids, logits_processor=[outside]), other)
    assert torch.equal(seen[0], other) and torch.equal(seen[1], expected)
    assert not rows
    assert alisa_compile.report(dense).sparsity == 0.0
    assert alisa_compile.report(sparse).sparsity == SPARSE["sparsity"]
