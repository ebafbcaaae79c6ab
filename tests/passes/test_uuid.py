"""The fingerprint that keeps torch's caches from serving code of another version of this package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import alisa_compile
from alisa_compile import backend
from alisa_compile.passes import pipeline
from alisa_compile.passes.uuid import FingerprintPass, package_fingerprint


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package with each kind of source."""
    (tmp_path / "kernels").mkdir()
    for name in ("a.py", "kernels/native.cpp", "kernels/tables.h", "notes.txt"):
        (tmp_path / name).write_text(f"// {name}\n")
    return tmp_path


CHANGES: dict[str, Callable[[Path], object]] = {
    "Python bytes": lambda root: (root / "a.py").write_text("// b.py\n"),
    "one C++ byte": lambda root: (root / "kernels/native.cpp").write_text("// kernels/native.cpP\n"),
    "a header": lambda root: (root / "kernels/tables.h").write_text(""),
    "a name": lambda root: (root / "a.py").rename(root / "b.py"),
    "a folder": lambda root: (root / "kernels/native.cpp").rename(root / "native.cpp"),
    "a new file": lambda root: (root / "c.py").write_text(""),
    "a removed file": lambda root: (root / "a.py").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_changes_it(package: Path, change: str) -> None:
    """Bytes and names of .py, .cpp and .h files count."""
    before = package_fingerprint(package)
    CHANGES[change](package)
    assert package_fingerprint(package) != before


def test_times_places_and_other_files_do_not(package: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A touched file, a copy elsewhere, other kinds of file and compiled Python leave it as it is."""
    before = package_fingerprint(package)
    os.utime(package / "a.py", (1, 1))
    (package / "notes.txt").write_text("other notes")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_bytes(b"\0")
    assert package_fingerprint(package) == before
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(package, copy)
    assert package_fingerprint(copy) == before


def test_bytes_do_not_slide_between_files(package: Path) -> None:
    """Moving the end of one file to the start of the next is a change."""
    (package / "a.py").write_text("one")
    (package / "b.py").write_text("two")
    before = package_fingerprint(package)
    (package / "a.py").write_text("on")
    (package / "b.py").write_text("etwo")
    assert package_fingerprint(package) != before


def test_pass_names_count(package: Path) -> None:
    """Another pass, or another order, is another fingerprint."""
    names = ("one", "two")
    assert len({package_fingerprint(package, extra) for extra in ((), names, names[::-1], ("onetwo",))}) == 4
    assert FingerprintPass(names).uuid() == FingerprintPass(names).uuid() != FingerprintPass(names[:1]).uuid()


def test_the_backend_uses_it_for_the_whole_package() -> None:
    """The pass that Inductor gets hashes this package's kernels too, with the list of passes."""
    root = Path(alisa_compile.__file__).parent
    assert (root / "kernels" / "native.h").exists()
    passes = pipeline.identity()
    assert [each.name for each in pipeline.PIPELINE] == [part.split()[0] for part in passes[:-1]]
    assert backend._fingerprint(passes).uuid() == package_fingerprint(root, passes)
