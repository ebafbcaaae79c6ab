"""Faults while rows are below the device: a typed error or the right tokens, and a cache that works after a reset."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from transformers.generation.streamers import BaseStreamer

import alisa_compile
from alisa_compile import AlisaCache, AlisaError, backend
from alisa_compile.errors import CacheError, TierError
from alisa_compile.hf.generate import session_of
from alisa_compile.runtime.store import TokenStore
from alisa_compile.runtime.tiers import Pool, Tier, TierSizes
from tests.hf.modes import generate
from tests.kernels.harness import Driver, Heads, random_block
from tests.support import compiled, tiny_model

PROMPT, NEW = 60, 30
DENSE: dict[str, Any] = {"sparsity": 0.0}
POLICIES: dict[str, dict[str, Any]] = {"dense": DENSE, "swa": {"refresh": 8}}
#: K and V of 92 tokens and 2 layers take 46 KiB; 23 KiB of this are staging, which leaves few slots for rows.
DEVICE = 29_000
BELOW: dict[str, dict[str, Any]] = {
    "host": {"device_kv_budget": DEVICE},
    "disk": {"device_kv_budget": DEVICE, "host_kv_budget": 10_000, "disk_kv_budget": "1MiB"},
}
_DESCRIPTORS = Path("/proc/self/fd")
_needs_proc = pytest.mark.skipif(not _DESCRIPTORS.exists(), reason="finds open files by /proc")


class Boom(Exception):
    """What no library raises."""


class EachToken(BaseStreamer):
    """Keeps the tokens of a `generate`, and does things when there are so many of them."""

    def __init__(self, actions: dict[int, Callable[[], None]] | None = None) -> None:
        self.tokens: list[int] = []
        self.actions = actions or {}
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        """First comes the prompt, then each token."""
        self.calls += 1
        if self.calls == 1:
            return
        self.tokens += value.flatten().tolist()
        self.actions.get(len(self.tokens), lambda: None)()

    def end(self) -> None:
        """Nothing to do."""


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny_model("llama", layers=2, seed=3)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return _prompt(0)


@pytest.fixture(scope="module")
def expected(stock: Any, ids: torch.Tensor) -> torch.Tensor:
    """The stock model's tokens, which dense attention repeats exactly."""
    return generate(stock, ids, max_new_tokens=NEW)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    """A `disk_path`; nothing may be left in it."""
    path = tmp_path / "kv"
    path.mkdir()
    yield str(path)
    assert list(path.iterdir()) == []


def _prompt(seed: int, length: int = PROMPT) -> torch.Tensor:
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def _tiered(model: Any, below: str, folder: str, **options: Any) -> Any:
    return compiled(model, inner="eager", disk_path=folder, **{**BELOW[below], **options})


def _cache(model: Any, below: str, folder: str, **options: Any) -> AlisaCache:
    options = {"inner_compiler": "eager", "max_length": PROMPT + NEW + 2, **BELOW[below], **options}
    return AlisaCache(model.config, disk_path=folder, **options)


def _store_of(candidate: Any) -> TokenStore:
    session = session_of(candidate)
    assert session is not None
    (store,) = session.stores
    return store


def _open_files() -> set[str]:
    """Inodes of the files of disk tiers that this process has open."""
    names = set()
    for link in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            if "alisa-kv-" in os.readlink(link):
                names.add(os.readlink(link))
    return names


def _left(text: torch.Tensor) -> int:
    """New tokens that make the prompt and `NEW` of them."""
    return PROMPT + NEW - text.shape[1]


