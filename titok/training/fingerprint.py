"""Hashes of training data, by which a resumed run knows whether its data are still the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def of_tensor(tensor: Tensor) -> str:
    """A hash of shape, dtype and values."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_images(images: Any) -> str | None:
    """A hash of a tensor of images, or of the names and contents of the files at `images.paths`.

    Names count from the folder that all files share, so a folder may be moved. None for other objects that return
    images by index, because two readings of one index may differ.
    """
    if isinstance(images, Tensor):
        return of_tensor(images)
    paths = getattr(images, "paths", None)
    if not paths:
        return None
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    digest = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        digest.update(f"{os.path.relpath(path, shared)!r} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
