"""The 3x3 convolution of training against PyTorch's own in float64: values, gradients of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titok.models import conv_gradient
from titok.models.conv_gradient import conv3x3, weight_gradient


def arguments(
    channels: int = 5, outputs: int = 7, size: tuple[int, int] = (6, 9)
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, channels, *size).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(outputs, channels, 3, 3) / 7, torch.randn(outputs)


@pytest.fixture(params=[True, False], ids=["as large maps", "as small maps"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing, for maps of every size."""
    monkeypatch.setattr(conv_gradient, "_is_large", lambda x: request.param)


@pytest.fixture
def always(large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products for maps of every size, on every CPU."""
    monkeypatch.setattr(conv_gradient, "_gains", lambda x, weight: True)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (1, 4), (5, 2)])
def test_weight_gradient(size: tuple[int, int]) -> None:
    x, weight, _ = arguments(size=size)
    grad = torch.randn(3, 7, *size).contiguous(memory_format=torch.channels_last)
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    got = weight_gradient(x, grad)
    assert torch.allclose(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=["all", "input frozen", "weight frozen"])
def test_gradients(with_bias: bool, frozen: tuple[int, ...]) -> None:
    given = arguments() if with_bias else (*arguments()[:2], None)
    leaves = [t.requires_grad_() for i, t in enumerate(given) if t is not None and i not in frozen]
    y = conv3x3(*given)
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    exact: Any = F.conv2d(wide[0], wide[1], wide[2], padding=1)
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad)
    want = torch.autograd.grad(exact, [t for t in wide if t is not None and t.requires_grad], grad.double())
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_gradcheck_of_every_kind() -> None:
    given = [t.double().requires_grad_() for t in arguments(2, 3, (3, 4))]
    torch.autograd.gradcheck(conv3x3, given, check_forward_ad=True)
    torch.autograd.gradgradcheck(conv3x3, given)


@pytest.mark.usefixtures("always")
def test_per_sample_gradients() -> None:
    x, weight, bias = arguments(2, 3, (3, 4))

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return conv3x3(image[None], weight, bias).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    for gradient, image in zip(per_sample, x, strict=True):
        assert torch.allclose(gradient, torch.func.grad(loss)(weight, image), atol=1e-4)


def test_chosen_for_large_maps_and_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    large, weight, bias = arguments(128, 128, (32, 32))
    weight.requires_grad_()
    assert "_Conv3x3" in str(conv3x3(large, weight, bias).grad_fn)
    for other in (large[:, :, :16], large.contiguous(), large.double()):
        y = conv3x3(other, weight.to(other.dtype), bias.to(other.dtype))
        assert "_Conv3x3" not in str(y.grad_fn)
    wide, of_wide, _ = arguments(256, 256, (4, 4))
    assert "_Conv3x3" in str(conv3x3(wide, of_wide.requires_grad_(), None).grad_fn)
    with torch.no_grad():
        assert conv3x3(large, weight, bias).grad_fn is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert "_Conv3x3" not in str(conv3x3(large, weight, bias).grad_fn)
