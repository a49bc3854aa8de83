"""Writes many generated pictures into one .npz, by one process or several; a run that was killed can go on later.

Beside the output lies the folder `<output>.parts`, which may be a link to another disk. It holds the settings of the
run, and each finished batch as a file, a part, that is named by the samples in it and ends with a checksum. A part
gets its name only when all of it is on the disk. Parts that are damaged all the same are removed and generated again.
When no sample is missing, the first process joins the parts into the output, reads it once to verify it, and removes
the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from titok.checkpoints.files import read_json
from titok.checkpoints.writing import atomic_path, lock, remove_abandoned
from titok.config import Rounding, SamplingConfig
from titok.generation.batches import BatchSize, check_batch_size
from titok.generation.pipeline import Pipeline
from titok.generation.request import GenerationRequest
from titok.inference.prepared import stored_values
from titok.processes import in_first_process, is_distributed, wait_for_all

CHECKSUM_BYTES = 32  # of SHA-256, at the end of a part


def generate_set(
    pipe: Pipeline,
    path: str | os.PathLike[str],
    labels: Tensor | Sequence[int],
    *,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    first_sample: int = 0,
    sampling: SamplingConfig | None = None,
    rounding: Rounding = "nearest",
    progress: bool | None = None,
) -> None:
    """Writes one picture for each label into an .npz that FID tools read.

    Its layout is that of ADM (Dhariwal & Nichol 2021). The file holds `arr_0`, the pictures, uint8 (N, H, W, 3),
    grey ones as RGB too, and `arr_1`, the labels, int64 (N,). No process holds more than three batches. Where
    `torch.distributed` is initialised, every process of the group must call this with the same arguments. Each
    generates a share, and all return when the file is in place.

    A run that was stopped, however abruptly, goes on when it is started again, by any number of processes. With an
    int for `batch_size` the file is then, byte for byte, that of a run that was never stopped, on machines and
    numbers of threads whose computations agree.

    Args:
        path: of the .npz, which is replaced when all is done. The run takes the disk space of two such files.
        progress: as `Pipeline.generate_many`; the bar is that of the first process.
        labels, batch_size, seed, first_sample, sampling, rounding: as `Pipeline.generate_many`.

    Raises:
        TypeError, ValueError: as `Pipeline.generate_many`.
        ValueError: what is done already has other settings or weights (the message names one), or another run is
            writing this file.
        ConnectionError: another process of the group has ended.
        OSError: a file cannot be written, for example because the disk is full; the message names it.
    """
    request = GenerationRequest.checked(
        pipe.generator.config, labels, seed=seed, first_sample=first_sample, sampling=sampling, rounding=rounding
    )
    batch_size = check_batch_size(batch_size)
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
    tokenizer = pipe.tokenizer.config
    parts = _Parts(Path(path), (*tokenizer.image_size, 3), len(request))
    with contextlib.closing(parts):
        missing = in_first_process(lambda: parts.claim(_settings(pipe, request)))
        if rank > 0:
            parts.share()
        ranges = _share(missing, rank, world, 1 if batch_size == "auto" else batch_size)
        _generate_parts(pipe, request, ranges, parts, batch_size, progress if rank == 0 else False)
        wait_for_all()
        in_first_process(lambda: parts.join(request.labels))


def _settings(pipe: Pipeline, request: GenerationRequest) -> dict[str, Any]:
    """What the pictures depend on, as JSON can hold it. A run goes on only with equal settings."""
    return {
        "seed": request.seed,
        "first_sample": request.first_sample,
        "pictures": len(request),
        "labels": hashlib.sha256(request.labels.numpy().data).hexdigest(),
        "rounding": request.rounding,
        **{f"sampling.{name}": value for name, value in request.sampling.to_dict().items()},
        "dtype": pipe.generator.precision,
        "tokenizer": _fingerprint(pipe.tokenizer),
        "generator": _fingerprint(pipe.generator),
    }


def _generate_parts(
    pipe: Pipeline,
    request: GenerationRequest,
    ranges: list[tuple[int, int]],
    parts: _Parts,
    batch_size: BatchSize,
    progress: bool | None,
) -> None:
    """Generates the samples of `ranges`. A thread writes each batch while the next one is generated."""
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for start, stop in ranges:
            for pictures in pipe.generate_batches(
                request.part(start, stop), batch_size=batch_size, progress=progress
            ):
                if written is not None:
                    written.result()  # raises the error of that write, such as a full disk
                written = writer.submit(parts.write, start, pictures.expand(-1, -1, -1, 3))  # grey becomes RGB
                start += len(pictures)
        if written is not None:
            written.result()


def _share(missing: np.ndarray, rank: int, world: int, batch_size: int) -> list[tuple[int, int]]:
    """The ranges [start, stop) of samples that process `rank` of `world` generates.

    Samples are dealt out in cells, which begin at multiples of `batch_size`, so that the batches are the same for
    any number of processes.

    Args:
        missing: the sorted numbers of all samples that are still to be generated.
    """
    cells = np.split(missing, np.flatnonzero(np.diff(missing // batch_size)) + 1)
    own_cells = cells[len(cells) * rank // world : len(cells) * (rank + 1) // world]
    own = np.concatenate(own_cells or [missing[:0]])
    ranges = np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
    return [(int(samples[0]), int(samples[-1]) + 1) for samples in ranges if len(samples)]


class _Part(NamedTuple):
    """A file with the samples `start` to `stop` - 1."""

    start: int
    stop: int
    path: Path


class _Parts:
    """The folder of parts. A part `<start>-<stop>.u8` is uint8 (stop - start, H, W, 3), then its checksum.

    The first process of a run holds the lock on the file `lock`, and each other process a shared lock on the folder. A
    run starts only where neither is held: a process may outlive the first one by the time that its share takes. On a
    file system without locks such a process may leave parts that overlap with others. Their samples are equal, up to
    the rounding that `Pipeline.generate_many` describes.

    Args:
        output: path of the .npz.
        shape: (H, W, 3) of a picture.
        count: pictures of the whole set.
    """

    def __init__(self, output: Path, shape: tuple[int, int, int], count: int) -> None:
        self.output, self.shape, self.count = output, shape, count
        self.folder = output.with_name(f"{output.name}.parts")
        self._lock: int | None = None

    def claim(self, settings: dict[str, Any]) -> np.ndarray:
        """Locks the folder for this run, whose first process this is, and records the settings.

        Returns:
            the sorted numbers of the samples that are still to be generated.

        Raises:
            ValueError: another process holds a lock, or there are parts of other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            (self.folder / "lock").touch()
            self._lock = lock(self.folder / "lock")
            os.close(lock(self.folder))
        except (BlockingIOError, FileNotFoundError):  # the other run may just remove the file
            raise ValueError(f"{self.folder}: another process is at work here") from None
        remove_abandoned(self.folder)
        remove_abandoned(os.path.dirname(os.path.realpath(self.output)))
        file = self.folder / "settings.json"
        if not file.exists():
            self._clear()  # what a run left that was killed after its output was in place
        elif self._parts() and (before := read_json(file)) != settings:
            missing_name = object()  # None may be a value
            name = next(
                name
                for name in {**settings, **before}
                if settings.get(name, missing_name) != before.get(name, missing_name)
            )
            raise ValueError(
                f"{self.folder}: expected {_printable(name)} {_printable(before.get(name))}, as in the run that was "
                f"stopped here, got {_printable(settings.get(name))}: run that to its end, or delete the folder"
            )
        _write(file, json.dumps(settings, indent=2).encode())
        missing = np.ones(self.count, dtype=bool)
        for part in self._parts():
            if self._read(part) is None:
                part.path.unlink()
            else:
                missing[part.start : part.stop] = False
        return np.flatnonzero(missing)

    def share(self) -> None:
        """Takes the lock of a process that is not the first one of its run.

        Raises:
            ValueError: a process of another run holds a lock, because the first one of this run has ended.
        """
        try:
            self._lock = lock(self.folder, shared=True)
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"{self.folder}: another process is at work here") from None

    def write(self, start: int, pictures: Tensor) -> None:
        """Writes a batch (B, H, W, 3) whose first sample is `start`."""
        name = f"{start:012}-{start + len(pictures):012}.u8"
        data = pictures.contiguous().flatten().numpy().data
        _write(self.folder / name, data, _checksum(start, start + len(pictures), data))

    def join(self, labels: Tensor) -> None:
        """Joins all parts into the output, verifies it and removes the parts.

        Raises:
            ValueError: samples are missing, or a file is damaged; all parts stay.
        """
        with atomic_path(self.output, durable=True) as joined:
            self._join(joined, labels)
        # The settings go first: parts without settings are those of a finished run, which `claim` deletes.
        (self.folder / "settings.json").unlink()
        self._clear()
        (self.folder / "lock").unlink()
        with contextlib.suppress(OSError):  # somebody else's file is in the folder
            self.folder.rmdir()

    def _join(self, joined: Path, labels: Tensor) -> None:
        """Writes all parts and the labels into the file `joined`, and verifies it."""
        with zipfile.ZipFile(joined, "w") as archive:
            # `ZipInfo` sets no time of day, so that equal pictures give equal files.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
                np.lib.format.write_array_header_1_0(file, header)
                end = 0
                for part in self._parts():
                    if part.stop <= end:
                        continue
                    if part.start > end:
                        raise ValueError(f"{part.path}: expected the samples from {end} on")
                    pictures = self._read(part)
                    if pictures is None:
                        raise ValueError(f"{part.path}: damaged since it was written: start the run again")
                    file.write(pictures[(end - part.start) * math.prod(self.shape) :])
                    end = part.stop
                if end != self.count:
                    raise ValueError(f"{self.folder}: expected {self.count} samples, got {end}")
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels.numpy())
        with zipfile.ZipFile(joined) as archive:
            if archive.testzip() is not None:
                raise ValueError(f"{self.output}: its content is not what was written: start the run again")

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            os.close(self._lock)

    def _parts(self) -> list[_Part]:
        """The finished parts, by their first sample."""
        found = []
        for path in self.folder.glob("*.u8"):
            if match := re.fullmatch(r"(\d+)-(\d+)\.u8", path.name):
                found.append(_Part(int(match[1]), int(match[2]), path))
        return sorted(found)

    def _read(self, part: _Part) -> memoryview | None:
        """The pictures of a part as bytes. None where its size or its content is not what was written."""
        size = (part.stop - part.start) * math.prod(self.shape)
        if part.path.stat().st_size != size + CHECKSUM_BYTES:
            return None
        content = memoryview(part.path.read_bytes())
        pictures = content[:size]
        return pictures if content[size:] == _checksum(part.start, part.stop, pictures) else None

    def _clear(self) -> None:
        for part in self._parts():
            part.path.unlink()


def _checksum(start: int, stop: int, pictures: bytes | memoryview) -> bytes:
    """The SHA-256 of a part's range and pictures, so that a renamed part is found, too."""
    digest = hashlib.sha256(f"{start}-{stop}:".encode())
    digest.update(pictures)
    return digest.digest()


def _write(path: Path, *pieces: Any) -> None:
    """Writes a file that gets its name only when all of it is on the disk."""
    with atomic_path(path, durable=True) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def _printable(value: Any) -> str:
    """A value of damaged settings as at most 100 characters on one line."""
    return f"{value!s:.100}".encode("unicode_escape").decode()


def _fingerprint(model: nn.Module) -> str:
    """A hash of all names, shapes, dtypes and values of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(stored_values(model)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
