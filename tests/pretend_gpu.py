"""A GPU that is not there: tensors that say they are on `cuda`, and streams that run as late or as early as they may.

Nothing runs when it is called. An operator goes to the queue of the stream that is current; queues are worked off when
the host waits or reads a value, in any order that events allow, the worst one chosen by `Order`. Memory that the host
frees is overwritten in the order of the stream that it was allocated on, as if the next operator had got it. So a
missing wait, a record in the wrong place or a tensor freed too early shows as wrong data; a read of a value by the host
is counted; and operands on different devices are refused, as CUDA refuses them.
"""

from __future__ import annotations

import contextlib
import enum
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from alisa_compile.kernels import cuda_transfers
from alisa_compile.kernels.extend_attention.reference import extend_attention
from alisa_compile.kernels.extend_attention.tiered import extend_attention_tiered
from alisa_compile.kernels.kv_append.tiered import kv_append_tiered
from alisa_compile.kernels.kv_offload.cuda import kv_offload_cuda
from alisa_compile.kernels.kv_prefetch.cuda import kv_prefetch_cuda
from alisa_compile.kernels.kv_read.reference import kv_read, kv_read_tiered
from alisa_compile.kernels.kv_wait.cuda import kv_wait_cuda
from alisa_compile.kernels.swa_attention.tiered import swa_attention_tiered
from alisa_compile.runtime import store

aten = torch.ops.aten
GPU = torch.device("cuda", 0)

#: Operators whose result the host must have.
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
#: Operators whose output size depends on data, which the host waits for.
_COUNTED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_COPIES = {aten.copy_.default, aten._to_copy.default}
ops = torch.ops.alisa
#: `alisa::` operators that are plain torch and calls of others. All that are not here are kernels, and not looked into.
_PLAIN = {
    ops.extend_attention.default: extend_attention,
    ops.extend_attention.tiered: extend_attention_tiered,
    ops.kv_append.tiered: kv_append_tiered,
    ops.kv_offload.default: kv_offload_cuda,
    ops.kv_prefetch.default: kv_prefetch_cuda,
    ops.kv_read.default: kv_read,
    ops.kv_read.tiered: kv_read_tiered,
    ops.kv_wait.default: kv_wait_cuda,
    ops.swa_attention.tiered: swa_attention_tiered,
}


class Order(enum.Enum):
    """Which stream gets ahead where events leave a choice."""

    COMPUTE_FIRST = "compute first"
    TRANSFERS_FIRST = "transfers first"
    RANDOM = "random"


class FakeEvent:
    """A place in a stream's queue."""

    def __init__(self, stream: FakeStream, count: int) -> None:
        self.stream, self.count = stream, count


