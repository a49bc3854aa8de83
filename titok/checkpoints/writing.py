"""Writing files so that no kill leaves half of one, and locks on folders.

A file is written in a temporary folder beside it, named `.titok-` and 16 hexadecimal digits, and moved from there to
its place when it is complete. The writer holds a lock on the temporary folder. The system releases a lock when its
process ends, however it ends, so `remove_abandoned` can tell the folders of killed processes from those in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import safetensors

TEMPORARY_FOLDER = re.compile(r"\.titok-[0-9a-f]{16}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary path, to which the block writes instead of to `path`.

    When the block ends, the temporary file replaces `path`; when the block raises, the temporary file is removed
    and `path` stays as it was. The folder of `path` is made where it is missing. A new file gets the permissions that
    the process's umask gives, and a file that is replaced passes on its own. Where `path` is a symbolic link, the
    link stays and its target is replaced, on whatever disk it is.

    Args:
        durable: True returns when the file and its name are on the disk, and not only in the system's memory.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the error names `path`.
    """
    named, path = Path(path), Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    folder: Path | None = None
    try:
        folder, handle = _make_temporary_folder(path.parent)
        # A short name, because that of `path` may have the greatest length already.
        temporary = folder / f"file{path.suffix[:20]}"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the system applies the umask
        if mode is None:
            mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # Set at the end, because safetensors replaces the temporary file by one with other permissions.
        os.chmod(temporary, mode)
        if durable:
            flush(temporary)
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    except OSError as error:
        within = folder is None or str(error.filename).startswith(str(folder))
        if error.errno is not None and (error.filename is None or within):
            raise OSError(error.errno, os.strerror(error.errno), str(named)) from error
        raise
    except safetensors.SafetensorError as error:  # has the number of the system's error in its text only
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(named)) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _make_temporary_folder(parent: Path) -> tuple[Path, int]:
    """A new folder in `parent` that only this user can read, and the handle of the lock on it."""
    while True:
        folder = parent / f".titok-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        # Between these two lines another process may have taken the folder for an abandoned one.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return folder, lock(folder)


def remove_abandoned(folder: str | os.PathLike[str]) -> None:
    """Removes the temporary folders that killed processes left in `folder`. Those that are in use stay."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if TEMPORARY_FOLDER.fullmatch(entry.name)]
    except OSError:  # there is no such folder, or it cannot be read
        return
    for path in found:
        # An error means that the folder is in use, that another process has just removed it, or that the file system
        # has no locks, so that nothing is known of it.
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(handle)


def lock(path: str | os.PathLike[str], *, shared: bool = False) -> int:
    """Locks a file or folder that exists. Closing the returned handle, or the end of the process, releases it.

    On a file system without locks, the handle holds none.

    Args:
        shared: False lets no other process hold a lock on `path`; True lets others hold shared ones.

    Raises:
        BlockingIOError: another process holds a lock that excludes this one.
        FileNotFoundError: there is no such file or folder.
    """
    while True:
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            return handle
        try:
            current = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            os.close(handle)
            raise
        if current:
            return handle
        os.close(handle)  # the file was replaced by another one before it was locked


def flush(path: str | os.PathLike[str]) -> None:
    """Returns when a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
