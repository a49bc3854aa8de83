"""`torch.ops.titok.*` called without the public functions: bad arguments raise, and no kernel sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titok import ops

T = torch.ops.titok
X, W, B = torch.randn(4, 8), torch.ones(8), torch.zeros(8)
QKV = torch.randn(1, 3, 12)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def decode(tokens: Tensor, logits: Tensor, *, mask_token: int = 3, **given: Any) -> Any:
    tensors = [given.get(name) for name in ("uncond", "rows", "uncond_rows", "counts", "params", "workspace")]
    return T.maskgit_decode_step(
        tokens, logits, *tensors, 0, 0, 0, 0, 1.0, 1.0, 1.0, 1.0, mask_token, given.get("confidence", "titok")
    )


MASKED = torch.full((1, 2), 3)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "add_layer_norm residual": (
        lambda: T.add_layer_norm(torch.randn(4000, 8), torch.randn(1, 8), W, B, 1e-5), ValueError, "residual: ",
    ),
    "add_layer_norm weight": (lambda: T.add_layer_norm(*torch.randn(2, 4, 4000), W, B, 1e-5), ValueError, "weight: "),
    "add_layer_norm eps": (lambda: T.add_layer_norm(X, X, W, B, -1.0), ValueError, "eps: "),
    "layer_norm bias": (lambda: T.layer_norm(X, W, B[:3], 1e-5), ValueError, "bias: "),
    "add_layer_norm_backward": (
        lambda: T.add_layer_norm_backward(None, X, torch.randn(4000, 8), W, 1e-5), ValueError, "grad_normalised: ",
    ),
    "group_norm_silu weight": (
        lambda: T.group_norm_silu(channels_last(1, 3200, 1, 1), 2, W, B, 1e-5), ValueError, "weight: ",
    ),
    "group_norm_silu 0 groups": (
        lambda: T.group_norm_silu(channels_last(1, 8, 1, 1), 0, W, B, 1e-5), ValueError, "num_groups: ",
    ),
    "group_norm_silu -1 groups": (
        lambda: T.group_norm_silu(channels_last(1, 8, 1, 1), -1, W, B, 1e-5), ValueError, "num_groups: ",
    ),
    "group_norm_silu 3 groups": (
        lambda: T.group_norm_silu(channels_last(1, 8, 1, 1), 3, W, B, 1e-5), ValueError, "num_groups: ",
    ),
    "group_norm_silu residual": (
        lambda: T.group_norm_silu(channels_last(4, 8, 30, 30), 2, W, B, 1e-5, channels_last(1, 8, 1, 1)),
        ValueError,
        "residual: ",
    ),
    "group_norm_silu float64 weight": (
        lambda: T.group_norm_silu(channels_last(1, 8, 1, 1), 2, W.double(), B, 1e-5), TypeError, "weight: ",
    ),
    "masked_attention start": (
        lambda: T.masked_attention(QKV, None, 2, -10_000_000, 3, 0.5), ValueError, "query_range: ",
    ),
    "masked_attention stop": (
        lambda: T.masked_attention(QKV, None, 2, 0, 10_000_000, 0.5), ValueError, "query_range: ",
    ),
    "masked_attention width": (lambda: T.masked_attention(QKV[..., :11], None, 5, 0, 3, 0.5), ValueError, "qkv: "),
    "masked_attention 0 heads": (lambda: T.masked_attention(QKV, None, 0, 0, 3, 0.5), ValueError, "qkv: "),
    "masked_attention scale": (lambda: T.masked_attention(QKV, None, 2, 0, 3, float("nan")), ValueError, "scale: "),
    "masked_attention mask": (
        lambda: T.masked_attention(torch.randn(1, 3000, 3), torch.ones(1, 1, dtype=torch.bool), 1, 0, 1, 0.5),
        ValueError,
        "key_mask: ",
    ),
    "masked_attention_backward": (
        lambda: T.masked_attention_backward(
            torch.randn(1, 3, 4), QKV, None, torch.randn(1), torch.randn(1), 2, 0, 3, 0.5
        ),
        ValueError,
        "out: ",
    ),
    "nearest_codebook": (lambda: T.nearest_codebook(torch.randn(5, 7), torch.randn(9, 8)), ValueError, "latents: "),
    "code_mixture": (lambda: T.code_mixture(torch.randn(5, 7), torch.randn(9, 8)), ValueError, "codebook: "),
    "decode: logits of other samples": (
        lambda: decode(torch.full((40, 400), 3), torch.zeros(1, 1, 3)), ValueError, "cond_logits: ",
    ),
    "decode: too many codes": (
        lambda: decode(torch.full((1, 4), 3_000_000), torch.zeros(1, 1, 3_000_000).expand(1, 4, -1),
                       mask_token=3_000_000),
        ValueError,
        "cond_logits: ",
    ),
    "decode: too many tokens": (
        lambda: decode(torch.full((1, 9000), 3), torch.zeros(1, 9000, 3)), ValueError, "tokens: ",
    ),
    "decode: float64": (lambda: decode(MASKED, torch.zeros(1, 2, 3).double()), TypeError, "cond_logits: "),
    "decode: int32 tokens": (lambda: decode(MASKED.int(), torch.zeros(1, 2, 3)), TypeError, "tokens: "),
    "decode: counts": (
        lambda: decode(torch.full((400, 2), 3), torch.zeros(1, 3).expand(400, 2, 3),
                       counts=torch.zeros(1, dtype=torch.int64)),
        ValueError,
        "num_masked: ",
    ),
    "decode: params": (
        lambda: decode(MASKED, torch.zeros(1, 2, 3), params=torch.zeros(0, dtype=torch.int32)), ValueError, "params: ",
    ),
    "decode: rule": (lambda: decode(MASKED, torch.zeros(1, 2, 3), confidence="x"), ValueError, "confidence: "),
    "decode: known token": (
        lambda: decode(torch.tensor([[3, 9]]), torch.zeros(1, 2, 3)), ValueError, "tokens: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_raise(case: str) -> None:
    call, error, message = CASES[case]
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_tensor_whose_memory_was_given_back_raises() -> None:
    x = torch.randn(4, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        ops.layer_norm(x, W, B, 1e-5)
