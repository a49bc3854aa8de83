"""The figures of a training run: `metrics.jsonl` in its folder, and trackers that show them elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from titok.checkpoints.writing import atomic_path
from titok.training.folder import METRICS, PathLike

# Entries that tell how fast a run was. Two runs that are equal in all else differ in them.
SPEED = ("images_per_second", "waiting_for_data")


class Tracker(Protocol):
    """Receives what a run measures. Only the first of several processes calls it."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Takes the figures of the steps since the last call."""

    def picture(self, step: int, path: Path) -> None:
        """Takes a PNG that the run has written."""

    def close(self) -> None:
        """Ends the run."""


def read_metrics(folder: PathLike) -> list[dict[str, float]]:
    """The entries of a run's `metrics.jsonl`, each with "step" and figures; an unfinished last line is left out.

    Raises:
        ValueError: a line is no JSON object of numbers.
    """
    path = Path(folder) / METRICS
    if not path.exists():
        return []
    entries = []
    *lines, _unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not all(type(value) in (int, float) for value in entry.values()):
            raise ValueError(f"{path}:{number}: expected a JSON object of numbers, got {line!r:.80}")
        if type(entry.get("step")) is not int:
            raise ValueError(f"{path}:{number}: expected an int 'step', got {entry.get('step')!r:.80}")
        entries.append(entry)
    return entries


class Metrics:
    """Appends to the `metrics.jsonl` of a run that has done `step` steps. Entries of later steps are removed.

    There are such entries where a run was killed after its last checkpoint: it does these steps again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / METRICS
        kept = [entry for entry in read_metrics(folder) if entry["step"] <= step]
        text = "".join(_line(entry) for entry in kept)
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        self._path, self._file = path, path.open("ab", buffering=0)

    def append(self, entry: dict[str, float]) -> None:
        """Writes one line."""
        try:
            self._file.write(_line(entry).encode())
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error

    def flush(self) -> None:
        """Returns when all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


class TensorBoard:
    """A tracker that writes TensorBoard's event files into a folder. It needs the package tensorboard."""

    def __init__(self, folder: PathLike) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, figures: dict[str, float]) -> None:
        """See `Tracker`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A tracker that sends figures and pictures to Weights & Biases. It needs the package wandb.

    Args:
        options: of `wandb.init`, such as project and name.
    """

    def __init__(self, **options: Any) -> None:
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(**options)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(figures, step=step)

    def picture(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        self._run.log({path.stem: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
