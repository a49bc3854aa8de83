"""Random wrong arguments for the functions of `titok._C`: they raise and leave every tensor as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpp_cases import CASES, UNREADABLE
from random_calls.draw import Draw, same_bits
from titok.ops.core.available import extension

NUMBERS = (0, -1, 1, 2, 7, 1 << 31, 1 << 40, 1 << 63, 1 << 80, 0.5, float("nan"), float("inf"), True, None, "text")


def _other_tensor(draw: Draw, right: Tensor) -> Any:
    shape = list(right.shape)
    match draw.pick("dtype", "shape", "strides", "unreadable", "dimensions", "many", "none"):
        case "dtype":
            dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
            return right.to(draw.pick(*dtypes))
        case "shape":
            axis = draw.random.randrange(len(shape))
            shape[axis] = max(0, shape[axis] + draw.pick(-1, 1, -shape[axis], 5))
            return torch.zeros(shape, dtype=right.dtype)
        case "strides":
            return draw.pick(torch.zeros(*shape, 2, dtype=right.dtype)[..., 0], torch.zeros((), dtype=right.dtype).expand(shape))
        case "unreadable":
            kind = draw.pick(*(k for k in UNREADABLE if k != "negated view" or right.dtype != torch.bool))
            draw.note(unreadable=kind)
            return UNREADABLE[kind](right)
        case "dimensions":
            return draw.pick(right[None], right.flatten(), right.sum(), right[..., None])
        case "many":  # no memory, and more elements than a 64-bit integer counts
            shape[draw.random.randrange(len(shape))] = draw.pick(1 << 31, 1 << 40, (1 << 62))
            if len([s for s in shape if s > 1 << 30]) > 1:
                return None
            return _huge(right, shape)
        case _:
            return draw.pick(None, 3, [1.0], torch.float32, Tensor)


def _huge(right: Tensor, shape: list[int]) -> Any:
    try:
        return torch.zeros((), dtype=right.dtype).expand(shape)
    except RuntimeError:  # more than PyTorch itself takes
        return None


def raw_arguments(draw: Draw) -> None:
    name = draw.pick(*CASES)
    torch.manual_seed(draw.random.getrandbits(30))
    arguments = CASES[name]()
    for changed in draw.random.sample(list(arguments), draw.pick(1, 1, 2, 3)):
        right = arguments[changed]
        if isinstance(right, Tensor):
            arguments[changed] = _other_tensor(draw, right)
        elif isinstance(right, tuple):
            numbers = list(right)
            numbers[draw.random.randrange(len(numbers))] = draw.pick(*NUMBERS)
            arguments[changed] = draw.pick(tuple(numbers), tuple(numbers), tuple(numbers[1:]), numbers, None)
        else:
            arguments[changed] = draw.pick(*NUMBERS)
    shown = {k: f"{v.dtype}{tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)[:60] for k, v in arguments.items()}
    draw.note(function=name, **shown)
    readable = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and type(v) is Tensor and _is_small(v)}
    before = {k: v.clone() for k, v in readable.items()}
    function = getattr(extension(), name.split(":")[0])
    try:
        result = function(*arguments.values())
    except (TypeError, ValueError) as error:
        assert ": expected " in str(error), str(error)
    else:
        if not result:  # the arguments happen to be right
            return
        assert result in (1, 2, 3, 4)
    for key, value in before.items():
        assert same_bits(readable[key], value), f"{key} was written"


def _is_small(x: Tensor) -> bool:
    return x.is_cpu and x.layout == torch.strided and x.numel() < 10_000 and not x._is_zerotensor() and bool(
        x.numel() == 0 or x.untyped_storage().nbytes()
    )  # fmt: skip
