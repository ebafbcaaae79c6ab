"""The tiers of a store on a GPU, on a pretended one: the results of everything on the device, and no host waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from alisa_compile.kernels import cuda_transfers
from alisa_compile.kernels.tiers import ROWS_MISSED, TierState
from alisa_compile.runtime.store import TokenStore
from alisa_compile.runtime.tiers import TierSizes
from tests.kernels.harness import Block, Driver, Heads, close, random_block
from tests.pretend_gpu import FakeStream, Machine, Order, pretend_gpu

HEADS = Heads()
SIZES = TierSizes(device=40, host=200, disk=0, staging=16)


class _Driver(Driver):
    """Hands its working sets over as tensors that nobody else holds, as compiled code may."""

    def move(self, layer: int) -> None:
        store = self.store
        if store.tiers is None:
            return
        rows = (store.pool, store.scales, store.table, store.length)
        torch.ops.alisa.kv_offload(*rows, store.ticket, layer, store.spec)
        chosen = [None if tensor is None else tensor.clone() for tensor in (store.rows, store.counts)]
        torch.ops.alisa.kv_prefetch(*rows, *chosen, store.ticket, layer)


class Pair:
    """A store with tiers on the pretended GPU, and one with everything on the host that gets the same tokens."""

    def __init__(
        self, gpu: Machine, *, layers: int = 2, batch: int = 2, sizes: TierSizes | None = SIZES, **options: Any
    ) -> None:
        self.gpu, self.layers, self.batch = gpu, layers, batch
        self.dtype = torch.float32 if options.get("kv_dtype") == "int8" else torch.float64
        common = {"capacity": 200, "layers": layers, "batch": batch, "dtype": self.dtype, **options}
        self.ours, self.theirs = _Driver(HEADS, sizes=sizes, device="cuda", **common), Driver(HEADS, **common)
        self._generator = torch.Generator().manual_seed(5)
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Uploaded ahead: an upload would wait for the GPU, and hide what is out of order.
        self._ready = [self._block(1) for _ in range(80)]

    def _block(self, tokens: int) -> tuple[Block, Block]:
        block = random_block(self._generator, HEADS, tokens, layers=self.layers, batch=self.batch, dtype=self.dtype)
        return block, Block(*(tensor.to("cuda") for tensor in (block.query, block.key, block.value)))

    def forward(self, tokens: int, mask: torch.Tensor | None = None) -> int:
        """A forward pass of both; how often the host has waited for the GPU."""
        block, there = self._ready.pop() if tokens == 1 else self._block(tokens)
        stored = self.theirs.store.host_length + tokens
        mask = None if mask is None else mask[:, :stored]
        mask_there = None if mask is None else mask.to("cuda")
        before = self.gpu.host_waits
        got = self.ours.forward(there, mask_there)
        waits = self.gpu.host_waits - before
        expected = self.theirs.forward(block, mask)
        if mask is not None:
            real = mask[:, stored - tokens :].bool()[None, :, None, :, None].expand_as(expected)
            expected = expected.where(real, 0)
            got = got.where(real.to("cuda"), 0)
        self._outputs.append((got, expected))
        return waits

    def check_outputs(self) -> None:
        """What attention has given since the last check."""
        close_to = torch.float32 if self.dtype == torch.float32 else torch.float64
        for got, expected in self._outputs:
            close(got.cpu(), expected, close_to)
        self._outputs.clear()

    def check(self) -> None:
        """All outputs, the rows on every tier, working sets and tables."""
        self.check_outputs()
        ours, theirs = self.ours.store, self.theirs.store
        stored = theirs.host_length
        for layer in range(self.layers):
            for mine, other in zip(ours.read(layer, 0, stored), theirs.read(layer, 0, stored), strict=True):
                assert (mine is None) == (other is None)
                if mine is not None and other is not None:
                    assert torch.equal(mine.cpu(), other)
        table, tiers = ours.table.cpu(), ours.tiers
        assert tiers is not None
        used = table[table >= 0]
        assert len(used.unique()) == len(used)
        owner = tiers.owner.cpu()
        assert torch.equal(owner[used.long()].long(), (table >= 0).nonzero()[:, 3])
        assert int((owner >= 0).sum()) == len(used)
        if ours.counts is not None and theirs.counts is not None:
            assert torch.equal(ours.counts.cpu(), theirs.counts)
            assert ours._dense == (theirs.counts < 0).flatten(1).any(1).tolist()  # what the host believes

    @property
    def tiers(self) -> TierState:
        """Of the store on the GPU."""
        assert self.ours.store.tiers is not None
        return self.ours.store.tiers


@pytest.fixture(params=Order, ids=[order.value for order in Order])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Each order of the streams."""
    with pretend_gpu(monkeypatch, request.param) as machine:
        yield machine


