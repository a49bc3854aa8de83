"""Many generated pictures in one .npz, by one process or several, which may be stopped at any moment and started again.

Beside the output lies the folder `<output>.parts`: the settings of the run, and every batch that is done as a file of
its own, named by the samples in it. A part gets its name only when all of it is on the disk, so the names are the
record of what is done. When none is missing, the first process streams them into the output; then the folder goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from titok.checks import labels_on_host
from titok.config import SamplingConfig
from titok.generation.batches import BatchSize, generate_batches
from titok.generation.pipeline import Pipeline

T = TypeVar("T")


def generate_set(
    pipe: Pipeline,
    path: str | os.PathLike[str],
    labels: Tensor | Sequence[int],
    *,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    first_sample: int = 0,
    sampling: SamplingConfig | None = None,
    rounding: Literal["nearest", "truncate"] = "nearest",
    progress: bool | None = None,
) -> None:
    """Writes one picture for each label as the .npz that FID tools read (the layout of ADM, Dhariwal & Nichol 2021):
    `arr_0` uint8 (N, H, W, C), `arr_1` the labels, int64 (N,).

    No process holds more than three batches. Where `torch.distributed` is initialised, every process of the group must
    call this with the same arguments, and each generates a share; all return when the file is in place.

    A run that was stopped, however hard, goes on when it is started again, by any number of processes. With a whole
    number for `batch_size` the file is then, byte for byte, that of a run which was never stopped (on machines and
    thread counts that compute alike).

    Args:
        path: of the .npz; replaced when all is done. Takes the disk space of two such files.
        pipe, labels, batch_size, seed, first_sample, sampling, rounding, progress: as `Pipeline.generate_many`; the bar
            is that of the first process.

    Raises:
        ValueError: what was done already is of other settings or weights (named), or another run is at work on it.
        As `Pipeline.generate_many`.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    labels = labels_on_host(labels, pipe.generator.config.num_classes)
    sampling = sampling or pipe.generator.config.sampling

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        return generate_batches(
            pipe,
            labels[start:stop],
            batch_size=batch_size,
            seed=seed,
            first_sample=first_sample + start,
            sampling=sampling,
            rounding=rounding,
            progress=progress if rank == 0 else False,
        )

    batches(0, len(labels))  # for its checks, before anything is written
    config = pipe.tokenizer.config
    parts = _Parts(Path(path), (*config.image_size, config.channels), len(labels))

    def claim() -> np.ndarray:
        return parts.claim(
            {
                "seed": seed,
                "first_sample": first_sample,
                "pictures": len(labels),
                "labels": hashlib.sha256(labels.numpy().data).hexdigest(),
                "rounding": rounding,
                **{f"sampling.{name}": value for name, value in sampling.to_dict().items()},
                "dtype": str(pipe.generator.dtype).removeprefix("torch."),
                "tokenizer": _fingerprint(pipe.tokenizer),
                "generator": _fingerprint(pipe.generator),
            }
        )

    with contextlib.closing(parts), ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        missing = _in_first_process(claim)
        for start, stop in _share(missing, rank, world, 1 if batch_size == "auto" else batch_size):
            for pictures in batches(start, stop):
                if written is not None:
                    written.result()  # raises what went wrong, such as a full disk
                written = writer.submit(parts.write, start, pictures)
                start += len(pictures)
        if written is not None:
            written.result()
        if _distributed():
            dist.barrier()
        _in_first_process(lambda: parts.join(labels))


def _share(missing: np.ndarray, rank: int, world: int, grid: int) -> list[tuple[int, int]]:
    """The samples [start, stop) that one of `world` processes makes, without holes: its slice of the sorted numbers
    `missing`. Cut at multiples of `grid`, so that batches are the same for any number of processes."""
    cells = np.split(missing, np.flatnonzero(np.diff(missing // grid)) + 1)
    mine = np.concatenate(cells[len(cells) * rank // world : len(cells) * (rank + 1) // world] or [missing[:0]])
    runs = np.split(mine, np.flatnonzero(np.diff(mine) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


class _Part(NamedTuple):
    start: int
    stop: int
    path: Path


class _Parts:
    """The folder of parts. The samples of a part `<start>-<stop>.u8` are uint8 (stop - start, H, W, C)."""

    def __init__(self, output: Path, shape: tuple[int, int, int], count: int) -> None:
        self.output, self.shape, self.count = output, shape, count
        self.folder = output.with_name(f"{output.name}.parts")
        self._lock: int | None = None

    def claim(self, settings: dict[str, Any]) -> np.ndarray:
        """Makes the folder this process's own. The sorted numbers of the samples that are still to be made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however it ends
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process is at work here") from None
        file = self.folder / "settings.json"
        if not file.exists():
            self._clear()  # a run that was stopped when its output was already in place
        elif self._done() and (before := json.loads(file.read_text())) != settings:
            name = next(name for name in {**settings, **before} if settings.get(name) != before.get(name))
            raise ValueError(
                f"{self.folder}: expected {name} {before.get(name)}, as in the run that was stopped here, got "
                f"{settings.get(name)}: run that to its end, or delete the folder"
            )
        _write(file, json.dumps(settings, indent=2).encode())
        missing = np.ones(self.count, dtype=bool)
        for part in self._done():
            missing[part.start : part.stop] = False
        return np.flatnonzero(missing)

    def write(self, start: int, pictures: Tensor) -> None:
        name = f"{start:012}-{start + len(pictures):012}.u8"
        _write(self.folder / name, pictures.contiguous().numpy().data)

    def join(self, labels: Tensor) -> None:
        """Makes the output out of all parts, and removes them."""
        whole = self.folder / "whole.npz"
        with zipfile.ZipFile(whole, "w") as archive:
            # Entries without the time of day: equal pictures are equal files.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                end = 0
                for part in self._done():
                    if part.start != end:
                        raise ValueError(f"{part.path}: expected the samples from {end} on")
                    with part.path.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                    end = part.stop
                if end != self.count:
                    raise ValueError(f"{self.folder}: expected {self.count} samples, got {end}")
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy())
        _flush(whole)
        os.replace(whole, self.output)
        _flush(self.output.parent)
        (self.folder / "settings.json").unlink()  # first: parts without settings are nothing to go on with
        self._clear()
        (self.folder / "lock").unlink()
        with contextlib.suppress(OSError):  # there is something in it that is not ours
            self.folder.rmdir()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _done(self) -> list[_Part]:
        """The parts that are there, in order."""
        found = []
        for path in self.folder.glob("*.u8"):
            if match := re.fullmatch(r"(\d+)-(\d+)\.u8", path.name):
                found.append(_Part(int(match[1]), int(match[2]), path))
        return sorted(found)

    def _clear(self) -> None:
        for path in [*(part.path for part in self._done()), *self.folder.glob("*.unfinished")]:
            path.unlink()


def _write(path: Path, data: Any) -> None:
    """A file that has its name only when all of it is on the disk."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(data)
    _flush(unfinished)
    os.replace(unfinished, path)


def _flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fingerprint(model: nn.Module) -> str:
    """Of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _in_first_process(work: Callable[[], T]) -> T:
    """What `work` gives or raises in the first process of the group, in all of them."""
    if not _distributed():
        return work()
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = work()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]
