"""The folder of a training run: which files it has, and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from titok.checkpoints.writing import lock, remove_abandoned
from titok.processes import in_first_process

PathLike = str | os.PathLike[str]

CHECKPOINT = "training.safetensors"
METRICS = "metrics.jsonl"
PICTURES = "pictures"
RAW = "raw"  # the folder of the weights that are not averaged, where the model's own files hold averages


class RunFolder:
    """The folder of a run, locked until `close` is called or the process ends; a context manager.

    A folder that this object made is removed at the end, if it is empty then. Of several processes that train
    together, the first makes and locks the folder.

    Attributes:
        path: of the folder.

    Raises:
        FileExistsError: the folder holds a run and `resume` is False.
        ValueError: another run is at work in the folder.
    """

    def __init__(self, path: PathLike, *, resume: bool) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._lock: int | None = None
        in_first_process(lambda: self._open(resume))

    def _open(self, resume: bool) -> None:
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.path)
        except (BlockingIOError, FileNotFoundError):  # the other run may just remove its folder
            raise ValueError(f"{self.path}: another training run is at work here") from None
        for folder in (self.path, self.path / RAW, self.path / PICTURES):
            remove_abandoned(folder)
        if self.checkpoint.exists() and not resume:
            self.close()
            raise FileExistsError(
                f"{self.path}: a training run is here already: resume it, or choose another folder"
            )

    @property
    def checkpoint(self) -> Path:
        """The path of the run's checkpoint."""
        return self.path / CHECKPOINT

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is None:
            return
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(folder: PathLike | RunFolder, *, resume: bool) -> contextlib.AbstractContextManager[RunFolder]:
    """The folder of a run as a context manager: `RunFolder(folder)`, or one that its owner closes, as it is."""
    if isinstance(folder, RunFolder):
        return contextlib.nullcontext(folder)
    return RunFolder(folder, resume=resume)
