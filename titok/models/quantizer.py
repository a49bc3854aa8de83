"""The two bottlenecks: a vector quantizer (van den Oord et al. 2017) and a diagonal Gaussian (VAE)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.ops import nearest_codebook, quantize
from titok.ops.quantize import Quantized


class VectorQuantizer(nn.Module):
    """A codebook (V, C). With `l2_normalize` latents and codes are compared, and returned, on the unit sphere.

    Distances are computed in float32 whatever the dtype of the model, or in float64 when that is float64.
    """

    def __init__(self, codebook_size: int, code_dim: int, *, l2_normalize: bool, commitment_cost: float) -> None:
        super().__init__()
        self.l2_normalize, self.commitment_cost = l2_normalize, commitment_cost
        self.codebook = nn.Parameter(torch.empty(codebook_size, code_dim))
        nn.init.uniform_(self.codebook, -1 / codebook_size, 1 / codebook_size)

    def forward(self, latents: Tensor) -> Quantized:
        """latents (B, K, C) -> straight-through vectors, indices, losses and code counts; for training."""
        return quantize(latents, self.codebook, normalize=self.l2_normalize, commitment_cost=self.commitment_cost)

    def indices(self, latents: Tensor) -> Tensor:
        """latents (..., C) -> indices of the nearest codes (...), int64."""
        return nearest_codebook(latents, self.codebook, normalize=self.l2_normalize)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices (...) -> code vectors (..., C), normalised where the quantizer normalises."""
        rows = F.embedding(indices, self.codebook)
        return F.normalize(rows, dim=-1) if self.l2_normalize else rows


@dataclass(frozen=True)
class DiagonalGaussian:
    """Posterior of the VAE bottleneck. `mean` and `logvar` (B, K, C); logvar is clamped to [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> DiagonalGaussian:
        """parameters (B, K, 2C): the first half of the channels is the mean, the second the log-variance."""
        mean, logvar = parameters.chunk(2, dim=-1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw (B, K, C); `generator` must be on the device of the mean."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats, summed over channels: (B, K)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=-1)
