"""The losses, compared with golden values of the official code and with slow definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from golden import Case
from titok.models.quantizer import DiagonalGaussian
from titok.training.losses import (
    LeCamAverages,
    generator_adversarial_loss,
    hinge_discriminator_loss,
    kl_loss,
    lecam_regularization,
    proxy_code_loss,
    reconstruction_loss,
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def averages_of(real: Tensor, fake: Tensor) -> LeCamAverages:
    averages = LeCamAverages().to(real.dtype)
    averages.load_state_dict({"real": real.squeeze(), "fake": fake.squeeze()})
    return averages


# ---------------------------------------------------------------------------------------------------------------
# Golden values.


def test_stage_1_loss_is_the_official_one() -> None:
    case = Case("losses")
    for dtype, compare, out in (
        (torch.float32, case.assert_float32, "out"),
        (torch.float64, case.assert_float64, "f64"),
    ):
        logits = case["in.stage1.logits"].to(dtype).requires_grad_()
        loss = proxy_code_loss(logits.permute(0, 2, 3, 1), case["in.stage1.codes"].unflatten(1, (4, 4)))
        loss.backward()
        compare(f"{out}.stage1.reconstruction_loss", loss.detach())
        quantizer_loss = case["in.stage1.quantizer_losses"][0].to(dtype)
        compare(f"{out}.stage1.total_loss", loss.detach() + quantizer_loss)
        if dtype == torch.float32:  # the golden data has no gradient in float64
            compare("out.stage1.grad_logits", logits.grad)


def test_hinge_loss_and_its_gradients_are_the_official_ones() -> None:
    case = Case("losses")
    for dtype, compare, out in (
        (torch.float32, case.assert_float32, "out"),
        (torch.float64, case.assert_float64, "f64"),
    ):
        real = case["in.gan.logits_real"].to(dtype).requires_grad_()
        fake = case["in.gan.logits_fake"].to(dtype).requires_grad_()
        loss = hinge_discriminator_loss(real, fake)
        loss.backward()
        compare(f"{out}.gan.hinge_d_loss", loss.detach())
        compare(f"{out}.gan.hinge_grad_real", real.grad)
        compare(f"{out}.gan.hinge_grad_fake", fake.grad)


def test_lecam_regularization_is_the_official_one() -> None:
    case = Case("losses")
    real, fake = (case[f"in.gan.logits_{kind}"].double().mean() for kind in ("real", "fake"))
    averages = averages_of(case["in.gan.ema_real_mean"].double(), case["in.gan.ema_fake_mean"].double())
    case.assert_float64("f64.gan.lecam_loss", lecam_regularization(real, fake, averages))


# ---------------------------------------------------------------------------------------------------------------
# Definitions.


def test_proxy_code_loss_by_definition() -> None:
    logits, codes = random(2, 3, 5, 7), torch.randint(7, (2, 3, 5))
    loss = proxy_code_loss(logits, codes)
    loss.backward()
    probabilities = logits.detach().exp()
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    chosen = [probabilities[b, i, j, codes[b, i, j]].log() for b in range(2) for i in range(3) for j in range(5)]
    assert loss.item() == pytest.approx(-sum(chosen).item() / 30, rel=1e-12)
    one_hot = torch.zeros_like(probabilities).scatter_(-1, codes[..., None], 1.0)
    torch.testing.assert_close(logits.grad, (probabilities - one_hot) / 30, rtol=1e-10, atol=1e-16)


def test_reconstruction_loss_by_definition() -> None:
    x, target = random(2, 3, 4, 5), random(2, 3, 4, 5)
    difference = (x - target).detach()
    assert reconstruction_loss(x, target).item() == pytest.approx((difference**2).sum().item() / 120, rel=1e-12)
    assert reconstruction_loss(x, target, "l1").item() == pytest.approx(
        difference.abs().sum().item() / 120, rel=1e-12
    )


def test_kl_is_summed_over_tokens_and_channels_and_averaged_over_images() -> None:
    posterior = DiagonalGaussian(random(3, 4, 2), random(3, 4, 2))
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    assert kl_loss(posterior).item() == pytest.approx(divergence.sum().item() / 3, rel=1e-12)


def test_generator_adversarial_loss_is_the_negative_mean() -> None:
    logits = random(2, 1, 3, 3)
    assert generator_adversarial_loss(logits).item() == pytest.approx(-logits.mean().item(), rel=1e-14)


def test_half_precision_is_widened() -> None:
    logits, codes = torch.randn(2, 3, 3, 9), torch.randint(9, (2, 3, 3))
    x, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = logits.to(dtype)
        assert torch.equal(proxy_code_loss(narrow, codes), proxy_code_loss(narrow.float(), codes))
        x, target = x.to(dtype), target.to(dtype)
        assert torch.equal(reconstruction_loss(x, target), reconstruction_loss(x.float(), target.float()))
        assert torch.equal(generator_adversarial_loss(narrow), generator_adversarial_loss(narrow.float()))
        wide, narrow_posterior = (
            DiagonalGaussian(narrow.to(d)[..., 0], narrow.to(d)[..., 1]) for d in (torch.float32, dtype)
        )
        assert torch.equal(kl_loss(narrow_posterior), kl_loss(wide))


def test_lecam_averages_move_by_the_decay() -> None:
    averages = LeCamAverages(decay=0.9)
    for _ in range(2):
        averages.update(torch.tensor(1.0), torch.tensor(-2.0))
    assert averages.real.item() == pytest.approx(0.19)
    assert averages.fake.item() == pytest.approx(-0.38)
    restored = LeCamAverages(decay=0.9)
    restored.load_state_dict(averages.state_dict())
    assert torch.equal(restored.real, averages.real)
    assert torch.equal(restored.fake, averages.fake)


def test_gradients() -> None:
    codes = torch.randint(5, (2, 2, 3))
    averages = averages_of(torch.tensor(0.5).double(), torch.tensor(-0.5).double())
    target = random(2, 3, 4, 4)
    assert gradcheck(lambda logits: proxy_code_loss(logits, codes), random(2, 2, 3, 5))
    assert gradcheck(lambda x: reconstruction_loss(x, target), random(2, 3, 4, 4))
    assert gradcheck(lambda x: reconstruction_loss(x, target, "l1"), random(2, 3, 4, 4))
    assert gradcheck(
        lambda mean, logvar: kl_loss(DiagonalGaussian(mean, logvar)), (random(2, 3, 2), random(2, 3, 2))
    )
    assert gradcheck(hinge_discriminator_loss, (random(2, 1, 3, 3), random(2, 1, 3, 3)))
    assert gradcheck(generator_adversarial_loss, random(2, 1, 3, 3))
    assert gradcheck(
        lambda real, fake: lecam_regularization(real.mean(), fake.mean(), averages), (random(4), random(4))
    )


# ---------------------------------------------------------------------------------------------------------------
# Errors.


def test_wrong_arguments_are_named() -> None:
    x, codes = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 3, 4, 4\), got \(2, 1, 4, 4\)"):
        reconstruction_loss(x, x[:, :1])
    with pytest.raises(ValueError, match="kind: expected 'l2' or 'l1', got 'huber'"):
        reconstruction_loss(x, x, "huber")
    with pytest.raises(ValueError, match=r"codes: expected shape \(2, 3, 4\), got \(2, 4, 4\)"):
        proxy_code_loss(x, torch.zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes: expected ids in \[0, 4\), got -100"):
        proxy_code_loss(x, codes - 100)  # PyTorch's cross-entropy ignores -100
    with pytest.raises(TypeError, match="codes: expected dtype int64, got float32"):
        proxy_code_loss(x, codes.float())
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got 1.0"):
        LeCamAverages(1.0)
