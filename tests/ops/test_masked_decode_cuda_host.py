"""The CUDA kernels of `masked_decode_step`, built for the host with their threads in lock-step: the plain path's bits.

Blocks of 64 threads, V cut into chunks of 256 codes: up to five chunks, the last of them not full.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cuda_host.host_kernel import build_once
from cuda_host.masked_kernel import load
from decode_cases import random_call
from titok.ops import DecodeStep, masked_decode_step

ORDERS = (0, 1, 2)  # threads and blocks ascending, descending, scrambled
CHUNKS = (256, 256, 512, 1280)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DecodeStep]:
    library = build_once(tmp_path_factory.mktemp("cuda_host"))
    if library is None:
        pytest.skip("needs g++")
    return load(library)


def assert_same_bits(want: DecodeStep, got: DecodeStep, number: int = 0) -> None:
    for name, expected, found in zip(want._fields, want, got, strict=True):
        assert (expected is None) == (found is None), (number, name)
        assert expected is None or torch.equal(expected, found), (number, name, expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(120))
def test_random_calls(kernel: Callable[..., DecodeStep], number: int) -> None:
    tensors, arguments = random_call(number, codes=(1, 2, 7, 255, 256, 1000, 1031), most_tokens=3)
    if number % 7 == 0:
        tensors = (tensors[0], *(None if t is None else t.half() for t in tensors[1:]))
    want = masked_decode_step(*tensors, **arguments, backend="plain")
    assert_same_bits(want, kernel(tensors, arguments, CHUNKS[number % 4], ORDERS[number % 3]), number)


@pytest.mark.parametrize("policy", ["count", "top_k", "threshold", "entropy", "leftmost", "factor"])
def test_policies_among_many_tied_positions(kernel: Callable[..., DecodeStep], policy: str) -> None:
    """More positions than threads, few distinct confidences: the position decides. In place, with rows of logits."""
    length, codes = 150, 5
    tokens = torch.where(torch.arange(length) % 7 == 3, 2, codes)[None].repeat(2, 1)
    logits = torch.randn(3, codes, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(length).remainder(3)[None].repeat(2, 1)
    for number, count in enumerate((0, 1, 50)):
        arguments = {"policy": policy, "count": count, "threshold": 0.5, "entropy_bound": 20.0, "factor": 5.0}
        arguments |= {"mask_token": codes, "window": (5, 140), "step": 3, "edit_threshold": 0.4, "renoise": True}
        step_map = torch.full((2, length), -1, dtype=torch.int32)
        given = {**arguments, "step_map": step_map}
        want = masked_decode_step(tokens, logits, **given, rows=rows, backend="plain")
        copy = {**arguments, "step_map": step_map.clone()}
        got = kernel((tokens.clone(), logits, None), copy, 256, number, rows=rows, in_place=True)
        assert_same_bits(want, got)
        assert want.step_map is not None
        assert (want.step_map == 3).any()


def test_the_draw_of_a_wide_row(kernel: Callable[..., DecodeStep]) -> None:
    """Chunks of several segments for each warp, drawn, greedy and truncated in one batch."""
    codes = 5000
    logits = 2 * torch.randn(4, 2, codes, generator=torch.Generator().manual_seed(1))
    tokens = torch.full((4, 2), codes)
    arguments = {
        "policy": "leftmost",
        "count": 2,
        "mask_token": codes,
        "return_log_probabilities": True,
        "seed": 3,
    }
    arguments |= {"temperature": torch.tensor([0.0, 1.0, 1.0, 0.7])}
    arguments |= {"top_k": torch.tensor([0, 0, 40, 0]), "top_p": torch.tensor([1.0, 1.0, 1.0, 0.8])}
    want = masked_decode_step(tokens, logits, **arguments, backend="plain")
    assert_same_bits(want, kernel((tokens, logits, None), arguments, 2048, 2))
