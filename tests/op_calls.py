"""Right arguments for every public function of `titok.ops` and for `titok.sample_tokens`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import titok
from titok import ops

F32 = torch.float32


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def step(**more: Any) -> dict[str, Any]:
    index = torch.arange(6).view(2, 3)
    arguments = {"tokens": torch.full((2, 3), 5), "cond_logits": normal(6, 5), "uncond_logits": normal(6, 5)}
    options = {"mask_token": 5, "confidence": "titok", "rows": index, "uncond_rows": index, "backend": None}
    return {**arguments, **options, "out": torch.zeros(2, 3).long(), "return_confidence": True, **more}


def numbers(**more: Any) -> dict[str, Any]:
    floats = {"guidance": 2.0, "softmax_temperature": 1.0, "noise_temperature": 1.0}
    return {
        "step": 0,
        "steps": 3,
        "num_masked": 1,
        **floats,
        "confidence": "titok",
        "seed": 1,
        "first_sample": 2,
        **more,
    }


def norm(**more: Any) -> dict[str, Any]:
    return {"weight": normal(6), "bias": normal(6), "eps": 1e-5, "out_dtype": F32, "backend": None, **more}


def quantizer(**more: Any) -> dict[str, Any]:
    return {"latents": normal(4, 6), "codebook": normal(7, 6), "normalize": True, "backend": None, **more}


# Right arguments, all that there are, of each function that has any.
def begun() -> ops.SplitDecode:
    return ops.begin_masked_decode(torch.full((2, 3), 5), 5, policy="leftmost", mask_token=5)


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "add_layer_norm": lambda: norm(x=normal(3, 6), residual=normal(3, 6), out=(normal(3, 6), normal(3, 6))),
    "layer_norm": lambda: norm(x=normal(3, 6)),
    "layer_norm_of_sum": lambda: norm(x=normal(3, 6), residual=normal(3, 6)),
    "group_norm_silu": lambda: norm(
        x=image(2, 6, 3, 5), num_groups=3, residual=image(2, 6, 3, 5), out=(image(2, 6, 3, 5), image(2, 6, 3, 5))
    ),
    "masked_attention": lambda: {
        "qkv": normal(2, 5, 24), "num_heads": 2, "key_mask": torch.ones(2, 5, dtype=torch.bool),
        "query_range": (1, 4), "scale": 0.5, "backend": None,
    },
    "attention": lambda: {
        **{name: normal(2, 5, 8) for name in ("q", "k", "v")}, "num_heads": 2,
        "key_mask": torch.ones(2, 5, dtype=torch.bool), "query_range": (1, 4), "scale": 0.5, "backend": None,
    },
    "nearest_codebook": lambda: quantizer(return_quantized=True, out=torch.zeros(4).long()),
    "quantize": lambda: quantizer(
        commitment_cost=0.25, mask=torch.ones(4, dtype=torch.bool), dim=1
    ),
    "code_mixture": lambda: {"logits": normal(4, 7), "codebook": normal(7, 6), "backend": None},
    "masked_decode_step": lambda: {
        "tokens": torch.full((2, 3), 5), "cond_logits": normal(6, 5), "uncond_logits": normal(6, 5),
        "policy": "threshold", "mask_token": 5, "undecided": None, "count": 1, "threshold": 0.5,
        "entropy_bound": 0.5, "factor": 0.5, "window": (0, 2), "block_length": 2, "step": 1, "seed": 3,
        "sample": 4, "guidance": 2.0, "softmax_temperature": 1.0, "temperature": 1.0, "noise_temperature": 1.0,
        "top_k": 3, "top_p": 0.9, "confidence": "logit", "probabilities": "model", "renoise": True,
        "edit_threshold": 0.5,
        "editable": torch.ones(2, 3, dtype=torch.bool), "step_map": torch.zeros(2, 3, dtype=torch.int32),
        "rows": torch.arange(6).view(2, 3), "uncond_rows": torch.arange(6).view(2, 3),
        "return_log_probabilities": True, "in_place": False, "backend": None,
    },
    "begin_masked_decode": lambda: {
        "tokens": torch.full((2, 3), 5), "num_codes": 5, "policy": "threshold", "mask_token": 5, "undecided": None,
        "count": 1, "threshold": 0.5,
        "entropy_bound": 0.5, "factor": 0.5, "window": (0, 2), "block_length": 2, "step": 1, "seed": 3,
        "sample": 4, "guidance": 2.0, "softmax_temperature": 1.0, "temperature": 1.0, "noise_temperature": 1.0,
        "top_k": 3, "top_p": 0.9, "confidence": "logit", "probabilities": "model", "renoise": True,
        "edit_threshold": 0.5,
        "editable": torch.ones(2, 3, dtype=torch.bool), "step_map": torch.zeros(2, 3, dtype=torch.int32),
        "return_log_probabilities": True,
    },
    "masked_decode_partial": lambda: {
        "decode": begun(), "cond_logits": normal(6, 5), "uncond_logits": normal(6, 5), "first_code": 0,
        "first_chunk": 0, "chunks": 2, "rows": torch.arange(6).view(2, 3),
        "uncond_rows": torch.arange(6).view(2, 3), "backend": None,
    },
    "masked_decode_reduce": lambda: {"decode": begun(), "partials": torch.zeros(2, 3, 1, 2, dtype=torch.int64)},
    "finish_masked_decode": lambda: {"decode": begun()._replace(stage=3)},
    "maskgit_decode_step": lambda: step(**numbers(), final=False),
    "maskgit_decode_step_packed": lambda: step(
        params=ops.pack_step_params(**numbers()), num_masked=torch.ones(2).long(), workspace=torch.zeros(2).int(),
        return_order=True,
    ),
    "pack_step_params": numbers,
    "only_plain": lambda: {"on": True},
    "is_ordinary": lambda: {"x": normal(2)},
    "last_backend": lambda: {"op": "quantize"},
    "sample_tokens": lambda: {
        "labels": [0, 2], "sampling": titok.SamplingConfig(steps=2), "seed": 1, "first_sample": 2,
        "init_tokens": torch.full((2, 4), 16), "trace": True,
    },
}  # fmt: skip
