"""The losses of generator and discriminator (hinge loss: Lim & Ye 2017).

Logits are those of a discriminator, of any shape and floating dtype. They are high where an image looks real.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titok.training.losses.precision import float32_or_wider


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean(relu(1 - real)) / 2 + mean(relu(1 + fake)) / 2, of shape (). The discriminator minimises it.

    Args:
        real_logits: of images.
        fake_logits: of reconstructions.
    """
    real, fake = float32_or_wider(real_logits), float32_or_wider(fake_logits)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_adversarial_loss(fake_logits: Tensor) -> Tensor:
    """-mean(fake), of shape (). The generator minimises it, so that its reconstructions look real."""
    return -float32_or_wider(fake_logits).mean()
