"""Right arguments for each function of `titok._C`, and tensors that no function takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

CHANNELS_LAST = torch.channels_last


def rows(*shape: int) -> Tensor:
    return torch.randn(shape)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=CHANNELS_LAST)


def tokens(batch: int, length: int, mask_token: int) -> Tensor:
    return torch.full((batch, length), mask_token)


def decode_params(**changes: Any) -> tuple[Any, ...]:
    params = {
        "seed": 1,
        "first_sample": 0,
        "step": 0,
        "num_masked": 1,
        "guidance": 2.0,
        "inverse_temperature": 1.0,
        "noise": 1.0,
        "draw_scale": 1.0,
    }
    return tuple({**params, **changes}.values())


def decode_arguments(**changes: Any) -> dict[str, Any]:
    """Of `maskgit_decode_step`: 2 samples of 3 tokens, 5 codes."""
    arguments = {
        "tokens": tokens(2, 3, 5),
        "cond": rows(2, 3, 5),
        "uncond": rows(2, 3, 5),
        "rows": None,
        "uncond_rows": None,
        "keep": torch.ones(2, dtype=torch.int64),
        "packed": None,
        "params": decode_params(),
        "mask_token": 5,
        "maskgit": False,
        "out": tokens(2, 3, 5),
        "confidence": torch.zeros(2, 3),
        "threads": 1,
    }
    return {**arguments, **changes}


def decode_arguments_with_rows() -> dict[str, Any]:
    index = torch.arange(6).view(2, 3)
    return decode_arguments(
        cond=rows(6, 5),
        uncond=rows(7, 5),
        rows=index,
        uncond_rows=index + 1,
        packed=torch.zeros(10, dtype=torch.int32),
    )


# name of the case -> arguments that are right; the part of the name before a colon is the function
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "add_layer_norm": lambda: {
        "x": rows(3, 2, 8),
        "residual": rows(3, 2, 8),
        "weight": rows(8),
        "bias": rows(8),
        "eps": 1e-5,
        "total": torch.zeros(3, 2, 8),
        "normalised": torch.zeros(3, 2, 8),
    },
    "add_layer_norm:alone": lambda: {
        "x": rows(3, 8),
        "residual": None,
        "weight": rows(8),
        "bias": rows(8),
        "eps": 1e-5,
        "total": None,
        "normalised": torch.zeros(3, 8),
    },
    "add_layer_norm_backward": lambda: {
        "grad_total": rows(20, 8),
        "grad_normalised": rows(20, 8),
        "total": rows(20, 8),
        "weight": rows(8),
        "eps": 1e-5,
        "grad": torch.zeros(20, 8),
        "partial": torch.zeros(2, 2, 8),
    },
    "group_norm_silu": lambda: {
        "x": image(2, 6, 3, 5),
        "residual": image(2, 6, 3, 5),
        "num_groups": 3,
        "weight": rows(6),
        "bias": rows(6),
        "eps": 1e-6,
        "total": torch.zeros(2, 6, 3, 5).to(memory_format=CHANNELS_LAST),
        "normalised": torch.zeros(2, 6, 3, 5).to(memory_format=CHANNELS_LAST),
        "mean": torch.zeros(2, 3),
        "rstd": torch.zeros(2, 3),
    },
    "int8_linear": lambda: {
        "x": rows(3, 12),
        "weight": torch.ones(2, 3, 256, dtype=torch.int8),
        "scale": rows(128),
        "total": rows(128),
        "bias": rows(70),
        "gelu": False,
        "out": torch.zeros(3, 70),
    },
    "masked_attention": lambda: {
        "qkv": rows(2, 5, 3 * 2 * 4),
        "key_mask": torch.ones(2, 5, dtype=torch.bool),
        "num_heads": 2,
        "start": 1,
        "scale": 0.5,
        "out": torch.zeros(2, 3, 2 * 4),
        "lse": torch.zeros(2, 2, 3),
    },
    "masked_attention_backward": lambda: {
        "grad": rows(2, 3, 2 * 4),
        "qkv": rows(2, 5, 3 * 2 * 4),
        "key_mask": torch.ones(2, 5, dtype=torch.bool),
        "out": rows(2, 3, 2 * 4),
        "lse": torch.zeros(2, 2, 3),
        "num_heads": 2,
        "start": 1,
        "scale": 0.5,
        "dqkv": torch.zeros(2, 5, 3 * 2 * 4),
    },
    "nearest_codebook": lambda: {
        "latents": rows(4, 6),
        "codebook": rows(7, 6),
        "normalize": False,
        "out": torch.zeros(4, dtype=torch.int64),
    },
    "maskgit_decode_step": decode_arguments,
    "maskgit_decode_step:rows": decode_arguments_with_rows,
}


TENSORS = [
    (case, name) for case, make in CASES.items() for name, value in make().items() if isinstance(value, Tensor)
]

Names = set[str | tuple[str, str]]  # argument names, in all functions or (function, name)
OPTIONAL: Names = {
    "grad_total",
    "key_mask",
    ("int8_linear", "bias"),
    "mean",
    "rstd",
    "keep",
    "packed",
    "uncond",
    ("masked_attention", "lse"),
}
# In these only the last dimension must be dense. Every other tensor must be contiguous.
STRIDED: Names = {"qkv", "latents", "codebook", "cond", "uncond", ("masked_attention_backward", "grad")}
# (case, name) of tensors whose number of rows no other argument determines.
ANY_ROWS = {("nearest_codebook", "codebook"), *(("maskgit_decode_step:rows", n) for n in ("cond", "uncond"))}


def listed(names: Names, case: str, name: str) -> bool:
    return name in names or (case.split(":")[0], name) in names


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


# calls with nothing to compute
EMPTY: list[tuple[str, list[Any]]] = [
    ("add_layer_norm", [nothing(0, 8), None, rows(8), rows(8), 1e-5, None, nothing(0, 8)]),
    ("add_layer_norm", [nothing(4, 0), nothing(4, 0), rows(0), rows(0), 1e-5, nothing(4, 0), nothing(4, 0)]),
    (
        "add_layer_norm_backward",
        [None, nothing(0, 8), nothing(0, 8), rows(8), 1e-5, nothing(0, 8), nothing(0, 2, 8)],
    ),
    (
        "add_layer_norm_backward",
        [None, nothing(4, 0), nothing(4, 0), rows(0), 1e-5, nothing(4, 0), nothing(1, 2, 0)],
    ),
    *(
        (
            "group_norm_silu",
            [
                image(*s),
                None,
                2,
                rows(s[1]),
                rows(s[1]),
                1e-6,
                None,
                image(*s),
                nothing(s[0], 2),
                nothing(s[0], 2),
            ],
        )
        for s in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (2, 0, 3, 3))
    ),
    ("masked_attention", [nothing(0, 5, 12), None, 2, 0, 1.0, nothing(0, 5, 4), nothing(0, 2, 5)]),
    ("masked_attention", [nothing(2, 0, 12), None, 2, 0, 1.0, nothing(2, 0, 4), nothing(2, 2, 0)]),
    ("masked_attention", [rows(2, 5, 12), None, 2, 5, 1.0, nothing(2, 0, 4), None]),
    ("nearest_codebook", [nothing(0, 3), rows(5, 3), True, nothing(0, dtype=torch.int64)]),
    *(
        ("maskgit_decode_step", list(decode_arguments(**arguments).values()))
        for arguments in (
            {
                "tokens": nothing(*s, dtype=torch.int64),
                "cond": nothing(*s, 5),
                "uncond": None,
                "keep": None,
                "out": nothing(*s, dtype=torch.int64),
                "confidence": nothing(*s),
            }
            for s in ((0, 3), (2, 0), (0, 0))
        )
    ),
]


def fake(like: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(like.shape, dtype=like.dtype)


def without_storage(like: Tensor) -> Tensor:
    emptied = torch.zeros_like(like)
    emptied.untyped_storage().resize_(0)
    return emptied


UNREADABLE = {
    "meta": lambda like: torch.empty_like(like, device="meta"),
    "fake": fake,
    "no storage": without_storage,
    "negated view": torch._neg_view,
    "sparse": lambda like: torch.zeros_like(like, memory_format=torch.contiguous_format).to_sparse(),
    "zero tensor": lambda like: torch._efficientzerotensor(like.shape, dtype=like.dtype),
}
