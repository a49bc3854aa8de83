"""The two losses of adversarial training of a tokenizer: stage 2 as published, and single-stage training.

Both are computed in float32 or wider, even under autocast, as the official code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from titok.training.losses.adversarial import generator_adversarial_loss, hinge_discriminator_loss
from titok.training.losses.lecam import LeCamAverages, lecam_regularization
from titok.training.losses.precision import float32_or_wider
from titok.training.losses.reconstruction import reconstruction_loss

Figures = dict[str, Tensor]


def generator_loss(
    reconstruction: Tensor,
    images: Tensor,
    *,
    step: int,
    bottleneck: Tensor | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    discriminator: nn.Module | None = None,
    reconstruction_kind: Literal["l2", "l1"] = "l2",
    reconstruction_weight: float = 1.0,
    perceptual_weight: float = 0.1,
    adversarial_weight: float = 0.01,
    adversarial_start: int = 20_000,
    bottleneck_weight: float = 1.0,
) -> tuple[Tensor, Figures]:
    """The loss of the tokenizer: a weighted sum of up to four terms. The default weights are those of stage 2.

    A term whose weight is 0 is not computed. Neither is the bottleneck's where `bottleneck` is None, as in stage 2,
    which does not train the bottleneck. No gradient reaches the parameters of the discriminator.

    Args:
        reconstruction: (B, C, H, W), not clamped, of any floating dtype.
        images: (B, C, H, W) in [0, 1].
        step: optimizer steps done so far.
        bottleneck: (), the loss of the quantizer, or `kl_loss` of a VAE.
        perceptual: maps reconstruction and images to a distance of shape (), see `titok.training.losses.perceptual`.
        discriminator: maps images to logits. Inside `DistributedDataParallel`, pass the module that it wraps: the
            wrapper expects gradients of the parameters.
        adversarial_start: the first step with an adversarial term.

    Returns:
        the loss () and its terms before weighting, detached: "reconstruction"; "perceptual" and "adversarial" where
        the weight is not 0 ("adversarial" is 0 before its start); "bottleneck" where given; "loss" is the sum.

    Raises:
        ValueError: the shapes differ, or a term with a weight other than 0 lacks `perceptual` or `discriminator`.
    """
    terms: list[tuple[str, float, Tensor]] = []
    with torch.autocast(reconstruction.device.type, enabled=False):
        reconstruction, images = float32_or_wider(reconstruction), float32_or_wider(images)
        error = reconstruction_loss(reconstruction, images, reconstruction_kind)
        terms.append(("reconstruction", reconstruction_weight, error))
        if perceptual_weight:
            if perceptual is None:
                raise ValueError(
                    f"perceptual: expected a callable for perceptual_weight {perceptual_weight}, got None"
                )
            terms.append(("perceptual", perceptual_weight, perceptual(reconstruction, images)))
        if bottleneck is not None and bottleneck_weight:
            terms.append(("bottleneck", bottleneck_weight, bottleneck))
        if adversarial_weight:
            if step < adversarial_start:
                adversarial = torch.zeros_like(error)
            elif discriminator is None:
                raise ValueError(f"discriminator: expected a module from step {adversarial_start} on, got None")
            else:
                adversarial = generator_adversarial_loss(call_detached(discriminator, reconstruction))
            terms.append(("adversarial", adversarial_weight, adversarial))
        loss = torch.stack([weight * term for _, weight, term in terms]).sum()
    return loss, {"loss": loss.detach(), **{name: term.detach() for name, _, term in terms}}


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor],
    reconstruction: Tensor,
    images: Tensor,
    averages: LeCamAverages | None = None,
    *,
    lecam_weight: float = 0.001,
) -> tuple[Tensor, Figures]:
    """The loss of the discriminator: the hinge loss plus LeCam regularisation. The default weight is the published one.

    `averages` is not changed: after the step, the caller updates it with the means of "real_logits" and "fake_logits"
    over all processes and micro-batches.

    Args:
        discriminator: maps images to logits.
        reconstruction: (B, C, H, W) of any floating dtype. No gradient reaches it.
        images: (B, C, H, W) in [0, 1].
        averages: None leaves the regularisation out.

    Returns:
        the loss () and figures, detached: "loss" is the sum; "hinge" and, with `averages`, "lecam" are its terms
        before weighting; "real_logits" and "fake_logits" are the mean logits of images and reconstructions.

    Raises:
        ValueError: the shapes of images and reconstructions differ.
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction: expected the shape of images {tuple(images.shape)}, got {tuple(reconstruction.shape)}"
        )
    with torch.autocast(images.device.type, enabled=False):
        real = float32_or_wider(discriminator(float32_or_wider(images)))
        fake = float32_or_wider(discriminator(float32_or_wider(reconstruction.detach())))
        real_mean, fake_mean = real.mean(), fake.mean()
        loss = hinge = hinge_discriminator_loss(real, fake)
        figures = {"hinge": hinge.detach(), "real_logits": real_mean.detach(), "fake_logits": fake_mean.detach()}
        if averages is not None:
            lecam = lecam_regularization(real_mean, fake_mean, averages)
            figures["lecam"] = lecam.detach()
            loss = hinge + lecam_weight * lecam
    return loss, {"loss": loss.detach(), **figures}


def call_detached(module: nn.Module, *arguments: Tensor) -> Tensor:
    """`module(*arguments)`, differentiable in the arguments but not in the parameters of the module.

    The module itself is not changed, unlike with `requires_grad_(False)`.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, parameters, arguments)
