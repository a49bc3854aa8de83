"""Memory for feature maps that its owner keeps, so that no call has to ask the operating system for it.

A block of memory that is new from the operating system has to be filled with zeros first, page by page. The C library
returns blocks as large as the feature maps of a pixel decoder after each use, so that this would happen in every call.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, a cache line


class Buffers:
    """Named blocks of memory. Each grows to the largest map that was asked of it, and holds one map at a time."""

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}  # uint8

    def map(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A channels-last map (B, C, H, W) in the block `name`, whose values are undefined.

        It overwrites the map that was in that block before.
        """
        size = math.prod(shape) * dtype.itemsize
        block = self._blocks.pop(name, None)
        if block is None or len(block) < size:
            del block  # the smaller one is freed before the larger one is allocated
            block = _allocate(size)
        self._blocks[name] = block
        batch, channels, height, width = shape
        return block[:size].view(dtype).view(batch, height, width, channels).permute(0, 3, 1, 2)

    def exchange(self, one: str, other: str) -> None:
        """Exchanges the names of two blocks."""
        blocks = {name: self._blocks.pop(old) for name, old in ((one, other), (other, one)) if old in self._blocks}
        self._blocks.update(blocks)


def _allocate(size: int) -> Tensor:
    """`size` bytes. numpy asks the operating system for large pages, which PyTorch does not."""
    with torch.inference_mode(False):  # another call may write to the block outside inference mode
        block = torch.from_numpy(np.empty(size + _ALIGNMENT, np.uint8))
        return block[-block.data_ptr() % _ALIGNMENT :][:size]


class Workspace:
    """The buffers of one owner, for any number of threads.

    The owner keeps it as a plain attribute. A copied or unpickled owner starts with an empty one.
    """

    def __init__(self) -> None:
        self._unused: list[Buffers] = []

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Buffers]:
        """A context with buffers that nobody else uses meanwhile. They are kept for the next context."""
        try:
            buffers = self._unused.pop()
        except IndexError:
            buffers = Buffers()
        try:
            yield buffers
        finally:
            self._unused.append(buffers)

    def release(self) -> None:
        """Frees the buffers, except those that are borrowed at the moment."""
        self._unused.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