@pytest.mark.parametrize("policy", [{"refresh": 8}, {"policy": "churn"}], ids=["swa", "churn"])
def test_steady_steps_do_not_wait(gpu: Machine, policy: dict[str, Any]) -> None:
    """A prompt beyond the quota, then 55 steps with refreshes: rows come back, and the host never waits for the GPU."""
    pair = Pair(gpu, **policy)
    pair.forward(60)
    pair.forward(1)  # the first one reads counters for the report
    for step in range(54):
        assert pair.forward(1) == 0, f"step {step} waits for the GPU"
    pair.check()
    down, up = pair.ours.store.counters()[:2]
    assert up > 0
    assert down == int(pair.tiers.below.sum()) * 2 * pair.tiers.row_bytes
    assert int(pair.tiers.traffic[ROWS_MISSED]) == 0


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    "options", [{"refresh": 8}, {"kv_dtype": "int8"}, {"head_mode": "per_kv_head"}, {"sparsity": 0.0}], ids=str
)
def test_steps_with_everything_on_the_device_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], padded: bool
) -> None:
    """Not even the first after the prompt. What the kernels' launches read is seen in `triton/generated`."""
    with pretend_gpu(monkeypatch, Order.RANDOM) as gpu:
        pair = Pair(gpu, sizes=None, **options)
        mask = torch.ones((2, 200), dtype=torch.int64)
        mask[1, :7] = 0
        pair.forward(60, mask if padded else None)
        for step in range(20):
            assert pair.forward(1, mask if padded else None) == 0, f"step {step} waits for the GPU"
        pair.check_outputs()


def _also(patch: pytest.MonkeyPatch, owner: Any, name: str, more: Callable[[Any], object]) -> None:
    """Let a method do something else first."""
    method = getattr(owner, name)

    def both(self: Any, *arguments: Any) -> Any:
        more(self)
        return method(self, *arguments)

    patch.setattr(owner, name, both)


_Engine = cuda_transfers.TransferEngine
#: Ways to wait, and the method of a steady step that gets one.
WAITS: dict[str, tuple[type, str, Callable[[Any], object]]] = {
    "a value is read": (TokenStore, "begin_step", lambda store: int(store.length[0])),
    "a list is read": (TokenStore, "end_step", lambda store: store.length.tolist()),
    "a tensor is copied": (TokenStore, "end_step", lambda store: store.counts.cpu()),
    "a size depends on data": (TokenStore, "begin_step", lambda store: store.rows.nonzero()),
    "a stream is waited for": (_Engine, "wait", lambda engine: engine._streams.compute().synchronize()),
    "a counter is read": (_Engine, "prefetch", lambda engine: engine._entered[0].item()),
}


@pytest.mark.parametrize("kind", WAITS)
def test_a_wait_shows(kind: str) -> None:
    """In each step of stores with tiers, and with everything on the device."""
    owner, name, wait = WAITS[kind]
    for sizes in (SIZES, None) if owner is TokenStore else (SIZES,):
        with pytest.MonkeyPatch.context() as patch, pretend_gpu(patch, Order.RANDOM) as gpu:
            pair = Pair(gpu, layers=1, sizes=sizes, refresh=8)
            for tokens in (60, 1):
                pair.forward(tokens)
            _also(patch, owner, name, wait)
            assert all(pair.forward(1) > 0 for _ in range(3))


OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"refresh": 8, "kv_dtype": "int8"},
    "per head": {"refresh": 8, "head_mode": "per_kv_head"},
    "dense": {"sparsity": 0.0},
    "paper": {"paper": True},
    "h2o": {"policy": "h2o"},
    "strided": {"policy": "strided"},
}


