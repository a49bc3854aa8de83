"""The CUDA kernel of `maskgit_decode_step`, built for the host with its threads in lock-step: the plain path's bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cuda_host.host_kernel import Kernel, build_once, load
from maskgit_cases import Case, random_case
from titok.ops import maskgit_decode_step

BLOCKS = ((64, 0), (64, 1), (64, 3), (256, 2))  # threads, rounds held in registers (0: any number of codes)
ORDERS = (0, 1, 2)  # threads and blocks ascending, descending, scrambled


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    library = build_once(tmp_path_factory.mktemp("cuda_host"))
    if library is None:
        pytest.skip("needs g++")
    return load(library)


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
