"""What is said about kernels that the build of `titok._C` left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from titok import ops
from titok.ops.core import available


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines of the file beside an extension that is missing; a test appends to them."""
    lines: list[str] = []

    def fail(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(available, "left_out", lambda: lines)
    monkeypatch.setattr(available.importlib, "import_module", fail)
    available._load.cache_clear()
    available._warn_of_failed_build.cache_clear()
    yield lines
    available._load.cache_clear()
    available._warn_of_failed_build.cache_clear()


def quantize() -> None:
    ops.nearest_codebook(torch.ones(3, 4), torch.ones(5, 4))


def test_one_warning_where_an_op_falls_back(without_extension: list[str]) -> None:
    without_extension.append("titok._C: the build failed (no compiler)")
    assert ops.backends()["cpp"].endswith("it was left out of the build: the build failed (no compiler)")
    with pytest.warns(UserWarning, match=r"ops run in plain PyTorch.*titok\._C: the build failed \(no compiler\)"):
        quantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize()


@pytest.mark.parametrize("line", ["titok._C: TITOK_BUILD=none", "the CUDA half of titok._C: no nvcc found"])
def test_no_warning_for_what_was_asked_for(without_extension: list[str], line: str) -> None:
    without_extension.append(line)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize()
