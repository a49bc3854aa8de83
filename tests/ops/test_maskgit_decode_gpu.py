"""`maskgit_decode_step` on a GPU: the plain path's bits, and one captured graph for all seeds and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from maskgit_cases import random_case
from titok.ops import maskgit_decode_step, maskgit_decode_step_packed, pack_step_params


def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    result = maskgit_decode_step(*args, **kwargs, return_confidence=True)
    assert isinstance(result, tuple)
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(60))
def test_the_gpu_gives_the_plain_paths_bits(number: int) -> None:
    case = random_case(number, codes=(1, 7, 255, 1000, 1031, 4096, 8192, 20_011), most_tokens=40)
    device = [None if t is None else t.cuda() for t in case.tensors]
    got = run(*device, **case.arguments, backend="cuda")
    want = run(*case.tensors, **case.arguments, backend="plain")
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu().view(torch.int32), want[1].view(torch.int32))


@pytest.mark.gpu
def test_one_captured_graph_serves_every_seed_and_step() -> None:
    batch, length, codes = 3, 64, 1000
    cond, uncond = torch.randn(2, batch, length, codes, device="cuda")
    start = torch.full((batch, length), codes, device="cuda")
    tokens, workspace = start.clone(), torch.zeros(batch, dtype=torch.int32, device="cuda")
    params = torch.zeros(10, dtype=torch.int32, device="cuda")

    def step() -> None:
        maskgit_decode_step_packed(
            tokens,
            cond,
            uncond,
            params=params,
            mask_token=codes,
            workspace=workspace,
            out=tokens,
            backend="cuda",
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (1, 2):
        numbers = {"steps": 4, "guidance": 1.0 + seed, "noise_temperature": 2.0, "seed": seed, "first_sample": 5}
        tokens.copy_(start)
        want = start.cpu()
        for index, left in enumerate((50, 30, 10, 0)):
            params.copy_(pack_step_params(step=index, num_masked=left, **numbers))
            graph.replay()
            want, _ = run(want, cond.cpu(), uncond.cpu(), step=index, num_masked=left, mask_token=codes, **numbers)
            assert torch.equal(tokens.cpu(), want)
