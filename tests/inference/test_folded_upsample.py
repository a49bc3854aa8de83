"""`upsample_conv` against interpolate and conv2d in float64, in several dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from titok.inference.folded_upsample import FoldedUpsampleConv, copy_windows, fold_upsample_conv, upsample_conv


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    enlarged = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    return F.conv2d(enlarged, weight.double(), None if bias is None else bias.double(), padding=1)


# One pixel, where every window reads the padding; one row; odd sizes.
@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 3), (2, 3, 1, 6, 5), (2, 5, 7, 4, 4)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_enlarged_form(
    memory_format: torch.memory_format, with_bias: bool, shape: tuple[int, ...]
) -> None:
    batch, channels, height, width, outputs = shape
    x = torch.randn(batch, channels, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(outputs, channels, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64) if with_bias else None
    got = upsample_conv(x, fold_upsample_conv(weight, bias))
    assert torch.allclose(got, reference(x, weight, bias), rtol=0, atol=1e-13 * 9 * channels)
    if height * width > 1:  # a map of one pixel has both layouts
        assert got.is_contiguous(memory_format=memory_format)


# Sums of 4 * channels products are rounded, and in bfloat16 the folded weights too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_rounding(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(2, 32, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16, 32, 3, 3).to(dtype), torch.randn(16).to(dtype)
    expected = reference(x, weight, bias)
    error = (upsample_conv(x, fold_upsample_conv(weight, bias)).double() - expected).abs().max()
    assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 5, 3, 7), (1, 200, 2, 33)], ids=str)  # B, C, H, W
@pytest.mark.parametrize("with_bias", [False, True])
def test_windows_are_placed_in_triton(with_bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same bits as PyTorch's sum; each call writes the rows of its parity and no others."""
    pytest.importorskip("triton")
    from titok.kernels import place_windows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, channels, height, width = shape
    windows = torch.randn(batch, 2 * channels, height + 1, width + 1, device=device).to(dtype)
    windows = windows.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(channels, device=device).to(dtype) if with_bias else None
    for parity in (0, 1):
        untouched = torch.full((batch, 2 * height, 2 * width, channels), 7.0, dtype=dtype, device=device)
        want, got = (untouched.clone().permute(0, 3, 1, 2) for _ in range(2))
        copy_windows(want, windows, parity, bias)
        place_windows.place(windows, bias, got, parity)
        if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter rounds a sum down
            assert torch.allclose(got, want, rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(got, want)
        assert bool((got[:, :, 1 - parity :: 2] == 7.0).all())


def test_gradients() -> None:
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: upsample_conv(x, fold_upsample_conv(w, b)), (x, weight, bias))


@pytest.mark.slow
def test_compile() -> None:
    x, folded = torch.randn(1, 4, 3, 5), fold_upsample_conv(torch.randn(6, 4, 3, 3))
    compiled = torch.compile(upsample_conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, folded), upsample_conv(x, folded))


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: fold_upsample_conv(torch.randn(4, 4, 2, 3)), ValueError, r"weight: expected shape \(O, C, 3, 3\)"),
    (
        lambda: fold_upsample_conv(torch.randn(4, 4, 3, 3), torch.randn(3)),
        ValueError,
        r"bias: expected shape \(4\)",
    ),
    (
        lambda: upsample_conv(torch.randn(1, 3, 4, 4), fold_upsample_conv(torch.randn(4, 4, 3, 3))),
        ValueError,
        r"x: expected shape \(B, 4, H, W\), got \(1, 3, 4, 4\)",
    ),
    (
        lambda: upsample_conv(torch.randn(1, 4, 4, 4).double(), fold_upsample_conv(torch.randn(4, 4, 3, 3))),
        TypeError,
        "x: expected dtype float32, got float64",
    ),
    (
        lambda: upsample_conv([], FoldedUpsampleConv(torch.zeros(2, 2, 4, 4, 2, 2), None)),
        TypeError,
        "x: .* got list",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
