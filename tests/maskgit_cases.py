"""Decode steps that are hard to get right, shared by the tests of `maskgit_decode_step`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor | None]  # tokens, cond, uncond
    arguments: dict[str, Any]


def order_of(masked: Tensor) -> Tensor:
    """The positions of each sample, masked ones first, and the place of each position: (2, B, N) int64."""
    order = torch.empty((2, *masked.shape), dtype=torch.int64)
    for b, row in enumerate(masked.tolist()):
        for place, n in enumerate(sorted(range(len(row)), key=lambda n: (not row[n], n))):
            order[0, b, place], order[1, b, n] = n, place
    return order


def random_case(
    number: int, codes: tuple[int, ...] = (1, 2, 7, 40, 255, 1000, 1031), most_tokens: int = 12
) -> Case:
    """Case `number`: every combination of dtype, rule, temperature, guidance, nasty value and shape comes up."""
    g = torch.Generator().manual_seed(number)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    v, n, b = pick(codes), pick(range(1, most_tokens + 1)), pick((1, 2, 3))
    dtype = DTYPES[number % 3]
    cond = torch.randn(b, n, v, generator=g) * pick((0.1, 1.0, 5.0, 50.0))
    uncond = torch.randn(b, n, v, generator=g)
    match pick(("", "", "", "ties", "tiny", "-inf", "inf", "nan", "all -inf", "everything")):
        case "ties":
            cond, uncond = cond.mul(2).round() / 2, uncond.mul(2).round() / 2
        case "tiny":
            cond = cond * 1e-7  # subnormal in float16
        case "-inf":
            cond[torch.rand(cond.shape, generator=g) < 0.5] = -math.inf
        case "inf":
            cond[torch.rand(cond.shape, generator=g) < 0.05] = math.inf
        case "nan":
            cond[torch.rand(cond.shape, generator=g) < 0.1] = math.nan
        case "all -inf":
            cond[:] = -math.inf
        case "everything":
            for value in (math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38):
                cond[torch.rand(cond.shape, generator=g) < 0.1] = value
    known = torch.rand(b, n, generator=g) < pick((0.0, 0.3, 0.7, 1.0))
    tokens = torch.where(known, torch.randint(v, (b, n), generator=g), v)
    arguments = {
        "step": number % 8,
        "steps": 9,
        "num_masked": pick((0, 1, n // 2, n - 1, n, n + 5)),
        "mask_token": v,
        "guidance": pick((1.0, 0.0, 2.5, 5.5, -3.0)),
        "softmax_temperature": pick((1.0, 0.5, 1.2)),
        "noise_temperature": pick((0.0, 0.0, 1e-38, 1e-3, 1.0, 9.5, 3e38)),
        "confidence": pick(("titok", "maskgit")),
        "seed": pick((0, 1, 1 << 63, (1 << 64) - 1)),
        "first_sample": pick((0, 3, 1 << 40)),
    }
    return Case((tokens, cond.to(dtype), pick((None, uncond.to(dtype)))), arguments)
