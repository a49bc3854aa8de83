"""`masked_decode_step` over any split of the codes: the bits of the undivided step, for every back end."""

from __future__ import annotations

import random

import pytest
import torch

from decode_cases import random_call, random_split, split_step
from titok.ops import (
    DecodeStep,
    begin_masked_decode,
    finish_masked_decode,
    masked_decode_partial,
    masked_decode_reduce,
    masked_decode_step,
)
from titok.ops.core.available import why_no_cpp, why_no_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton's tensors
NEEDS_CPP = pytest.mark.skipif(bool(why_no_cpp()), reason=str(why_no_cpp()))
NEEDS_TRITON = pytest.mark.skipif(bool(why_no_triton()), reason=str(why_no_triton()))


def assert_equal(want: DecodeStep, got: DecodeStep, number: int) -> None:
    for name, expected, found in zip(want._fields, want, got, strict=True):
        assert (expected is None) == (found is None), (number, name)
        assert expected is None or torch.equal(expected, found.cpu()), (number, name)


@pytest.mark.parametrize("backend", ["plain", pytest.param("cpp", marks=NEEDS_CPP)])
def test_any_split_gives_the_same_bits(backend: str) -> None:
    for number in range(12 if backend == "plain" else 60):
        tensors, arguments = random_call(number)
        slices = random_split(tensors[1].shape[-1], random.Random(number))
        want = masked_decode_step(*tensors, **arguments, backend="plain")
        assert_equal(want, split_step(tensors, arguments, slices, backend), number)


@NEEDS_TRITON
def test_any_split_gives_the_same_bits_in_triton() -> None:
    for number in range(3):
        tensors, arguments = random_call(number, codes=(21,), most_tokens=2)
        arguments |= {"top_k": 0, "top_p": 1.0}
        want = masked_decode_step(*tensors, **arguments, backend="plain")
        moved = tuple(None if t is None else t.to(DEVICE) for t in tensors)
        given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert_equal(want, split_step(moved, given, [(4, 1), (17, 2)], "triton"), number)


@pytest.mark.slow
@NEEDS_CPP
def test_ranks_of_a_language_model() -> None:
    """126,464 codes over 1, 3 and 8 ranks, bfloat16, drawn and greedy."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 4, 126_464, generator=generator)).bfloat16()
    tokens = torch.full((2, 4), 126_336)
    arguments = {"mask_token": 126_336, "policy": "entropy", "entropy_bound": 6.0}
    arguments |= {"temperature": torch.tensor([0.0, 1.0]), "seed": 3, "top_p": 0.9}
    want = masked_decode_step(tokens, logits, **arguments)
    for ranks in (1, 3, 8):
        size = -(-126_464 // ranks)
        slices = [(min(size, 126_464 - size * i), 1) for i in range(ranks)]
        assert_equal(want, split_step((tokens, logits, None), arguments, slices, "cpp"), ranks)


def test_rows_and_wrong_arguments() -> None:
    tokens, logits = torch.full((2, 3), 9), torch.randn(4, 9)
    rows = torch.tensor([[0, 3, 1], [2, 2, 0]])
    decode = begin_masked_decode(tokens, 9, policy="leftmost", count=3, mask_token=9)
    with pytest.raises(ValueError, match=r"^decode: "):
        finish_masked_decode(decode)
    with pytest.raises(ValueError, match=r"^first_code: "):
        masked_decode_partial(decode, logits, first_code=1, first_chunk=0, rows=rows)
    with pytest.raises(ValueError, match=r"^chunks: "):
        masked_decode_partial(decode, logits, first_code=0, first_chunk=0, chunks=10, rows=rows)
    with pytest.raises(ValueError, match=r"^partials: "):
        masked_decode_reduce(decode, torch.zeros(2, 3, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^num_codes: "):
        begin_masked_decode(tokens, 0, policy="leftmost", mask_token=9)
    for _ in decode.stages:
        decode = masked_decode_reduce(
            decode, masked_decode_partial(decode, logits, first_code=0, first_chunk=0, rows=rows)
        )
    assert torch.equal(finish_masked_decode(decode).tokens, logits.argmax(-1)[rows])
    with pytest.raises(ValueError, match=r"^decode: "):
        masked_decode_partial(decode, logits, first_code=0, first_chunk=0, rows=rows)