def _joined(ids: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return torch.cat((ids, torch.tensor([tokens], dtype=ids.dtype)), 1)


# --------------------------------------------------------------------------------------------------------- disk full


@contextlib.contextmanager
def _small_file_system(folder: str) -> Iterator[Callable[[], None]]:
    """16 KiB mounted over the folder; the function makes it larger."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        pytest.skip("this process may not mount file systems")

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)

    try:
        yield grow
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def _small_files(folder: str) -> Iterator[Callable[[], None]]:
    """No file of this process may be larger than 16 KiB, until the function is called."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        yield lift
    finally:
        lift()


@_needs_proc
@pytest.mark.parametrize("limited", [_small_file_system, _small_files])
def test_a_full_disk_is_found_before_the_first_token(
    limited: Any, stock: Any, ids: torch.Tensor, expected: torch.Tensor, folder: str
) -> None:
    """The error says so and names the folder; with space the same compiled model works."""
    candidate = _tiered(stock, "disk", folder, **DENSE)
    gc.collect()
    before = _open_files()
    streamer = EachToken()
    with limited(folder) as lift:
        with pytest.raises(TierError, match=r"disk tier cannot be made.*bytes in .*disk_path") as caught:
            generate(candidate, ids, max_new_tokens=NEW, streamer=streamer)
        assert folder in str(caught.value) and streamer.tokens == []
        assert _open_files() == before
        cache = _cache(stock, "disk", folder, **DENSE)
        with pytest.raises(TierError, match="disk tier cannot be made"):
            cache.allocate(1)
        lift()
        cache.allocate(1)
        assert torch.equal(generate(candidate, ids, max_new_tokens=NEW), expected)
        assert int(_store_of(candidate).tiers.on_disk.min()) > 20  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------- a file that goes bad


def _cut(store: TokenStore) -> None:
    assert store.disk is not None
    os.ftruncate(store.disk.fileno(), 0)


def _make_read_only(store: TokenStore) -> None:
    """All descriptors of the file: the thread that moves rows has one of its own."""
    assert store.disk is not None
    file = os.fstat(store.disk.fileno())
    for number in [int(link.name) for link in _DESCRIPTORS.iterdir()]:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(number), file):
                other = os.open(f"/proc/self/fd/{number}", os.O_RDONLY)
                os.dup2(other, number, inheritable=False)
                os.close(other)


