"""Budgets in bytes, `auto` included: what is free now, less what a run will need beside the KV store."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..config import AlisaConfig
from ..errors import ConfigError

#: Share of free memory that stays free: allocators round up, and other programs grow.
_MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Budgets:
    """Bytes by tier. origin: for a person, where each number comes from."""

    device: int
    host: int
    disk: int
    origin: dict[str, str]

    @property
    def by_tier(self) -> dict[str, int]:
        """The bytes alone."""
        return {"device": self.device, "host": self.host, "disk": self.disk}


def resolve(config: AlisaConfig, device: torch.device, weight_bytes: int, activation_bytes: int) -> Budgets:
    """The three budgets of a configuration.

    weight_bytes: of weights that are not loaded yet. On a machine without a GPU the device tier and the host tier share
    one memory, and `auto` gives the host what the device leaves.
    """
    origin: dict[str, str] = {}
    shared = device.type != "cuda"
    free = _free_memory() if shared else _free_on_gpu(device)
    host_free = free if shared else _free_memory()
    other = weight_bytes + activation_bytes

    def auto(name: str, usable: float, text: str) -> int:
        origin[name] = f"auto: {text}"
        return max(0, int(usable))

    given = {name: config.budget_bytes(f"{name}_kv_budget") for name in ("device", "host", "disk")}
    origin |= {name: "as given" for name, value in given.items() if value is not None}
    room = (1 - _MARGIN) * free - other
    on_device = given["device"]
    if on_device is None:
        text = f"{format_bytes(free)} free, less {_MARGIN:.0%}, {format_bytes(weight_bytes)} of weights to load and "
        room_here = room - (given["host"] or 0) if shared else room
        on_device = auto("device", room_here, f"{text}about {format_bytes(activation_bytes)} of activations")
    on_host = given["host"]
    if on_host is None:
        if shared:
            on_host = auto("host", room - on_device, "the memory that the device tier leaves")
        else:
            on_host = auto("host", (1 - _MARGIN) * host_free, f"{format_bytes(host_free)} free, less {_MARGIN:.0%}")
    on_disk = given["disk"]
    if on_disk is None:
        folder = config.disk_path or tempfile.gettempdir()
        if not os.path.isdir(folder):
            raise ConfigError("option 'disk_path' is not a folder", got=repr(folder), expected="a folder that exists")
        on_disk = auto("disk", shutil.disk_usage(folder).free / 2, f"half of what is free in {folder}")
    return Budgets(on_device, on_host, on_disk, origin)


def format_bytes(count: float) -> str:
    """Such as 2.50 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _free_on_gpu(device: torch.device) -> int:
    """What the driver has, and what torch's allocator holds for reuse."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def _free_memory() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
