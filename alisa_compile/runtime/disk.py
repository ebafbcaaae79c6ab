"""The disk tier: a private file of rows that no one else can open, and that no crash leaves behind."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path

import torch

from ..errors import TierError

logger = logging.getLogger(__name__)

IN_MEMORY = ("tmpfs", "ramfs")


class DiskFile:
    """Records of equal size in regions of equal size, one for each (layer, sequence, group), addressed by position.

    The file is removed from its folder as soon as it is open (mode 0600: it holds the user's text), so it ends with the
    process that has it open, whatever ends that. Its whole size is reserved at once: a disk that is too small is found
    before the first token.
    """

    def __init__(self, folder: str | None, regions: int, positions: int, record_bytes: int) -> None:
        self.positions, self._record_bytes = positions, record_bytes
        self._folder = folder or tempfile.gettempdir()
        self._size = size = regions * positions * record_bytes
        self.has_failed = False  # a file that has failed once is not to be trusted with other rows
        self._file = -1
        _warn_of_memory(self._folder)
        try:
            self._file, path = tempfile.mkstemp(prefix="alisa-kv-", dir=self._folder)
            os.unlink(path)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, max(1, size))
            else:  # macOS
                os.ftruncate(self._file, size)
        except OSError as error:
            self.close()
            raise TierError(
                f"the disk tier cannot be made: {error.strerror}",
                got=f"{size} bytes in {self._folder}",
                fix="free space there, set disk_path to another folder, or lower disk_kv_budget",
            ) from error

    def fileno(self) -> int:
        """Descriptor of the open file."""
        return self._file

    def close(self) -> None:
        """Give the space back; closing twice does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def check(self) -> None:
        """A TierError if the file was cut: the next write makes it longer again, and what is missing reads as zeros."""
        try:
            size = os.fstat(self._file).st_size
        except OSError as error:
            raise self._failed("read", error.strerror or "unknown error") from error
        if size < self._size:
            raise self._failed("read", "the file is shorter than it was made")

    def write(self, region: int, first: int, records: torch.Tensor) -> None:
        """Store `[K, record_bytes]` uint8 records of the positions from `first` on."""
        data, offset = _bytes_of(records), self._offset(region, first)
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise self._failed("written", error.strerror or "unknown error") from error

    def read(self, region: int, first: int, records: torch.Tensor) -> None:
        """Fill `[K, record_bytes]` uint8 records of the positions from `first` on."""
        data, offset = _bytes_of(records), self._offset(region, first)
        try:
            while data:
                count = os.preadv(self._file, [data], offset)
                if count == 0:
                    raise self._failed("read", "the file is shorter than it was made")
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed("read", error.strerror or "unknown error") from error

    def _offset(self, region: int, first: int) -> int:
        return (region * self.positions + first) * self._record_bytes

    def _failed(self, what: str, reason: str) -> TierError:
        self.has_failed = True
        return TierError(
            f"rows on disk could not be {what}: {reason}",
            got=f"the disk tier in {self._folder}",
            fix="reset the cache; set disk_path to a folder on a healthy disk",
        )


@functools.lru_cache(maxsize=64)
def _warn_of_memory(folder: str) -> None:
    """Say it, once, if a folder's files take the memory that the disk tier is to save."""
    kind = file_system(folder)
    if kind in IN_MEMORY:
        logger.warning(
            "the disk tier is in memory, not on a disk: %s is on a %s; set disk_path to a folder on a disk",
            folder,
            kind,
        )


def file_system(folder: str) -> str | None:
    """Kind of the file system that holds a folder, such as ext4; None where the system does not tell."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    path = os.path.realpath(folder)
    # A blank in the name of a mount point is written as \040; the last of equal ones hides the others.
    rows = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    places = [(row[1].replace("\\040", " "), row[2]) for row in rows if len(row) > 2]
    holding = [(len(point), kind) for point, kind in places if Path(path).is_relative_to(point)]
    return sorted(holding, key=lambda place: place[0])[-1][1] if holding else None  # stable: of equals, the last


def _bytes_of(records: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor."""
    assert records.is_contiguous()
    return memoryview(records.numpy().data).cast("B")
