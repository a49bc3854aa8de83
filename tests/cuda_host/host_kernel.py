"""Builds the CUDA kernels of both decode steps for the host, and calls that of `maskgit_decode_step`."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskgit_cases import DTYPES, order_of
from titok.ops import pack_step_params

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas")


class DecodeArgs(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "cond", "uncond", "rows", "uncond_rows", "keep", "params_at")
        ),
        *((f"{row}_stride_{axis}", ctypes.c_int64) for row in ("cond", "uncond") for axis in "bn"),
        ("cond_rows_count", ctypes.c_int64),
        ("uncond_rows_count", ctypes.c_int64),
        ("mask_token", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("batch", "length", "codes", "dtype")),
        ("maskgit", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("out", "confidence", "drawn", "arrivals", "order")),
        ("params", ctypes.c_int32 * 10),
    )


Kernel = Callable[..., tuple[Tensor, Tensor]]


def build(compiler: str, library: Path, flags: Sequence[str] = ()) -> None:
    """Compiles tests/cuda_host/ into a shared library, with these flags behind the usual ones."""
    sources = (str(ROOT / "tests" / "cuda_host" / f"{name}.cpp") for name in ("maskgit_decode", "masked_decode"))
    command = [compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(library)]
    subprocess.run(command, check=True)


def build_once(folder: Path) -> Path | None:
    """The shared library: that of `make sanitize` under it, else built into this folder; None without a compiler."""
    if (built := os.environ.get("TITOK_TEST_CUDA_HOST")) is not None:
        return Path(built)
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    build(compiler, folder / "kernel.so")
    return folder / "kernel.so"


def load(library: Path) -> Kernel:
    """The kernel as a function of a case of tests/maskgit_cases.py."""
    function = ctypes.CDLL(str(library)).maskgit_decode_on_host

    def run(
        case: tuple,
        threads: int,
        rounds: int,
        order: int,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """New tokens and confidences.

        Args:
            threads: of a block.
            rounds: that are held in registers, or 0 for any number of codes.
            order: in which threads and blocks run: 0 ascending, 1 descending, 2 scrambled.
            in_place: whether the new tokens are written over the tokens.
        """
        (tokens, cond, uncond), numbers = case[0], dict(case[1])
        mask_token = numbers.pop("mask_token")
        packed = pack_step_params(**numbers)
        new = tokens.clone() if in_place else torch.full_like(tokens, -7)
        confidence = torch.full(tokens.shape, torch.nan)
        drawn = torch.full(tokens.shape, -7, dtype=torch.int32)
        arrivals = torch.zeros(len(tokens), dtype=torch.int32)
        positions = torch.full((2, *tokens.shape), -7)
        args = DecodeArgs(
            tokens=(new if in_place else tokens).data_ptr(),
            cond=cond.data_ptr(),
            uncond=None if uncond is None else uncond.data_ptr(),
            rows=None if rows is None else rows.data_ptr(),
            uncond_rows=None if rows is None else rows.data_ptr(),
            keep=None if keep is None else keep.data_ptr(),
            params_at=packed.data_ptr(),
            cond_stride_b=cond.stride(0),
            cond_stride_n=cond.stride(-2),
            uncond_stride_b=0 if uncond is None else uncond.stride(0),
            uncond_stride_n=0 if uncond is None else uncond.stride(-2),
            cond_rows_count=len(cond),
            uncond_rows_count=0 if uncond is None else len(uncond),
            mask_token=mask_token,
            batch=tokens.shape[0],
            length=tokens.shape[1],
            codes=cond.shape[-1],
            dtype=DTYPES.index(cond.dtype),  # the order of csrc's DType
            maskgit=numbers["confidence"] == "maskgit",
            out=new.data_ptr(),
            confidence=confidence.data_ptr(),
            drawn=drawn.data_ptr(),
            arrivals=arrivals.data_ptr(),
            order=positions.data_ptr(),
        )
        assert function(ctypes.byref(args), threads, rounds, order) == 0
        assert not arrivals.any()  # a launch leaves the counters as it found them
        assert torch.equal(positions, order_of(new == mask_token))
        return new, confidence

    return run
