"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before any import of one


def _widen_bfloat16_dots() -> None:
    """Triton's interpreter keeps bfloat16 as its 16 bits and multiplies them as integers (3.6 to 3.9): widen first."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    import numpy as np
    import triton.language as tl

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = patched


_widen_bfloat16_dots()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
