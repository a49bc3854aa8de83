"""Files that are replaced as a whole, temporary folders of living and of killed processes, locks."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from titok.checkpoints import writing
from titok.checkpoints.writing import atomic_path, lock, remove_abandoned
from titok.data.images import list_images

ROOT = Path(__file__).parents[2]


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if writing.TEMPORARY_FOLDER.fullmatch(path.name)]


@contextlib.contextmanager
def writer_in_another_process(path: Path) -> Iterator[int]:
    """Within, a process writes `path` and does not end. Yields its number. It has no file open but its lock."""
    reader, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                os.write(ready, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"x"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(ready)


def test_a_block_that_ends_replaces_and_one_that_raises_does_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
        assert temporary.suffix == ".txt"
        assert temporary.parent.stat().st_mode & 0o777 == 0o700
    with contextlib.suppress(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("second")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["a.txt"]


PATH_OF_3_10 = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10's Path does not look mkdir up in os"
)


@pytest.mark.parametrize("call", ["chmod", "replace", pytest.param("mkdir", marks=PATH_OF_3_10)])
def test_an_error_of_the_system_names_the_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_path(tmp_path / "a.txt"):
        pass
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_no_view_of_a_bytesio_is_handed_out() -> None:
    """An error of writing keeps the frame that wrote, and with it the view that `BytesIO.getbuffer` has made.

    When the two are collected as garbage, Python 3.12.0 and 3.12.1 crash, and other releases report a buffer that is
    still exported. `getvalue` makes no view, and copies nothing where the object is not written to afterwards.
    """
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("titok", "kernels", "benchmarks", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "getbuffer"
    ]
    assert not calls


def test_a_link_to_another_disk(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs a second disk")
    target = Path("/dev/shm", f"titok-test-{os.getpid()}")
    link = tmp_path / "a.txt"
    link.symlink_to(target)
    try:
        for text in ("first", "second"):
            with atomic_path(link) as temporary:
                temporary.write_text(text)
            assert target.read_text() == text
        assert link.is_symlink()
    finally:
        target.unlink()


def test_only_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".titok-0123456789abcdef.txt").mkdir()  # not one of ours
    (tmp_path / ".titok-notes").mkdir()
    with writer_in_another_process(tmp_path / "a.txt") as child, atomic_path(tmp_path / "b.txt"):
        assert len(temporaries(tmp_path)) == 2
        remove_abandoned(tmp_path)
        assert len(temporaries(tmp_path)) == 2, "both are in use"
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        remove_abandoned(tmp_path)
        assert len(temporaries(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".titok-0123456789abcdef.txt",
        ".titok-notes",
        "b.txt",
    ]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".titok-0123456789abcdef").symlink_to("mine")
    remove_abandoned(tmp_path)
    assert (tmp_path / "mine" / "file").exists()
    remove_abandoned(tmp_path / "missing")


def test_a_writer_whose_new_folder_is_removed_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take the folder for an abandoned one before it is locked."""
    taken = []

    def lock_late(path: Path, **options: bool) -> int:
        if not taken:
            taken.append(path)
            remove_abandoned(tmp_path)
        return lock(path, **options)

    monkeypatch.setattr(writing, "lock", lock_late)
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("content")
        assert temporary.parent != taken[0]
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_files_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with atomic_path(tmp_path / "b.png") as temporary:
        temporary.touch()
        assert list_images(tmp_path).paths == [tmp_path / "a.png"]


def test_locks(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "file"):
        (tmp_path / "file").touch()
        first, second = lock(path, shared=True), lock(path, shared=True)
        with pytest.raises(BlockingIOError):
            lock(path)
        os.close(first)
        os.close(second)
        alone = lock(path)
        for shared in (False, True):
            with pytest.raises(BlockingIOError):
                lock(path, shared=shared)
        os.close(alone)
    with pytest.raises(FileNotFoundError):
        lock(tmp_path / "missing")
