"""The patch discriminator and the losses of stage 2, compared with golden values of the official code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from golden import Case, recipe_state
from titok.training.discriminator import BlurDownsample, PatchDiscriminator
from titok.training.losses import LeCamAverages, discriminator_loss, generator_loss
from titok.training.losses.tokenizer import call_detached

STAGE_2 = {"perceptual_weight": 0.0, "adversarial_weight": 0.01, "adversarial_start": 20_000}


@pytest.fixture(scope="module")
def official() -> PatchDiscriminator:
    """The discriminator of the golden case, in float32."""
    discriminator = PatchDiscriminator()
    state = {name.removeprefix("discriminator."): value for name, value in recipe_state("discriminator").items()}
    discriminator.load_state_dict(state)
    return discriminator


@pytest.fixture(scope="module")
def official64(official: PatchDiscriminator) -> PatchDiscriminator:
    """The same in float64."""
    discriminator = PatchDiscriminator().double()
    discriminator.load_state_dict(official.state_dict())
    return discriminator


def small(**change: int) -> PatchDiscriminator:
    return PatchDiscriminator(**{"width": 4, "stages": 2, "grid": 3, "groups": 2, **change})


class Recorder(nn.Module):
    """Multiplies images by a parameter and records the dtypes that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.dtypes: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = images.movedim(1, -1) @ self.weight
        self.dtypes.append(logits.dtype)
        return logits


# ---------------------------------------------------------------------------------------------------------------
# Golden values.


@pytest.mark.slow
@torch.no_grad()
def test_logits_and_feature_maps_are_the_official_ones(
    official: PatchDiscriminator, official64: PatchDiscriminator
) -> None:
    case = Case("discriminator")
    for kind in ("real", "fake"):
        case.assert_float32(f"out.logits_{kind}", official(case[f"in.{kind}"]))
        case.assert_float64(f"f64.logits_{kind}", official64(case[f"in.{kind}"].double()))
    x = official64.block_in(case["in.real"].double())
    for number, block in enumerate(official64.blocks):
        x = block(x)
        if number > 0:  # the first map is too large to be in the golden data in float64
            case.assert_float64(f"f64.trace_block{number}", x[:, :2])
    case.assert_float64("f64.trace_pool", official64.pool(x)[:, :2])


@pytest.mark.slow
@pytest.mark.parametrize(("step", "when"), [(19_999, "before_start"), (20_000, "after_start")])
def test_step_of_the_generator_is_the_official_one(
    official: PatchDiscriminator, official64: PatchDiscriminator, step: int, when: str
) -> None:
    case = Case("discriminator")
    fake = case["in.fake"].double().requires_grad_()
    loss, figures = generator_loss(fake, case["in.real"].double(), step=step, discriminator=official64, **STAGE_2)
    case.assert_float64(f"f64.generator.{when}.total_loss", loss.detach())
    case.assert_float64(f"f64.generator.{when}.reconstruction_loss", figures["reconstruction"])
    case.assert_float64(f"f64.generator.{when}.gan_loss", figures["adversarial"])
    case.assert_float64(f"f64.generator.{when}.weighted_gan_loss", 0.01 * figures["adversarial"])
    assert torch.equal(figures["loss"], loss.detach())

    fake = case["in.fake"].requires_grad_()
    loss, _ = generator_loss(fake, case["in.real"], step=step, discriminator=official, **STAGE_2)
    loss.backward()
    want = case[f"out.generator.{when}.grad_image"]
    # The gradient passes through a max pooling and leaky ReLUs, so rounding may change which value it goes to.
    assert float((fake.grad - want).abs().max()) <= 2e-3 * float(want.abs().max())
    assert all(parameter.grad is None for parameter in official.parameters())


@pytest.mark.slow
def test_steps_of_the_discriminator_and_lecam_averages_are_the_official_ones(
    official64: PatchDiscriminator,
) -> None:
    case = Case("discriminator")
    averages = LeCamAverages().double()
    for step in range(2):
        with torch.no_grad():
            loss, figures = discriminator_loss(
                official64, case["in.fake"].double(), case["in.real"].double(), averages
            )
        averages.update(figures["real_logits"], figures["fake_logits"])
        case.assert_float64(f"f64.discriminator.step{step}.loss", loss)
        case.assert_float64(f"f64.discriminator.step{step}.lecam_loss", 0.001 * figures["lecam"])
        case.assert_float64(f"f64.discriminator.step{step}.ema_real", averages.real[None])
        case.assert_float64(f"f64.discriminator.step{step}.ema_fake", averages.fake[None])


# ---------------------------------------------------------------------------------------------------------------
# The discriminator.


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (4, 9), (1, 2)])
def test_blur_by_definition(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    got = BlurDownsample().double()(x)
    rows, columns = -(-height // 2), -(-width // 2)
    assert got.shape == (2, 3, rows, columns)
    top = (2 * (rows - 1) + 4 - height) // 2
    left = (2 * (columns - 1) + 4 - width) // 2
    weights = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    for i in range(rows):
        for j in range(columns):
            want = torch.zeros(2, 3, dtype=torch.float64)
            for k in range(4):
                for m in range(4):
                    y, z = 2 * i + k - top, 2 * j + m - left
                    if 0 <= y < height and 0 <= z < width:
                        want += weights[k] * weights[m] * x[:, :, y, z]
            torch.testing.assert_close(got[:, :, i, j], want, rtol=1e-12, atol=1e-14)


def test_other_sizes() -> None:
    assert small(channels=1, stages=3)(torch.rand(2, 1, 20, 13)).shape == (2, 1, 3, 3)
    assert small(stages=1, grid=16)(torch.rand(1, 3, 8, 8)).shape == (1, 1, 16, 16)
    names = set(small(stages=1).state_dict())
    assert names == {
        f"{layer}.{kind}"
        for layer in ("block_in.0", "blocks.0.0", "blocks.0.2", "to_logits.0", "to_logits.2")
        for kind in ("weight", "bias")
    }


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="width: expected a multiple of groups = 32, got 48"):
        PatchDiscriminator(width=48)
    with pytest.raises(ValueError, match="stages: expected an int of at least 1, got 0"):
        PatchDiscriminator(stages=0)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        small()(torch.zeros(1, 1, 8, 8))
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"perceptual: expected a callable for perceptual_weight 0\.1, got None"):
        generator_loss(images, images, step=0)
    with pytest.raises(ValueError, match="discriminator: expected a module from step 5 on, got None"):
        generator_loss(images, images, step=5, adversarial_start=5, perceptual_weight=0)
    with pytest.raises(ValueError, match=r"reconstruction: expected the shape of images \(1, 3, 8, 8\), got"):
        discriminator_loss(small(), images[..., :4], images)


