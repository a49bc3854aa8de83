"""LeCam regularisation of a discriminator (Tseng et al. 2021, "Regularizing GANs under limited data")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeCamAverages(nn.Module):
    """Moving averages of the discriminator's mean logits. They start at 0, as published.

    All processes of a distributed training must hold the same averages, so `update` takes means over all of them.
    The state dict holds `real` and `fake`.

    Attributes:
        real: () float32, moving average of the mean logits of images.
        fake: () float32, that of reconstructions.

    Args:
        decay: in [0, 1), the share of an average that an update keeps.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self.decay = decay
        self.register_buffer("real", torch.zeros((), dtype=torch.float32))
        self.register_buffer("fake", torch.zeros((), dtype=torch.float32))

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Moves both averages towards the means of a step. Called after the loss of that step was computed.

        Args:
            real_mean: (), mean logit of the images of the step, over all processes and micro-batches.
            fake_mean: (), that of the reconstructions.
        """
        self.real.copy_(self.decay * self.real + (1 - self.decay) * real_mean)
        self.fake.copy_(self.decay * self.fake + (1 - self.decay) * fake_mean)


def lecam_regularization(real_mean: Tensor, fake_mean: Tensor, averages: LeCamAverages) -> Tensor:
    """relu(real_mean - averages.fake)^2 + relu(averages.real - fake_mean)^2, of shape ().

    It keeps the logits of images near the average of the reconstructions, and the reverse. The published weight is
    0.001.

    Args:
        real_mean: (), the discriminator's mean logit of the images.
        fake_mean: (), that of the reconstructions.
        averages: moving averages before this step. They are not changed here.
    """
    above_fake = F.relu(real_mean - averages.fake)
    below_real = F.relu(averages.real - fake_mean)
    return above_fake.square() + below_real.square()
