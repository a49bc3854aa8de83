"""The CUDA kernel of `maskgit_decode_step`, built for the host with its threads in lock-step: the plain path's bits."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgit_cases import DTYPES, Case, random_case
from titok.ops import maskgit_decode_step, pack_step_params

ROOT = Path(__file__).parents[2]
BLOCKS = ((64, 0), (64, 1), (64, 3), (256, 2))  # threads, rounds held in registers (0: any number of codes)
ORDERS = (0, 1, 2)  # threads and blocks ascending, descending, scrambled


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
        *((name, ctypes.c_void_p) for name in ("out", "confidence", "drawn", "arrivals")),
        ("params", ctypes.c_int32 * 10),
    )


Kernel = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda_host") / "kernel.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'csrc'}",
    ]
    source = ROOT / "tests" / "cuda_host" / "maskgit_decode.cpp"
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).maskgit_decode_on_host

    def run(
        case: Case,
        threads: int,
        rounds: int,
        order: int,
        rows: Tensor | None = None,
        keep: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        tokens, cond, uncond = case.tensors
        numbers = dict(case.arguments)
        mask_token = numbers.pop("mask_token")
        packed = pack_step_params(**numbers)
        new = tokens.clone() if in_place else torch.full_like(tokens, -7)
        confidence = torch.full(tokens.shape, torch.nan)
        drawn = torch.full(tokens.shape, -7, dtype=torch.int32)
        arrivals = torch.zeros(len(tokens), dtype=torch.int32)
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
        )
        assert function(ctypes.byref(args), threads, rounds, order) == 0
        assert not arrivals.any()  # a launch leaves the counters as it found them
        return new, confidence

    return run


def expected(case: Case, **overrides: object) -> tuple[Tensor, Tensor]:
    result = maskgit_decode_step(
        *case.tensors, **{**case.arguments, **overrides}, return_confidence=True, backend="plain"
    )
    assert isinstance(result, tuple)
    return result


def assert_same_bits(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].view(torch.int32), want[1].view(torch.int32))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(120))
def test_random_cases(kernel: Kernel, number: int) -> None:
    case = random_case(number, codes=(1, 2, 7, 255, 256, 1000, 1031), most_tokens=7)
    (threads, rounds), order = list(itertools.product(BLOCKS, ORDERS))[number % 12]
    if rounds and case.tensors[1].shape[-1] > threads * 8 * rounds:
        threads, rounds = 64, 0
    assert_same_bits(kernel(case, threads, rounds, order), expected(case))


@pytest.mark.parametrize("order", ORDERS)
def test_every_block_shape_at_its_full_width(kernel: Kernel, order: int) -> None:
    for threads, rounds in BLOCKS:
        case = random_case(3 * order, codes=(threads * 8 * (rounds or 2),), most_tokens=3)
        assert_same_bits(kernel(case, threads, rounds, order), expected(case))


def test_selection_among_many_tied_positions(kernel: Kernel) -> None:
    """More positions than threads, few distinct confidences: position decides, in place."""
    length, codes = 150, 5
    tokens = torch.where(torch.arange(length) % 7 == 3, 2, codes)[None]
    cond = torch.arange(length)[None, :, None].remainder(3).float().expand(1, length, codes).contiguous()
    for keep in (1, 50, 128):
        arguments = {"step": 0, "steps": 2, "num_masked": keep, "mask_token": codes}
        case = Case((tokens, cond, None), {**arguments, "confidence": "titok"})
        for order in ORDERS:
            assert_same_bits(kernel(case, 64, 1, order, in_place=True), expected(case))


def test_rows_and_counts_by_sample(kernel: Kernel) -> None:
    case = random_case(5, codes=(33,), most_tokens=7)
    (tokens, cond, _), arguments = case
    tokens = torch.full_like(tokens, arguments["mask_token"])
    keep = torch.arange(len(tokens)) % 3
    flat = cond.flatten(0, 1)
    shuffle = torch.randperm(len(flat))
    rows = torch.empty_like(shuffle).scatter_(0, shuffle, torch.arange(len(flat))).view(tokens.shape)
    want = expected(Case((tokens, cond, None), arguments), num_masked=keep)
    packed = Case((tokens, flat[shuffle], None), arguments)
    assert_same_bits(kernel(packed, 64, 1, 0, rows=rows, keep=keep), want)
