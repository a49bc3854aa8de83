"""Random calls of `masked_decode_step`, whole and with its codes split over ranks."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from maskgit_cases import random_case
from titok.ops import (
    DecodeStep,
    begin_masked_decode,
    finish_masked_decode,
    masked_decode_partial,
    masked_decode_reduce,
)

POLICIES = ("count", "top_k", "threshold", "entropy", "leftmost", "factor")


def random_call(number: int, **sizes: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Tensors and arguments of call `number`, in float32 or bfloat16; every argument varies.

    `sizes` are those of `random_case`.
    """
    (tokens, cond, uncond), _ = random_case(number, **sizes)
    if cond.dtype == torch.float16:
        cond, uncond = cond.float(), None if uncond is None else uncond.float()
    g = torch.Generator().manual_seed(number)
    batch, length, codes = cond.shape

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=g, dtype=torch.float64)

    def whole(end: int) -> Tensor:
        return torch.randint(end, (batch,), generator=g)

    return (tokens, cond, uncond), {
        "policy": POLICIES[number % 6],
        **pick({"mask_token": codes}, {"undecided": torch.rand(batch, length, generator=g) < 0.6}),
        "count": pick(0, 1, 2, whole(length + 2)),
        "threshold": pick(0.0, 0.2, 0.9, 1.0, uniform(0, 1)),
        "entropy_bound": pick(0.0, 0.1, 3.0, uniform(0, 5)),
        "factor": pick(0.0, 0.5, 1.0, 1e9, uniform(0, 3)),
        "window": pick(None, (length // 3, length), torch.stack([whole(length), whole(length + 1)], 1)),
        "block_length": pick(None, None, 1, 3),
        "step": pick(0, 7, whole(1000)),
        "seed": pick(0, (1 << 64) - 1, torch.randint(-(1 << 62), 1 << 62, (batch,), generator=g)),
        "sample": pick(0, 1 << 40, whole(1 << 40)),
        "guidance": pick(1.0, 2.5, -1.0, uniform(0, 4)),
        "softmax_temperature": pick(1.0, 0.7, uniform(0.2, 3)),
        "temperature": pick(0.0, 1.0, 0.6, uniform(0, 2), 1e-38),
        "noise_temperature": pick(0.0, 1.0, uniform(0, 9)),
        "top_k": pick(0, 1, 5, whole(codes + 3)),
        "top_p": pick(1.0, 0.9, 0.3, 1e-9, uniform(0.1, 1)),
        "confidence": pick("logit", "log_probability", "negative_entropy", "random", "probability", "margin"),
        "probabilities": pick("drawn", "model"),
        "renoise": pick(False, True),
        "edit_threshold": pick(None, 0.0, 0.5, uniform(0, 1)),
        "editable": pick(None, torch.rand(batch, length, generator=g) < 0.5),
        "step_map": pick(None, torch.randint(-1, 5, (batch, length), generator=g).int()),
        "return_log_probabilities": pick(False, True),
    }


def random_split(codes: int, generator: random.Random) -> list[tuple[int, int]]:
    """Sizes of slices that add up to `codes`, each with the number of its chunks."""
    slices = []
    while codes:
        size = generator.randint(1, codes)
        slices.append((size, min(size, generator.choice((1, 1, 2, 3)))))
        codes -= size
    return slices


def split_step(
    tensors: tuple[Tensor, ...], arguments: dict[str, Any], slices: list[tuple[int, int]], backend: str
) -> DecodeStep:
    """The step as ranks with these slices would make it."""
    tokens, cond, uncond = tensors
    decode = begin_masked_decode(tokens, cond.shape[-1], **arguments)
    while not decode.is_complete:
        partials, first_code, first_chunk = [], 0, 0
        for size, chunks in slices:
            mine = slice(first_code, first_code + size)
            part = masked_decode_partial(
                *(decode, cond[..., mine], None if uncond is None else uncond[..., mine]),
                first_code=first_code, first_chunk=first_chunk, chunks=chunks, backend=backend,
            )  # fmt: skip
            partials.append(part)
            first_code, first_chunk = first_code + size, first_chunk + chunks
        decode = masked_decode_reduce(decode, torch.cat(partials, 2))
    return finish_masked_decode(decode)
