"""The file of the disk tier says so where its folder is in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alisa_compile.runtime import disk
from alisa_compile.runtime.disk import DiskFile, file_system

SHARED_MEMORY = Path("/dev/shm")


def mounts(monkeypatch: pytest.MonkeyPatch, *rows: str) -> None:
    text = "".join(f"none {row} rw 0 0\n" for row in rows)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)


def test_the_innermost_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts(monkeypatch, "/ ext4", "/mnt tmpfs", "/mnt/a xfs", "/mnt/a\\040b ext3", "/mnt/a btrfs")
    assert [file_system(path) for path in ("/", "/mnt", "/mnt/ax", "/mnt/a", "/mnt/a/b", "/mnt/a b/c")] == [
        "ext4", "tmpfs", "tmpfs", "btrfs", "btrfs", "ext3"
    ]  # fmt: skip


@pytest.mark.skipif(not os.path.ismount(SHARED_MEMORY), reason="there is no /dev/shm to try it on")
def test_a_disk_in_memory_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    disk._warn_of_memory.cache_clear()
    for _ in range(2):
        DiskFile(str(SHARED_MEMORY), 1, 2, 8).close()
    assert caplog.text.count("the disk tier is in memory") == 1 and "/dev/shm is on a tmpfs" in caplog.text


def test_a_disk_is_no_reason_to_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounts(monkeypatch, "/ ext4")
    DiskFile(str(tmp_path), 1, 2, 8).close()
    assert caplog.text == ""
