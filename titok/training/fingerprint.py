"""Hashes of training data, by which a resumed run knows whether its data are still the same."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS_AT_A_TIME = 1 << 16
MAX_HASHED_BYTES = 1 << 30  # of the contents of files: some seconds of reading
SAMPLED_FILES = 4096  # of a larger set. A change of 1 file in 1,000 is then found with a probability of 98%.


def of_tensor(tensor: Tensor) -> str:
    """A hash of shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_integers(tensor: Tensor) -> str:
    """The hash by `of_tensor` of the same integers as int64, without a copy of all of them."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {torch.int64}".encode())
    for rows in tensor.split(ROWS_AT_A_TIME):
        digest.update(rows.long().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_weights(weights: Mapping[str, Tensor]) -> str:
    """A hash of the names, shapes, dtypes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {of_tensor(tensor)}\n".encode())
    return digest.hexdigest()


def of_images(images: Any) -> dict[str, str]:
    """Hashes of a tensor of images, or of the files at `images.paths`, as entries of a run's data.

    "pictures" is a hash of the tensor, or of the names, sizes and contents of the files. Names count from the folder
    that all files share, so a folder may be moved.

    Files of more than `MAX_HASHED_BYTES` in all would take long to read: those of ImageNet, 140 GB, an hour from a
    disk with 40 MB/s. Of such a set, "pictures" is a hash of all names and sizes, and of the contents of
    `SAMPLED_FILES` files, which a seeded generator draws, up to `MAX_HASHED_BYTES`. "times" is a hash of all
    modification times. Where "times" is as it was, no file has been written since. Where it differs, as it does for a
    copy, the names, the sizes and the drawn contents decide, and `Run` warns that it relied on them.

    Other objects that return images by index have no hashes, because two readings of one index may differ.
    """
    if isinstance(images, Tensor):
        return {"pictures": of_tensor(images)}
    paths = getattr(images, "paths", None)
    return _of_files(paths) if paths else {}


def _of_files(paths: Sequence[Path]) -> dict[str, str]:
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    status = [os.stat(path) for path in paths]
    sampled = _sampled([entry.st_size for entry in status])
    digest, times = hashlib.sha256(), hashlib.sha256()
    for number, (path, entry) in enumerate(zip(paths, status, strict=True)):
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if number in sampled else ""
        name = os.path.relpath(path, shared)
        digest.update(f"{name!r} {entry.st_size} {content}\n".encode(errors="surrogateescape"))
        times.update(f"{entry.st_mtime_ns}\n".encode())
    hashes = {"pictures": digest.hexdigest()}
    return hashes if len(sampled) == len(paths) else {**hashes, "times": times.hexdigest()}


def _sampled(sizes: Sequence[int]) -> set[int]:
    """The numbers of the files whose contents are hashed, of files of these sizes in bytes."""
    if sum(sizes) <= MAX_HASHED_BYTES:
        return set(range(len(sizes)))
    drawn = random.Random(0).sample(range(len(sizes)), min(SAMPLED_FILES, len(sizes)))
    sampled: set[int] = set()
    total = 0
    for number in drawn:
        if total + sizes[number] <= MAX_HASHED_BYTES:
            total += sizes[number]
            sampled.add(number)
    return sampled
