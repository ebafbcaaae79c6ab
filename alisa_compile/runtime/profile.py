"""The machine profile: how fast this machine moves rows and computes, measured once and kept in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ProfileError

logger = logging.getLogger(__name__)

#: Where profiles are kept, instead of `alisa` in the user's cache folder.
FOLDER_VARIABLE = "ALISA_CACHE_DIR"

_FORMAT = 2
_ROW_BYTES = (256, 1024, 4096, 16384, 65536)
_DISK_ROW_BYTES = (4096, 65536)
_WORKING_SET_ROWS = (16, 128, 1024, 4096)
_TOKENS = (1, 4, 16, 64, 256)
_MOVED_BYTES = 8 << 20
_POOL_BYTES = 32 << 20
_HEADS, _HEAD_DIM, _GROUP = 8, 64, 4
_MATRIX, _MATRICES = 1024, 16  # as many as caches cannot hold
_OTHER_MATRICES = (64, 128, 256, 512, 2048, 4096)
_SMALL, _REPEATS = 128, 20
#: Of a compiled decode step. Norms, rotary embedding, append and select took 66 us a layer in novel-7m, where the
#: smallest op takes 2.
_PRODUCTS_PER_LAYER, _OPS_PER_LAYER = 7, 32
_SLOW_SECONDS = 0.3  # larger cases than one that takes this long are extrapolated instead

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Table:
    """Measured points (x, y) with rising x: straight lines between, constant before the first.

    After the last y stays (rates), or with `grows` it is proportional to x (times).
    """

    points: tuple[tuple[float, float], ...]
    grows: bool = False

    def at(self, x: npt.ArrayLike) -> Floats:
        """y at each x."""
        xs, ys = np.array(self.points, dtype=np.float64).T
        x = np.asarray(x, dtype=np.float64)
        y: Floats = np.interp(x, xs, ys)
        return y * np.maximum(x / xs[-1], 1.0) if self.grows and xs[-1] > 0 else y

    @property
    def is_rising(self) -> bool:
        """Whether y never falls."""
        return all(a[1] <= b[1] for a, b in itertools.pairwise(self.points))


@dataclasses.dataclass(frozen=True)
class MachineProfile:
    """Measured numbers of one device and dtype.

    machine: what they were measured on. device_to_host, host_to_device, disk_write, disk_read: bytes a second by bytes
    of a row, rows scattered. attention: seconds of a decode step's attention in one layer, by bytes of its working set.
    linear: seconds per parameter of a matrix product, by tokens. matrix: how many times as long a parameter takes in
    one token's product, by parameters of the matrix. layer_seconds: of what a layer costs however small.
    churn: share of the dynamic rows that are new in a step, by the ranks of `SelectionSpec`; absent = not measured.
    """

    machine: str
    device: str
    dtype: str
    device_to_host: Table
    host_to_device: Table
    disk_write: Table
    disk_read: Table
    attention: Table
    linear: Table
    layer_seconds: float
    matrix: Table = Table(((float(_MATRIX**2), 1.0),))
    churn: dict[str, float] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON; an interruption leaves the old file or the new one."""
        content: dict[str, Any] = {"format": _FORMAT}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            content[field.name] = [list(point) for point in value.points] if isinstance(value, Table) else value
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise ProfileError(f"cannot write the machine profile: {error.strerror}", got=path) from error

    @classmethod
    def load(cls, path: Path) -> MachineProfile:
        """Read what `save` wrote; anything else is a `ProfileError`."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r} instead of {_FORMAT}")
            values: dict[str, Any] = {name: str(content[name]) for name in ("machine", "device", "dtype")}
            for name in (
                "device_to_host", "host_to_device", "disk_write", "disk_read", "attention", "linear", "matrix"
            ):  # fmt: skip
                values[name] = _table(name, content[name])
            values["layer_seconds"] = _positive("layer_seconds", content["layer_seconds"])
            values["churn"] = {str(rank): _share(rank, share) for rank, share in content["churn"].items()}
        except OSError as error:
            raise ProfileError(f"cannot read the machine profile: {error.strerror}", got=path) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileError(
                f"this file is no machine profile ({type(error).__name__}: {error})",
                got=path,
                expected=f"JSON as alisa writes it, format {_FORMAT}",
                fix="delete the file; it is measured again",
            ) from error
        return cls(**values)


def _positive(name: str, value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} holds {value!r}")
    return number


def _share(name: Any, value: Any) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(f"churn of {name} is {value!r}")
    return share


def _table(name: str, rows: Any) -> Table:
    points = tuple((_positive(name, x), _positive(name, y)) for x, y in rows)
    if not points or any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
        raise ValueError(f"{name} has no rising x")
    return Table(points, grows=name in ("attention", "linear"))


def profile_path(device: torch.device, dtype: torch.dtype) -> Path:
    """The file of this machine, device and dtype."""
    named = os.environ.get(FOLDER_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else (Path(cache) if cache else Path.home() / ".cache") / "alisa"
    key = hashlib.sha256("\n".join((machine_name(device), str(device), str(dtype))).encode()).hexdigest()[:12]
    return folder / f"profile-{device.type}-{key}.json"


def machine_name(device: torch.device) -> str:
    """What the numbers depend on: the processor or GPU, the threads, the version of torch."""
    if device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    else:
        unit = processor_name()
    return f"{unit}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def processor_name() -> str:
    """The CPU's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def obtain(device: torch.device, dtype: torch.dtype) -> MachineProfile:
    """The saved profile of this machine; measured and saved if there is none, or if its file is damaged."""
    path = profile_path(device, dtype)
    if path.exists():
        try:
            return MachineProfile.load(path)
        except ProfileError as error:
            logger.warning("%s; measuring the machine again", error)
    profile = measure(device, dtype)
    try:
        profile.save(path)
    except ProfileError as error:
        logger.warning("%s; it will be measured again next time", error)
    return profile


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> MachineProfile:
    """Measure; takes some seconds."""
    logger.info("measuring bandwidths and compute times of %s in %s", device, dtype)
    host = torch.device("cpu")
    try:
        written, read = _disk_tables()
    except OSError as error:
        folder = tempfile.gettempdir()
        fix = "make room there, or set TMPDIR to another folder"
        raise ProfileError(f"cannot measure the disk: {error.strerror}", got=folder, fix=fix) from error
    return MachineProfile(
        machine=machine_name(device),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        device_to_host=Table(tuple((size, _moving_rate(size, device, host)) for size in _ROW_BYTES)),
        host_to_device=Table(tuple((size, _moving_rate(size, host, device)) for size in _ROW_BYTES)),
        disk_write=written,
        disk_read=read,
        attention=_attention_table(device, dtype),
        linear=_linear_table(device, dtype),
        matrix=_matrix_table(device, dtype),
        layer_seconds=_layer_seconds(device, dtype),
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs after a first one that does not count; that is what the steps of a run will see."""
    times: list[float] = []
    for _ in range(12):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
        if len(times) > 2 and sum(times) > 2 * _SLOW_SECONDS:
            break
    return max(statistics.median(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _moving_rate(row_bytes: int, source: torch.device, target: torch.device) -> float:
    """Bytes a second from scattered slots of one pool to scattered slots of another."""
    slots, moved = _POOL_BYTES // row_bytes, _MOVED_BYTES // row_bytes
    is_pinned = {source.type, target.type} == {"cpu", "cuda"}

    def pool(place: torch.device) -> torch.Tensor:
        rows = torch.zeros((slots, row_bytes // 4), dtype=torch.float32, device=place)
        return rows.pin_memory() if is_pinned and place.type == "cpu" else rows

    generator = torch.Generator().manual_seed(0)
    there, here = pool(source), pool(target)
    order = torch.randperm(slots, generator=generator)[:moved]
    from_slots, to_slots = order.sort().values.to(source), order.flip(0).sort().values.to(target)
    ops = torch.ops.alisa

    packed = ops.gather_rows(there, from_slots)

    def move() -> None:
        # Where one memory holds both tiers, a row is copied once, from its slot to its slot.
        is_shared = source.type == target.type
        ops.scatter_rows(here, to_slots, packed if is_shared else ops.gather_rows(there, from_slots).to(target))

    device = source if source.type == "cuda" else target
    return moved * row_bytes / _seconds(move, device)


def _disk_tables() -> tuple[Table, Table]:
    """Bytes a second of writing and reading a file by scattered rows, in the folder for temporary files.

    Through the system's page cache, as the disk tier works: where memory is so short that files are not kept there, the
    disk is slower than this.
    """
    written, read = [], []
    with tempfile.TemporaryFile() as file:
        descriptor = file.fileno()
        for size in _DISK_ROW_BYTES:
            offsets = [place * size for place in torch.randperm(_MOVED_BYTES // size).tolist()]
            row = bytes(size)
            started = time.perf_counter()
            for offset in offsets:
                os.pwrite(descriptor, row, offset)
            written.append((float(size), _MOVED_BYTES / (time.perf_counter() - started)))
            started = time.perf_counter()
            for offset in offsets:
                os.pread(descriptor, size, offset)
            read.append((float(size), _MOVED_BYTES / (time.perf_counter() - started)))
    return Table(tuple(written)), Table(tuple(read))


def _attention_table(device: torch.device, dtype: torch.dtype) -> Table:
    capacity = 2 * _WORKING_SET_ROWS[-1]
    pool = torch.zeros((capacity, 2, _HEADS, _HEAD_DIM), dtype=dtype, device=device)
    table = torch.arange(capacity, dtype=torch.int32, device=device).view(1, 1, 1, capacity)
    length = torch.full((1,), capacity, dtype=torch.int64, device=device)
    query = torch.zeros((1, _HEADS * _GROUP, 1, _HEAD_DIM), dtype=dtype, device=device)
    points = []
    for count in _WORKING_SET_ROWS:
        step = capacity // count
        rows = torch.arange(step - 1, capacity, step, dtype=torch.int32, device=device).view(1, 1, 1, -1)
        counts = torch.full((1, 1, 1), count, dtype=torch.int32, device=device)

        def attend(rows: torch.Tensor = rows, counts: torch.Tensor = counts) -> None:
            torch.ops.alisa.swa_attention(query, pool, None, table, length, None, rows, counts, 0, 1.0)

        points.append((float(count * pool[0].nbytes), _seconds(attend, device)))
    return Table(tuple(points), grows=True)


def _linear_table(device: torch.device, dtype: torch.dtype) -> Table:
    weights = torch.zeros((_MATRICES, _MATRIX, _MATRIX), dtype=dtype, device=device)
    points = []
    for tokens in _TOKENS:
        seconds = _product_seconds(weights, tokens)
        points.append((float(tokens), seconds / weights.numel()))
        if seconds > _SLOW_SECONDS:
            break
    return Table(tuple(points), grows=True)


def _matrix_table(device: torch.device, dtype: torch.dtype) -> Table:
    """Many small matrices take longer than a few large ones of the same size in all."""
    memory = torch.zeros(_MATRICES * _MATRIX**2, dtype=dtype, device=device)

    def seconds(size: int) -> float:
        """Per parameter, with as many matrices as the memory holds."""
        return _product_seconds(memory.view(-1, size, size), 1) / memory.numel()

    usual = seconds(_MATRIX)
    points = {_MATRIX: 1.0, **{size: seconds(size) / usual for size in _OTHER_MATRICES}}
    return Table(tuple((float(size**2), points[size]) for size in sorted(points)))


def _product_seconds(weights: torch.Tensor, tokens: int) -> float:
    """Of the products of `tokens` tokens with each of `weights [count, n, n]`."""
    x = torch.zeros((tokens, weights.shape[-1]), dtype=weights.dtype, device=weights.device)

    def multiply() -> None:
        for weight in weights.unbind():
            torch.nn.functional.linear(x, weight)

    return _seconds(multiply, weights.device)


def _layer_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """A layer's products and small ops at a size that costs next to nothing: what is left is the cost of calling."""
    x = torch.zeros((1, _SMALL), dtype=dtype, device=device)
    weight = torch.zeros((_SMALL, _SMALL), dtype=dtype, device=device)

    def run() -> None:
        for _ in range(_REPEATS):
            for _ in range(_PRODUCTS_PER_LAYER):
                torch.nn.functional.linear(x, weight)
            for _ in range(_OPS_PER_LAYER):
                x.add_(0)

    return _seconds(run, device) / _REPEATS
