"""Random wrong arguments for the functions of `titok._C` and for `torch.ops.titok.*`, without the public functions.

They raise and leave every tensor as it was. Memory that they must not touch is AddressSanitizer's to find.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpp_cases import CASES, UNREADABLE
from random_calls.draw import Draw, error_of, same_bits
from titok import ops
from titok.ops.core.available import extension

NUMBERS = (0, -1, 1, 2, 7, 1 << 31, 1 << 40, 1 << 63, 1 << 80, 0.5, float("nan"), float("inf"), True, None, "text")


def _other_tensor(draw: Draw, right: Tensor, sizes: Sequence[int]) -> Any:
    """A tensor, or something else, that differs from the right one. `sizes` are those of a dimension without memory."""
    shape = list(right.shape)
    match draw.pick("dtype", "shape", "strides", "unreadable", "dimensions", "many", "none"):
        case "dtype":
            dtypes = (
                torch.float64,
                torch.float32,
                torch.bfloat16,
                torch.float16,
                torch.int64,
                torch.int32,
                torch.bool,
            )
            return right.to(draw.pick(*dtypes))
        case "shape":
            axis = draw.random.randrange(len(shape))
            shape[axis] = max(0, shape[axis] + draw.pick(-1, 1, -shape[axis], 5))
            return torch.zeros(shape, dtype=right.dtype)
        case "strides":
            return draw.pick(
                torch.zeros(*shape, 2, dtype=right.dtype)[..., 0], torch.zeros((), dtype=right.dtype).expand(shape)
            )
        case "unreadable":
            kinds = [k for k in UNREADABLE if k != "negated view" or right.dtype != torch.bool]
            kind = draw.pick(*kinds)
            draw.note(unreadable=f"{draw.story.get('unreadable', '')} {kind}".strip())
            return UNREADABLE[kind](right)
        case "dimensions":
            return draw.pick(right[None], right.flatten(), right.sum(), right[..., None])
        case "many":  # no memory, and more elements than a 64-bit integer counts
            shape[draw.random.randrange(len(shape))] = draw.pick(*sizes)
            if draw.chance(0.3):  # no element at all
                shape[-1] = 0
            return _without_memory(right, shape)
        case _:
            return draw.pick(None, 3, [1.0], torch.float32, Tensor)


def _without_memory(right: Tensor, shape: list[int]) -> Any:
    try:
        return torch.zeros([min(size, 1) for size in shape], dtype=right.dtype).expand(shape)
    except RuntimeError:  # more elements than PyTorch itself counts
        return None


def _change(draw: Draw, arguments: dict[str, Any], sizes: Sequence[int]) -> None:
    """Changes one to three of the arguments."""
    for name in draw.random.sample(list(arguments), min(draw.pick(1, 1, 2, 3), len(arguments))):
        right = arguments[name]
        if isinstance(right, Tensor):
            arguments[name] = _other_tensor(draw, right, sizes)
        elif isinstance(right, tuple):
            numbers = list(right)
            numbers[draw.random.randrange(len(numbers))] = draw.pick(*NUMBERS)
            arguments[name] = draw.pick(tuple(numbers), tuple(numbers), tuple(numbers[1:]), numbers, None)
        else:
            arguments[name] = draw.pick(*NUMBERS)
    for name, value in arguments.items():
        shown = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
        draw.note(**{name: shown})


def _copies(arguments: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = {name: x for name, x in arguments.items() if type(x) is Tensor and _can_be_copied(x)}
    return {name: (x, x.clone()) for name, x in tensors.items()}


def _can_be_copied(x: Tensor) -> bool:
    if not x.is_cpu or x.layout != torch.strided or x._is_zerotensor() or max(x.shape, default=0) > 10_000:
        return False
    return x.numel() == 0 or x.untyped_storage().nbytes() > 0


def extension_function(draw: Draw) -> None:
    name = draw.pick(*CASES)
    torch.manual_seed(draw.random.getrandbits(30))
    arguments = CASES[name]()
    draw.note(function=name)
    _change(draw, arguments, (1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1))
    before = _copies(arguments)
    function = getattr(extension(), name.split(":")[0])
    results: list[Any] = []
    if error_of(lambda: results.append(function(*arguments.values()))) is None:
        if not results[0]:  # the arguments happen to be right
            return
        assert results[0] in (1, 2, 3, 4)  # maskgit_decode_step returns which argument holds a bad value
    for key, (tensor, copy) in before.items():
        assert same_bits(tensor, copy), f"{key} was written"


# ---------------------------------------------------------------------------------------------------------------


def _registered(draw: Draw) -> dict[str, dict[str, Any]]:
    """Right arguments of every registered op."""

    def normal(*shape: int) -> Tensor:
        return draw.normal(*shape, dtype=torch.float32)

    def image() -> Tensor:
        return normal(2, 6, 3, 5).contiguous(memory_format=draw.pick(torch.channels_last, torch.contiguous_format))

    weights = {"weight": normal(6), "bias": normal(6)}
    attention = {"num_heads": 2, "start": 1, "stop": 4, "scale": 0.5}
    mask = draw.pick(None, torch.ones(2, 5, dtype=torch.bool))
    index = torch.arange(6).view(2, 3)
    numbers = {
        "seed": 1,
        "first_sample": 0,
        "step": 0,
        "num_masked": 1,
        "guidance": 2.0,
        "inverse_temperature": 1.0,
    }
    numbers |= {"noise": 1.0, "draw_scale": 1.0, "mask_token": 5, "confidence": "titok"}
    packed = ops.pack_step_params(step=0, steps=2, num_masked=1)
    return {
        "layer_norm": {"x": normal(3, 6), **weights, "eps": 1e-5, "out_dtype": None},
        "add_layer_norm": {"x": normal(3, 6), "residual": normal(3, 6), **weights, "eps": 1e-5, "out_dtype": None},
        "add_layer_norm_backward": {
            "grad_total": draw.pick(None, normal(3, 6)), "grad_normalised": normal(3, 6), "total": normal(3, 6),
            "weight": normal(6), "eps": 1e-5,
        },
        "group_norm_silu": {
            "x": image(), "num_groups": 3, **weights, "eps": 1e-5, "residual": draw.pick(None, image()),
            "out_dtype": None,
        },
        "group_norm_silu_backward": {
            "grad": image(), "grad_total": draw.pick(None, image()), "x": image(), **weights, "mean": normal(2, 3),
            "rstd": normal(2, 3),
        },
        "masked_attention": {"qkv": normal(2, 5, 24), "key_mask": mask, **attention},
        "masked_attention_backward": {
            "grad": normal(2, 3, 8), "qkv": normal(2, 5, 24), "key_mask": mask, "out": normal(2, 3, 8),
            "lse": normal(2, 2, 3), **attention,
        },
        "nearest_codebook": {"latents": normal(4, 6), "codebook": normal(7, 6), "normalize": False},
        "quantize": {"latents": normal(4, 6), "codebook": normal(7, 6), "normalize": False, "commitment_cost": 0.25},
        "code_mixture": {"logits": normal(4, 7), "codebook": normal(7, 6)},
        "code_mixture_backward": {
            "grad": normal(4, 6), "logits": normal(4, 7), "codebook": normal(7, 6), "mixture": normal(4, 6),
            "need_codebook": True,
        },
        "maskgit_decode_step": {
            "tokens": torch.full((2, 3), 5), "cond_logits": normal(6, 5),
            "uncond_logits": draw.pick(None, normal(6, 5)),
            "rows": index, "uncond_rows": index, "counts": draw.pick(None, torch.ones(2, dtype=torch.int64)),
            "params": draw.pick(None, packed), "workspace": draw.pick(None, torch.zeros(2, dtype=torch.int32)),
            **numbers,
        },
    }  # fmt: skip


def registered_op(draw: Draw) -> None:
    cases = _registered(draw)
    name = draw.pick(*cases)
    arguments = cases[name]
    draw.note(function=name)
    _change(draw, arguments, (1 << 40, 1 << 62, (1 << 63) - 1))
    before = _copies(arguments)
    if any(kind in draw.story.get("unreadable", "") for kind in ("fake", "no storage")):
        # PyTorch ends with an AssertionError where fake and real tensors are mixed, and crashes itself in any op that
        # is given a tensor whose memory was given back.
        return
    # The checks of PyTorch's dispatcher come before those of the op, and have errors of their own.
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        getattr(torch.ops.titok, name)(*arguments.values())
    for key, (tensor, copy) in before.items():
        assert same_bits(tensor, copy), f"{key} was written"