@_needs_proc
@pytest.mark.parametrize(
    ("fault", "policy"),
    [
        (_cut, "dense"),
        (_make_read_only, "swa"),
        pytest.param(_cut, "swa", marks=pytest.mark.slow),
        pytest.param(_make_read_only, "dense", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_goes_bad(
    policy: str, fault: Callable[[TokenStore], None], stock: Any, ids: torch.Tensor, folder: str
) -> None:
    """No wrong token, whoever owns the cache; the next `generate` works, and so does a cache that was reset."""
    candidate = _tiered(stock, "disk", folder, **POLICIES[policy])
    expected = generate(candidate, ids, max_new_tokens=NEW)
    streamer = EachToken({5: lambda: fault(_store_of(candidate))})
    with pytest.raises(TierError, match=r"rows on disk could not be .*to fix: reset the cache"):
        generate(candidate, ids, max_new_tokens=NEW, streamer=streamer)
    assert streamer.tokens == expected[0, PROMPT : PROMPT + len(streamer.tokens)].tolist()
    gc.collect()
    assert torch.equal(generate(candidate, ids, max_new_tokens=NEW), expected)

    cache = _cache(stock, "disk", folder, **POLICIES[policy])
    cache.allocate(1)
    streamer = EachToken({5: lambda: fault(cache.stores[0])})
    with pytest.raises(TierError):
        generate(candidate, ids, max_new_tokens=NEW, streamer=streamer, past_key_values=cache)
    with pytest.raises(TierError):
        generate(candidate, _joined(ids, streamer.tokens), max_new_tokens=5, past_key_values=cache)
    cache.reset()
    assert torch.equal(generate(candidate, ids, max_new_tokens=NEW, past_key_values=cache), expected)


@_needs_proc
def test_a_bad_file_that_cannot_be_replaced(stock: Any, folder: str) -> None:
    """A reset on a full disk says so; the cache stays unusable until a reset succeeds."""
    cache = _cache(stock, "disk", folder, **DENSE)
    cache.allocate(1)
    with torch.no_grad():
        stock(_prompt(0), past_key_values=cache)
        before = stock(_prompt(1, 1), past_key_values=cache).logits
        _cut(cache.stores[0])
        with pytest.raises(TierError):
            stock(_prompt(1, 1), past_key_values=cache)
        with _small_files(folder):
            for _ in range(2):
                with pytest.raises(TierError, match="disk tier cannot be made"):
                    cache.reset()
                with pytest.raises(TierError, match="disk tier cannot be made"):
                    stock(_prompt(1, 1), past_key_values=cache)
        cache.reset()
        stock(_prompt(0), past_key_values=cache)
        assert torch.equal(stock(_prompt(1, 1), past_key_values=cache).logits, before)


# --------------------------------------------------------------------------------------------------- memory refused


def _refuse(monkeypatch: pytest.MonkeyPatch, refused: Tier, error: type[Exception]) -> None:
    allocate = Pool.allocate.__func__  # type: ignore[attr-defined]

    def short_of_memory(cls: Any, tier: Tier, *args: Any) -> Pool:
        if tier is refused:
            raise error("DefaultCPUAllocator: can't allocate memory")
        pool: Pool = allocate(cls, tier, *args)
        return pool

    monkeypatch.setattr(Pool, "allocate", classmethod(short_of_memory))


@_needs_proc
def test_memory_that_is_refused(
    stock: Any, ids: torch.Tensor, expected: torch.Tensor, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the tier, its size and what to do; nothing stays behind, and with memory back all works."""
    candidate = _tiered(stock, "disk", folder, **DENSE)
    gc.collect()
    before = _open_files()
    for tier, error, remedy in (
        (Tier.HOST, RuntimeError, "disk_kv_budget"),
        (Tier.HOST, MemoryError, "disk_kv_budget"),
        (Tier.DEVICE, torch.OutOfMemoryError, "host_kv_budget"),
    ):
        with monkeypatch.context() as patched:
            _refuse(patched, tier, error)
            match = (
                rf"memory for the {tier.value} tier.*got: 0\.\d\d MiB of rows.*lower {tier.value}_kv_budget.*{remedy}"
            )
            with pytest.raises(CacheError, match=match):
                generate(candidate, ids, max_new_tokens=NEW)
        gc.collect()
        assert _open_files() == before
    assert torch.equal(generate(candidate, ids, max_new_tokens=NEW), expected)


def _grown(sizes: TierSizes | None, steps: int) -> Iterator[tuple[Driver, torch.Tensor]]:
    """A store of 40 positions in which 39 are taken, then the output of each step."""
    driver = Driver(Heads(), capacity=40, layers=2, sizes=sizes, sparsity=0.0)
    generator = torch.Generator().manual_seed(0)
    for tokens in (38, *[1] * steps):
        yield driver, driver.forward(random_block(generator, driver.heads, tokens, layers=2, dtype=torch.float32))


def test_growth_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that fills the store still has its result; the next one says why it cannot begin, and loses nothing."""
    sizes = TierSizes(device=12, host=10, disk=200, staging=64)
    run = _grown(sizes, 8)
    outputs = [next(run)[1], next(run)[1]]
    with monkeypatch.context() as patched:
        _refuse(patched, Tier.HOST, RuntimeError)
        driver, output = next(run)
        outputs.append(output)
        assert driver.store.host_length == driver.store.capacity == 40
        blocks = torch.Generator().manual_seed(9)
        for _ in range(2):
            with pytest.raises(CacheError, match="memory for the host tier"):
                driver.forward(random_block(blocks, driver.heads, 1, layers=2, dtype=torch.float32))
    driver.store.reserve(41)
    outputs += [output for _, output in run]
    for output, (_, wanted) in zip(outputs, _grown(sizes, 8), strict=True):
        assert torch.equal(output, wanted)


def test_growth_that_cannot_read_the_rows() -> None:
    """The store stays what it was, and says so at each use; a reset makes it work."""
    run = _grown(TierSizes(device=12, host=10, disk=200, staging=64), 4)
    driver, _ = next(run)
    store = driver.store
    _cut(store)
    tiers, capacity = store.tiers, store.capacity
    with pytest.raises(TierError, match="could not be read"):
        store.reserve(90)
    assert store.tiers is tiers and store.capacity == capacity
    with pytest.raises((TierError, RuntimeError), match="rows on disk could not be"):
        next(run)
    store.reset()
    store.reserve(90)
    assert store.capacity >= 90


def test_growth_that_leaves_the_device_fewer_rows() -> None:
    """Larger tables take from the device's budget, so working sets shrink as the store grows: they are chosen again."""
    sizes = TierSizes(device=12, host=200, disk=0, staging=64, max_rows=11)
    driver = Driver(Heads(), capacity=100, layers=2, sizes=sizes, refresh=0)
    generator = torch.Generator().manual_seed(0)
    for tokens in (60, 1, 1):
        driver.forward(random_block(generator, driver.heads, tokens, layers=2, dtype=torch.float32))
    rows = driver.store.read(1, 0, 62)[0]
    before = driver.working_set(1)
    driver.store._place = lambda *_: TierSizes(device=7, host=200, disk=0, staging=64, max_rows=6)
    driver.store.reserve(150)
    after = driver.working_set(1)
    assert before is not None and len(before) == 11
    assert after is not None and len(after) == 6 and set(after) < set(before)
    assert torch.equal(driver.store.read(1, 0, 62)[0], rows)
    driver.forward(random_block(generator, driver.heads, 1, layers=2, dtype=torch.float32))


# ------------------------------------------------------------------------------------------- exceptions inside a step


class Trap:
    """Raises once, when armed: before an op of a graph runs, or after it has; in every graph compiled from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
        self.error = error
        self.armed: tuple[str, int, bool] | None = None
        monkeypatch.setattr(backend, "_compile", lambda gm, *_: lambda *args: self._run(gm, args))

    def arm(self, name: str, layer: int, *, after: bool) -> None:
        """name: of the op, with its overload."""
        self.armed = (name, layer, after)

    def _run(self, gm: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        """Node by node; layers come in order, so an op's place among its like is its layer."""
        trap, seen = self, collections.Counter[str]()

        class Run(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                name = str(node.target)
                trap.pass_by((name, seen[name], False))
                out = super().run_node(node)
                trap.pass_by((name, seen[name], True))
                seen[name] += 1
                return out

        return Run(gm).run(*args)

    def pass_by(self, place: tuple[str, int, bool]) -> None:
        """The graph has come to this place."""
        if place == self.armed:
            self.armed = None
            raise self.error(f"at {place}")


@pytest.mark.parametrize(("error", "below"), [(Boom, "host"), (KeyboardInterrupt, "disk")])
def test_a_step_that_fails_inside(
    error: type[BaseException],
    below: str,
    stock: Any,
    ids: torch.Tensor,
    expected: torch.Tensor,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a prompt, in decode steps, in a block on a history: the cache goes on as if nothing had been."""
    larger = {**DENSE, "device_kv_budget": 35_000}  # there are 25 tokens more, and some of the answer
    candidate, trap = _tiered(stock, below, folder, **larger), Trap(monkeypatch, error)
    cache = _cache(stock, below, folder, max_length=PROMPT + NEW + 25 + 10, **larger)

    for name, layer, after in (
        ("alisa.kv_append.tiered", 0, True),
        ("alisa.kv_append.tiered", 1, False),
        ("alisa.kv_append.tiered", 1, True),
        ("alisa.kv_prefetch.default", 1, True),
    ):
        trap.arm(name, layer, after=after)
        with pytest.raises(error):
            generate(candidate, ids, past_key_values=cache, max_new_tokens=NEW)
        assert cache.get_seq_length() == 0

    pending = []

    def arm(name: str, layer: int, after: bool) -> None:
        ticket = cache.stores[0].ticket
        assert ticket is not None
        pending.append(int(ticket[:-1].max()))
        trap.arm(name, layer, after=after)

    text = ids
    for name, layer, after in (
        ("alisa.kv_wait.default", 0, False),
        ("alisa.kv_append.default", 0, True),
        ("alisa.swa_attention.tiered", 1, False),
        ("alisa.kv_offload.default", 0, True),
        ("alisa.kv_prefetch.default", 1, True),
        ("alisa.kv_append.default", 1, True),
    ):
        streamer = EachToken({3: functools.partial(arm, name, layer, after)})
        with pytest.raises(error):
            generate(candidate, text, past_key_values=cache, max_new_tokens=_left(text), streamer=streamer)
        text = _joined(text, streamer.tokens)
    assert text.shape[1] == PROMPT + 18 and torch.equal(text, expected[:, : PROMPT + 18])
    if below == "disk" and cache.stores[0].tiers.is_open:  # type: ignore[union-attr]
        assert min(pending) > 0, "something must be moving when it fails"
    text = generate(candidate, text, past_key_values=cache, max_new_tokens=_left(text))
    assert torch.equal(text, expected)

    text = torch.cat((text, _prompt(4, 25)), 1)
    further = generate(stock, text, max_new_tokens=8)
    for name, layer, after in (
        ("alisa.kv_append.tiered", 0, True),
        ("alisa.extend_attention.tiered", 0, True),
        ("alisa.kv_append.tiered", 1, True),
        ("alisa.kv_offload.default", 1, True),
    ):
        trap.arm(name, layer, after=after)
        with pytest.raises(error):
            generate(candidate, text, past_key_values=cache, max_new_tokens=8)
    assert torch.equal(generate(candidate, text, past_key_values=cache, max_new_tokens=8), further)
    assert trap.armed is None


@pytest.mark.parametrize("below", BELOW)
def test_a_step_that_fails_in_eager_mode(
    below: str, stock: Any, ids: torch.Tensor, expected: torch.Tensor, folder: str
) -> None:
    """The step is left half-way with no graph running, so nobody is told of it until the next one begins."""
    model, armed = copy.deepcopy(stock), []

    def hook(*_: Any) -> None:
        if armed:
            armed.clear()
            raise Boom("between layers")

    model.model.layers[0].register_forward_hook(hook)
    cache = _cache(model, below, folder, **DENSE)
    text = ids
    armed.append(True)
    with pytest.raises(Boom):
        generate(model, ids, past_key_values=cache, max_new_tokens=NEW)
    for _ in range(2):
        streamer = EachToken({6: lambda: armed.append(True)})
        with pytest.raises(Boom):
            generate(model, text, past_key_values=cache, max_new_tokens=_left(text), streamer=streamer)
        text = _joined(text, streamer.tokens)
    assert text.shape[1] == PROMPT + 12
    assert torch.equal(generate(model, text, past_key_values=cache, max_new_tokens=_left(text)), expected)


@pytest.mark.parametrize("below", BELOW)
def test_an_interrupt_between_steps(below: str, stock: Any, ids: torch.Tensor, folder: str) -> None:
    """Sparse as well: the cache goes on, and a call without it starts anew."""
    candidate = _tiered(stock, below, folder, **POLICIES["swa"])
    expected = generate(candidate, ids, max_new_tokens=NEW)

    def interrupt() -> None:
        raise KeyboardInterrupt

    cache = _cache(stock, below, folder, **POLICIES["swa"])
    text = ids
    for count in (1, 7, 9):
        streamer = EachToken({count: interrupt})
        with pytest.raises(KeyboardInterrupt):
            generate(candidate, text, past_key_values=cache, max_new_tokens=_left(text), streamer=streamer)
        text = _joined(text, streamer.tokens)
    assert text.shape[1] == PROMPT + 17
    assert torch.equal(generate(candidate, text, past_key_values=cache, max_new_tokens=_left(text)), expected)
    with pytest.raises(KeyboardInterrupt):
        generate(candidate, ids, max_new_tokens=NEW, streamer=EachToken({3: interrupt}))
    assert torch.equal(generate(candidate, ids, max_new_tokens=NEW), expected)


# -------------------------------------------------------------------------------------------------- several at once


def test_two_caches_of_one_model(stock: Any, folder: str) -> None:
    """Turns that alternate do not disturb each other, nor does a reset."""
    candidate = _tiered(stock, "disk", folder, **DENSE)
    texts = [_prompt(seed) for seed in (1, 2)]
    wanted = [generate(stock, text, max_new_tokens=20) for text in texts]
    caches = [_cache(stock, "disk", folder, **DENSE) for _ in texts]
    for _ in range(4):
        for place, cache in enumerate(caches):
            texts[place] = generate(candidate, texts[place], past_key_values=cache, max_new_tokens=5)
    assert all(torch.equal(got, want) for got, want in zip(texts, wanted, strict=True))
    caches[0].reset()
    again = generate(candidate, texts[1], past_key_values=caches[1], max_new_tokens=8)
    assert torch.equal(again, generate(stock, texts[1], max_new_tokens=8))


def test_threads(stock: Any, folder: str) -> None:
    """Two on one compiled model and one on another, while torch compiles both: right tokens or a typed error."""
    other = copy.deepcopy(stock)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.95)
    candidates = [_tiered(model, "disk", folder, **DENSE) for model in (stock, other)]
    work = [(0, 1), (0, 2), (1, 3)]  # candidate and prompt of each thread
    wanted = [generate((stock, other)[place], _prompt(seed), max_new_tokens=NEW) for place, seed in work]
    wrong: list[str] = []
    right = [0] * len(work)

    def run(thread: int) -> None:
        place, seed = work[thread]
        for _ in range(3):
            try:
                got = generate(candidates[place], _prompt(seed), max_new_tokens=NEW)
            except AlisaError:
                continue
            except BaseException as error:
                wrong.append(repr(error))
                return
            if not torch.equal(got, wanted[thread]):
                wrong.append(f"thread {thread} got {got[0, PROMPT:].tolist()}")
            right[thread] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert min(right) > 0


# -------------------------------------------------------------------------------------------------------- the end


@_needs_proc
def test_the_end_of_a_store(stock: Any, ids: torch.Tensor, expected: torch.Tensor, folder: str) -> None:
    """`release` gives host memory and file back at once, and so does dropping the model."""
    gc.collect()
    before = _open_files()
    candidate = _tiered(stock, "disk", folder, **DENSE)

    def run(candidate: Any) -> tuple[weakref.ref[Any], int]:
        assert torch.equal(generate(candidate, ids, max_new_tokens=NEW), expected)
        store = _store_of(candidate)
        assert store.tiers is not None and store.disk is not None
        assert len(_open_files() - before) == 1
        return weakref.ref(store.tiers.host.untyped_storage()), store.disk.fileno()

    host, file = run(candidate)
    alisa_compile.release(candidate)
    assert host() is None and _open_files() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    host, _ = run(candidate)
    del candidate
    gc.collect()
    assert host() is None and _open_files() == before


@_needs_proc
def test_a_process_that_is_killed_leaves_no_file(folder: str) -> None:
    """The file has no name from the start, so nothing has to clean up."""
    script = """
import sys, torch, transformers
from alisa_compile import AlisaCache
options = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=128)
cache = AlisaCache(transformers.LlamaConfig(**options), sparsity=0.0, device_kv_budget=29000, host_kv_budget=10000,
                   disk_kv_budget="1MiB", disk_path=sys.argv[1], batch_size=1, max_length=92, dtype=torch.float32)
print(cache.stores[0].disk.fileno(), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = process.stdout.readline().strip()
        target = os.readlink(f"/proc/{process.pid}/fd/{number}")
        assert target.startswith(f"{folder}/alisa-kv-") and target.endswith("(deleted)")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert os.listdir(folder) == []