class FakeStream:
    """Work in the order in which it was given."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.work: list[Callable[[], None] | FakeEvent] = []
        self.done = 0

    def give(self, work: Callable[[], None]) -> None:
        """Queue work."""
        self.work.append(work)

    def record_event(self) -> FakeEvent:
        """As `torch.cuda.Stream.record_event`."""
        return FakeEvent(self, len(self.work))

    def wait_event(self, event: FakeEvent) -> None:
        """As `torch.cuda.Stream.wait_event`."""
        self.work.append(event)

    def synchronize(self) -> None:
        """As `torch.cuda.Stream.synchronize`."""
        self._machine.host_waits += 1
        self._machine.run_until(FakeEvent(self, len(self.work)))

    @property
    def may_advance(self) -> bool:
        """Whether the next piece of work does not wait for another stream."""
        if self.done == len(self.work):
            return False
        following = self.work[self.done]
        return not isinstance(following, FakeEvent) or following.stream.done >= following.count

    def advance(self) -> None:
        """Do the next piece of work."""
        following = self.work[self.done]
        self.work[self.done] = _nothing  # lets go of its tensors
        self.done += 1
        if not isinstance(following, FakeEvent):
            following()


def _nothing() -> None:
    pass


class Machine:
    """Two streams of a GPU, and how often the host has waited for them."""

    def __init__(self, order: Order, seed: int = 0) -> None:
        self.order, self.host_waits = order, 0
        self.compute, self.transfers = FakeStream(self), FakeStream(self)
        self.current = self.compute
        self._random = random.Random(seed)

    def run_until(self, event: FakeEvent) -> None:
        """Work until an event is reached, the other stream getting as far as `order` says."""
        other = self.transfers if event.stream is self.compute else self.compute
        while event.stream.done < event.count:
            ahead = {
                Order.COMPUTE_FIRST: other is self.compute,
                Order.TRANSFERS_FIRST: other is self.transfers,
                Order.RANDOM: self._random.random() < 0.5,
            }[self.order]
            if other.may_advance and (ahead or not event.stream.may_advance):
                other.advance()
            elif event.stream.may_advance:
                event.stream.advance()
            else:
                raise AssertionError("the streams wait for each other")

    def host_read(self) -> None:
        """The host waits for the compute stream."""
        self.compute.synchronize()

    def launch(self, stream: FakeStream, work: Callable[[], None]) -> None:
        """Call a function whose operators go to a stream."""
        before, self.current = self.current, stream
        try:
            work()
        finally:
            self.current = before


_machine: Machine | None = None


def machine() -> Machine:
    """The one of the running test."""
    assert _machine is not None
    return _machine


class _Memory:
    """Lives as long as any tensor over a piece of memory."""


class GpuTensor(torch.Tensor):
    """A tensor whose values are there when the streams have come so far."""

    values: torch.Tensor
    memory: _Memory

    @staticmethod
    def __new__(cls, values: torch.Tensor, memory: _Memory | None = None) -> GpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype
        )
        made.values, made.memory = values, memory or _Memory()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _allocate(like: torch.Tensor) -> GpuTensor:
    """New memory of the layout of a meta tensor, with what a former owner may have left in it."""
    values = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
    values.fill_(float("nan") if values.is_floating_point() else 0)
    made = GpuTensor(values)
    weakref.finalize(made.memory, _freed, machine().current, values).atexit = False
    return made


def _freed(stream: FakeStream, memory: torch.Tensor) -> None:
    """The next operator of the stream that memory was allocated on gets it."""
    stream.give(lambda: memory.fill_(float("nan") if memory.is_floating_point() else 0))


def _values(tree: Any) -> Any:
    return tree_map_only(GpuTensor, lambda tensor: tensor.values, tree)


def _meta(tree: Any) -> Any:
    def meta(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(torch.Tensor, meta, tree)


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _PLAIN:
        with _Device():  # torch has left it on the way here
            return _PLAIN[func](*args, **kwargs)
    decomposed = func.decompose(*args, **kwargs)
    if decomposed is not NotImplemented:
        return decomposed
    kwargs = {name: torch.device("cpu") if value == GPU else value for name, value in kwargs.items()}
    _check_devices(func, args)
    if func in _READS or func in _COUNTED or _has_mask(func, args):
        machine().host_read()
        out = func(*_values(args), **_values(kwargs))
        return tree_map_only(torch.Tensor, _uploaded, out)
    returns = func._schema.returns
    if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        source = next(a for a in args if isinstance(a, GpuTensor))
        return tree_map_only(torch.Tensor, lambda view: GpuTensor(view, source.memory), func(*_values(args), **kwargs))
    flat, _ = tree_flatten((args, kwargs))
    known = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, GpuTensor)]
    if func in _COPIES and args[0].device.type == "cpu":
        raise AssertionError("a copy to the host by way of the device's stream")
    if known and max(t.dim() for t in known) > 0:
        machine().host_read()  # a copy from memory that is not pinned waits for the stream
    ours = tree_map_only(torch.Tensor, lambda t: t.values if isinstance(t, GpuTensor) else t.clone(), (args, kwargs))
    if not returns or returns[0].alias_info is not None:  # it changes an argument, and returns nothing else
        machine().current.give(lambda: func(*ours[0], **ours[1]))
        changed = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return changed[0] if returns else None
    shapes = func(*_meta(args), **{**_meta(kwargs), **({"device": "meta"} if "device" in kwargs else {})})
    out = tree_map_only(torch.Tensor, _allocate, shapes)
    targets = [t.values for t in tree_flatten(out)[0]]

    def work() -> None:
        results = tree_flatten(func(*ours[0], **ours[1]))[0]
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    machine().current.give(work)
    return out


def _uploaded(values: torch.Tensor) -> GpuTensor:
    made = _allocate(values.to("meta"))
    made.values.copy_(values)
    return made


def _has_mask(func: Any, args: tuple[Any, ...]) -> bool:
    return func in _INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _check_devices(func: Any, args: tuple[Any, ...]) -> None:
    if func in _COPIES:
        return
    checked = [args[0], *args[2:]] if func in _INDEXED else list(args)
    for tensor in tree_flatten(checked)[0]:
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, GpuTensor) and tensor.dim() > 0:
            raise AssertionError(f"{func} has operands on the GPU and on the host: {tuple(tensor.shape)}")


class _Device(TorchFunctionMode):
    """Makes tensors for `device="cuda"`, and moves them between there and the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], GpuTensor):
            return _to_host(args[0]).tolist()
        if func is torch.Tensor.cpu and isinstance(args[0], GpuTensor):
            return _to_host(args[0])
        if func is torch.Tensor.to:
            return _to(args[0], args[1:], kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda" or isinstance(args[0], GpuTensor):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            machine().host_read()
        values = func(*args, **{**kwargs, "device": "cpu"})
        made = _allocate(values.to("meta"))
        if func is not torch.empty:
            machine().current.give(lambda: made.values.copy_(values))
        return made


def _to_host(tensor: GpuTensor) -> torch.Tensor:
    machine().host_read()
    return tensor.values.clone()


def _to(tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`Tensor.to` with a device, a dtype or both."""
    device, rest = kwargs.pop("device", None), []
    for argument in args:
        if isinstance(argument, (str, torch.device)):
            device = argument
        else:
            rest.append(argument)
    if rest or kwargs:
        tensor = tensor.to(*rest, **kwargs)
    if device is None or (torch.device(device).type == "cuda") == isinstance(tensor, GpuTensor):
        return tensor
    if isinstance(tensor, GpuTensor):
        return _to_host(tensor)
    machine().host_read()
    return _uploaded(tensor)


class _FakeStreams:
    """In the place of `CudaStreams`."""

    def __init__(self, device: torch.device) -> None:
        self.transfers = machine().transfers

    def compute(self) -> FakeStream:
        return machine().compute

    def launch(self, stream: FakeStream, work: Callable[[], None]) -> None:
        machine().launch(stream, work)


class _FakeMemory:
    """In the place of `HostMemory`: the device sees the host's own memory."""

    def __init__(self, rows: torch.Tensor, scales: torch.Tensor | None, device: torch.device) -> None:
        self.pool = (GpuTensor(rows), None if scales is None else GpuTensor(scales))

    def release(self) -> None:
        pass


@contextlib.contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, order: Order) -> Iterator[Machine]:
    """Inside, tensors may be made for `device="cuda"`."""
    global _machine
    monkeypatch.setattr(cuda_transfers, "CudaStreams", _FakeStreams)
    monkeypatch.setattr(cuda_transfers, "HostMemory", _FakeMemory)
    monkeypatch.setattr(store, "is_installed", lambda: True)
    _machine = Machine(order)
    try:
        with _Device():
            yield _machine
    finally:
        _machine = None
