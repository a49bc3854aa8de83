"""The bottlenecks: vector quantizer (van den Oord et al. 2017) and diagonal Gaussian (Kingma & Welling 2014).

Shapes: B images, K tokens, C values of a latent, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.ops import Quantized, nearest_codebook, quantize


class VectorQuantizer(nn.Module):
    """A codebook (V, C). With `l2_normalize`, latents and codes are compared, and returned, on the unit sphere.

    Distances are computed in float32 for every dtype of the model but float64, which keeps float64.
    """

    l2_normalize: bool
    commitment_cost: float

    def __init__(self, codebook_size: int, code_dim: int, *, l2_normalize: bool, commitment_cost: float) -> None:
        super().__init__()
        self.l2_normalize, self.commitment_cost = l2_normalize, commitment_cost
        self.codebook: nn.Parameter = nn.Parameter(torch.empty(codebook_size, code_dim))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)

    def forward(self, latents: Tensor) -> Quantized:
        """latents (B, K, C) -> straight-through vectors, indices, losses and code counts, for training."""
        return quantize(latents, self.codebook, normalize=self.l2_normalize, commitment_cost=self.commitment_cost)

    def indices(self, latents: Tensor) -> Tensor:
        """latents (..., C) -> indices (...) int64 of the nearest codes."""
        return nearest_codebook(latents, self.codebook, normalize=self.l2_normalize)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices (...) int64 -> code vectors (..., C), of unit length with `l2_normalize`."""
        codes = F.embedding(indices, self.codebook)
        return F.normalize(codes, dim=-1) if self.l2_normalize else codes


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of the VAE bottleneck: independent normal distributions.

    Attributes:
        mean: (B, K, C).
        logvar: (B, K, C), logarithm of the variance, in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> DiagonalGaussian:
        """parameters (B, K, 2C): the first C channels are the mean, the others the log-variance to clamp."""
        mean, logvar = parameters.chunk(2, dim=-1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """The standard deviation, (B, K, C)."""
        return (0.5 * self.logvar).exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw (B, K, C). `generator` must be on the device of the mean; None takes PyTorch's global one."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal distribution in nats, summed over channels: (B, K)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=-1)
