"""The loss of a VAE's bottleneck (Kingma & Welling 2014)."""

from __future__ import annotations

from torch import Tensor

from titok.models.quantizer import DiagonalGaussian
from titok.training.losses.precision import float32_or_wider


def kl_loss(posterior: DiagonalGaussian) -> Tensor:
    """The KL divergence of the posterior to the standard normal distribution, in nats per image.

    It is summed over the latent tokens and channels of an image, and averaged over the images. The published weight
    of this loss is 1e-6.

    Args:
        posterior: with mean and log-variance (B, K, C). Half precision is widened to float32.

    Returns:
        a tensor of shape (), differentiable in mean and log-variance.
    """
    wide = DiagonalGaussian(float32_or_wider(posterior.mean), float32_or_wider(posterior.logvar))
    return wide.kl().sum() / posterior.mean.shape[0]