# ---------------------------------------------------------------------------------------------------------------
# The two losses.


def test_loss_of_the_generator_is_the_weighted_sum_of_its_terms() -> None:
    discriminator = small().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    reconstruction = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    bottleneck = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss, figures = generator_loss(
        reconstruction, images, step=3, adversarial_start=3, bottleneck=bottleneck, discriminator=discriminator,
        perceptual=lambda x, y: (x - y).abs().sum(), reconstruction_kind="l1", reconstruction_weight=2.0,
        perceptual_weight=0.3, adversarial_weight=0.4, bottleneck_weight=0.5,
    )  # fmt: skip
    difference = (reconstruction - images).abs()
    logits = discriminator(reconstruction)
    want = 2 * difference.mean() + 0.3 * difference.sum() - 0.4 * logits.mean() + 0.5 * bottleneck
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert set(figures) == {"loss", "reconstruction", "perceptual", "bottleneck", "adversarial"}
    assert not any(figure.requires_grad for figure in figures.values())
    got = torch.autograd.grad(loss, (reconstruction, bottleneck))
    torch.testing.assert_close(
        got, torch.autograd.grad(want, (reconstruction, bottleneck)), rtol=1e-10, atol=1e-14
    )


def test_gradients() -> None:
    discriminator = small().double()
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    reconstruction = torch.rand_like(images).requires_grad_()
    averages = LeCamAverages().double()
    averages.update(torch.tensor(100.0), torch.tensor(-100.0))

    def of_reconstruction(x: Tensor) -> Tensor:
        return generator_loss(x, images, step=20_000, discriminator=discriminator, perceptual_weight=0)[0]

    def of_weight(weight: Tensor) -> Tensor:
        def logits(x: Tensor) -> Tensor:
            return torch.func.functional_call(discriminator, {"blocks.0.2.weight": weight}, x)

        return discriminator_loss(logits, reconstruction, images, averages, lecam_weight=0.5)[0]

    assert gradcheck(of_reconstruction, reconstruction)
    assert gradcheck(of_weight, discriminator.blocks[0][2].weight)


def test_terms_with_weight_zero_are_not_computed() -> None:
    images = torch.rand(1, 3, 8, 8)

    def fail(*_: object) -> Tensor:
        raise AssertionError("a term with weight 0 was computed")

    loss, figures = generator_loss(
        images, images, step=0, perceptual=fail, perceptual_weight=0, adversarial_weight=0, bottleneck_weight=0,
        bottleneck=torch.tensor(torch.nan),
    )  # fmt: skip
    assert set(figures) == {"loss", "reconstruction"}
    assert loss.item() == 0


def test_loss_of_the_discriminator_trains_the_discriminator_alone() -> None:
    discriminator = small()
    images, reconstruction = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    averages = LeCamAverages()
    averages.update(torch.tensor(100.0), torch.tensor(-100.0))
    loss, figures = discriminator_loss(discriminator, reconstruction, images, averages, lecam_weight=0.5)
    loss.backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    real, fake = discriminator(images), discriminator(reconstruction)
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    lecam = (real.mean() + 0.1).relu() ** 2 + (0.1 - fake.mean()).relu() ** 2
    torch.testing.assert_close(loss, hinge + 0.5 * lecam)
    torch.testing.assert_close(figures["hinge"], hinge.detach())
    assert averages.real.item() == pytest.approx(0.1)  # not moved by the loss
    without, figures = discriminator_loss(discriminator, reconstruction, images)
    torch.testing.assert_close(without, hinge)
    assert "lecam" not in figures


def test_a_detached_call_leaves_the_module_as_it_was() -> None:
    discriminator = small()
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    logits = call_detached(discriminator, images)
    assert torch.equal(logits, discriminator(images))
    logits.sum().backward()
    assert images.grad is not None
    assert all(p.requires_grad and p.grad is None for p in discriminator.parameters())


def test_losses_are_computed_in_float32_under_autocast() -> None:
    images, reconstruction = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8).bfloat16()
    recorder = Recorder()
    with torch.autocast("cpu", torch.bfloat16):
        assert recorder(images).dtype == torch.bfloat16  # what would happen otherwise
        recorder.dtypes.clear()
        loss, _ = generator_loss(
            reconstruction, images, step=0, adversarial_start=0, discriminator=recorder,
            perceptual=lambda x, y: recorder(x - y).mean(),
        )  # fmt: skip
        other, _ = discriminator_loss(recorder, reconstruction, images)
    assert loss.dtype == other.dtype == torch.float32
    assert recorder.dtypes == 4 * [torch.float32]
