"""What the recipes share in which a model learns to reconstruct images: loss, discriminator and pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titok.data.augment import shift_images
from titok.data.folders import Images
from titok.processes import in_first_process, mean_of_all
from titok.training.config import ProxyTraining, ReconstructionTraining
from titok.training.discriminator import PatchDiscriminator
from titok.training.losses import LeCamAverages, PerceptualLoss, discriminator_loss, generator_loss
from titok.training.losses.precision import float32_or_wider
from titok.training.objective import Losses, M, Objective
from titok.training.pictures import rows_of_images

Perceptual = Callable[[Tensor, Tensor], Tensor]
Measure = Callable[[Any, Images | Tensor], dict[str, float]]  # of a model and images

SHOWN = 8  # held-out images in a picture


def augment(images: Tensor, config: ReconstructionTraining | ProxyTraining) -> Tensor:
    """Images (B, C, H, W), mirrored and shifted at random where the configuration says so."""
    if config.random_flip:
        mirrored = torch.rand(len(images), 1, 1, 1, dtype=torch.float32, device="cpu").to(images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if config.random_shift:
        pixels = config.random_shift
        down, right = torch.randint(-pixels, pixels + 1, (2, len(images)), device="cpu").to(images.device)
        images = shift_images(images, down, right)
    return images


def first_images(images: Images | Tensor | None, device: torch.device) -> Tensor | None:
    """The first images of a held-out set, which pictures show."""
    if images is None or len(images) == 0:
        return None
    return torch.stack([images[i] for i in range(min(SHOWN, len(images)))]).to(device)


def compared(images: Tensor, reconstruction: Tensor) -> Tensor:
    """A picture of images (n, C, H, W), their reconstructions, and the differences, one row each."""
    reconstruction = reconstruction.float().clamp(0, 1)
    return rows_of_images(images, reconstruction, (images.float() - reconstruction).abs())


class ReconstructionObjective(Objective[M]):
    """The loss of a model that reconstructs images. A subclass says how, in `reconstruct`.

    Args:
        model: on the device of the training.
        config: weights of the terms.
        perceptual: a distance (images, images) -> (); None takes the one that the configuration names.
        adversary: gives the adversarial term; None where its weight is 0.
        held_out: images of which pictures are made, and on which the model is measured.
        measure: figures of the model on the held-out images.
    """

    def __init__(
        self,
        model: M,
        config: ReconstructionTraining,
        *,
        perceptual: Perceptual | None = None,
        adversary: Adversary | None = None,
        held_out: Images | Tensor | None = None,
        measure: Measure | None = None,
    ) -> None:
        super().__init__(model)
        self.config, self._measure = config, measure
        self.device = next(model.parameters()).device
        if perceptual is None and config.perceptual_weight:
            # The first process downloads the weights, if they are not there.
            in_first_process(lambda: PerceptualLoss.from_name(config.perceptual) and None)
            perceptual = PerceptualLoss.from_name(config.perceptual).to(self.device)
        # In tuples, so that their parameters are not those of this module.
        self._perceptual, self._adversary = (perceptual,), (adversary,)
        self._held_out, self._shown = (held_out,), first_images(held_out, self.device)

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """The reconstruction (B, C, H, W), not clamped, and the loss () of the bottleneck, if it is trained."""
        raise NotImplementedError

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The loss of images (B, C, H, W) in [0, 1]. The figures are its terms and the "psnr" in dB."""
        config, (perceptual,), (adversary,) = self.config, self._perceptual, self._adversary
        images = augment(batch.to(self.device), config)
        reconstruction, bottleneck = self.reconstruct(images, step)
        loss, figures = generator_loss(
            reconstruction,
            images,
            step=step,
            bottleneck=bottleneck,
            perceptual=perceptual,
            discriminator=None if adversary is None else adversary.discriminator,
            reconstruction_kind=config.reconstruction_kind,
            reconstruction_weight=config.reconstruction_weight,
            perceptual_weight=config.perceptual_weight,
            adversarial_weight=config.adversarial_weight,
            adversarial_start=config.adversarial_start,
        )
        del figures["loss"]
        reconstruction = float32_or_wider(reconstruction.detach())
        error = (reconstruction - float32_or_wider(images)).square().mean()
        judged = adversary is not None and step >= adversary.first_step
        return Losses(loss, {**figures, "psnr": -10 * error.log10()}, (images, reconstruction) if judged else ())

    def picture(self) -> Tensor | None:
        """Held-out images, their reconstructions, and the differences, one row each."""
        images = self._shown
        if images is None:
            return None
        return compared(images, self.reconstruct(images, -1)[0])

    def evaluate(self) -> dict[str, float]:
        """What `measure` says of the model on the held-out images."""
        (images,) = self._held_out
        return {} if images is None or self._measure is None else self._measure(self.model, images)


class Adversary(nn.Module):
    """The objective of a discriminator that learns to tell images and their reconstructions apart.

    Attributes:
        first_step: of the run, in which its training starts.
        warmup_steps: of its learning rate.
        state: tensors that checkpoints hold, by name.
    """

    def __init__(self, config: ReconstructionTraining, channels: int, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.first_step, self.warmup_steps = config.adversarial_start, config.discriminator_warmup_steps
        self.discriminator = PatchDiscriminator(
            channels,
            width=config.discriminator_width,
            stages=config.discriminator_stages,
            grid=config.discriminator_grid,
        )
        self.averages = LeCamAverages()
        self.to(device)
        self.state: dict[str, Tensor] = {"real": self.averages.real, "fake": self.averages.fake}

    def forward(self, images: Tensor, reconstruction: Tensor, step: int) -> Losses:
        """The hinge loss with LeCam regularisation, of images and reconstructions (B, C, H, W)."""
        weight = self.config.lecam_weight
        averages = self.averages if weight else None
        loss, figures = discriminator_loss(
            self.discriminator, reconstruction, images, averages, lecam_weight=weight
        )
        del figures["loss"]
        return Losses(loss, figures)

    def after_step(self, losses: list[Losses]) -> None:
        """Moves the averages of the logits towards the means over all micro-batches of a step."""
        if self.config.lecam_weight:
            means = [
                torch.stack([one.figures[name] for one in losses]).mean()
                for name in ("real_logits", "fake_logits")
            ]
            real, fake = mean_of_all(torch.stack(means))
            self.averages.update(real, fake)


def make_adversary(config: ReconstructionTraining, channels: int, device: torch.device | str) -> Adversary | None:
    """The adversary of a run, or None where the adversarial term has no weight or never begins."""
    if not config.adversarial_weight or config.adversarial_start >= config.steps:
        return None
    return Adversary(config, channels, device)