@pytest.mark.parametrize("policy", OPTIONS)
def test_every_policy(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """From an empty store over the quota, with blocks in between."""
    with pretend_gpu(monkeypatch, Order.RANDOM) as gpu:
        pair = Pair(gpu, layers=1, **OPTIONS[policy])
        for step, tokens in enumerate((30, *[1] * 14, 5, 20, *[1] * 10)):
            waits = pair.forward(tokens)
            assert step < 2 or tokens > 1 or waits == 0
        pair.check()
        assert pair.ours.store.counters()[1] > 0


def test_padding_inside_the_prompt(gpu: Machine) -> None:
    """Local rows reach past the recent ones, and some find no slot: attention fetches them, and still nothing waits."""
    mask = torch.ones((2, 200), dtype=torch.int64)
    mask[1, :7] = 0
    mask[0, 25:70] = 0
    pair = Pair(gpu, layers=1, sparsity=0.3, refresh=8)
    pair.forward(75, mask)
    pair.forward(1, mask)
    for step in range(12):
        assert pair.forward(1, mask) == 0, f"step {step} waits for the GPU"
    pair.check()
    assert pair.ours.store.counters()[ROWS_MISSED] > 0


def test_operations_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop, reorder, copy, grow, reset, and a step that fails, each while transfers run."""
    with pretend_gpu(monkeypatch, Order.COMPUTE_FIRST) as gpu:
        pair = Pair(gpu, layers=1, policy="churn")
        stores = pair.ours.store, pair.theirs.store

        def steps(*blocks: int) -> None:
            for tokens in blocks:
                pair.forward(tokens)
            pair.check()

        steps(60, 1, 1, 1)
        for store in stores:
            store.crop(55)
        steps(1, 1, 1)
        for store in stores:
            store.select_sequences([1, 1])
        steps(1, 1, 1)
        for store in stores:
            store.begin_step(1)
            store.abort_step()
        steps(1, 1)
        for store in stores:
            store.reserve(220)
        steps(1, 1)
        pair.ours.store, pair.theirs.store = (store.copy() for store in stores)
        steps(1, 1)
        for store in (pair.ours.store, pair.theirs.store):
            store.reset()
        steps(60, 1, 1)


def _never(*_: object) -> None:
    pass


class _Forgetful(list[torch.Tensor]):
    def __iadd__(self, other: object) -> _Forgetful:  # type: ignore[override, misc]
        return self


FAULTS: dict[str, tuple[Order, Callable[[pytest.MonkeyPatch], None]]] = {
    "a layer does not wait": (
        Order.COMPUTE_FIRST,
        lambda patch: patch.setattr(
            cuda_transfers.TransferEngine, "wait", lambda engine, layer: engine._pending.pop(layer, None)
        ),
    ),
    "a transfer starts at once": (
        Order.TRANSFERS_FIRST,
        lambda patch: patch.setattr(FakeStream, "wait_event", _only_compute_waits),
    ),
    "an event is recorded before the transfer": (
        Order.COMPUTE_FIRST,
        lambda patch: patch.setattr(FakeStream, "record_event", _record_early),
    ),
    "memory is freed under a transfer": (
        Order.COMPUTE_FIRST,
        lambda patch: patch.setattr(cuda_transfers, "_Pending", lambda: _Forgetting()),
    ),
}


class _Forgetting(cuda_transfers._Pending):
    def __init__(self) -> None:
        super().__init__(kept=_Forgetful())


_wait_event, _record_event = FakeStream.wait_event, FakeStream.record_event


def _only_compute_waits(stream: FakeStream, event: Any) -> None:
    if event.stream is not stream._machine.compute:
        _wait_event(stream, event)


def _record_early(stream: FakeStream) -> Any:
    event = _record_event(stream)
    if stream is stream._machine.transfers:
        event.count = max(0, event.count - 6)
    return event


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Each order that the engine has to keep, broken: what it computes is wrong then."""
    order, break_it = FAULTS[fault]
    with pretend_gpu(monkeypatch, order) as gpu:
        pair = Pair(gpu, layers=1, policy="churn")
        pair.forward(60)
        break_it(monkeypatch)
        with contextlib.suppress(RuntimeError, IndexError):  # a wrong slot may be none at all
            for _ in range(12):
                pair.forward(1)
            with pytest.raises(AssertionError):
                pair.check()
