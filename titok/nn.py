"""Modules on top of `titok.ops` for models of others."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checks import check_number
from titok.ops import Quantized, quantize
from titok.ops.quantize import channels_last
from titok.processes import is_distributed


class EMAVectorQuantizer(nn.Module):
    """A vector quantizer whose codes follow the moving average of their latents, without gradients.

    The update is that of van den Oord et al. 2017, appendix A.1, with the usages smoothed (Laplace) before they
    divide. In training mode each call quantizes with the codes as they are and then updates them. All processes of a
    `torch.distributed` group update alike, from the latents of all. The update has fixed shapes and does not make the
    host wait, so that it works within `torch.compile`, under autocast and in `DistributedDataParallel`. A learned
    codebook needs no module: pass an `nn.Parameter` to `titok.ops.quantize`.

    Args:
        codebook_size: V, the number of codes.
        code_dim: C, channels of a latent.
        normalize: compare latents and codes on the unit sphere.
        commitment_cost: weight of the commitment loss.
        decay: of the moving averages, in [0, 1).
        restart_below: a code whose usage falls below this many latents a step becomes a random latent of the first
            process. 0 restarts none. Codes start with usage 1, so above 1 they all start as latents of the first
            step.
        dim: the dimension of the latents that holds the channels: 1 for feature maps (B, C, H, W).
        eps: of the smoothing.

    Attributes:
        codebook: (V, C) float32.
        usage: (V,) float32, the moving average of how many latents choose each code in a step.
        sums: (V, C) float32, the moving average of the sum of these latents.

    Raises:
        ValueError: an argument is out of its range.
    """

    codebook: Tensor
    usage: Tensor
    sums: Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        normalize: bool = False,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.0,
        dim: int = -1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or code_dim < 1:
            raise ValueError(
                f"codebook_size, code_dim: expected integers >= 1, got {codebook_size} and {code_dim}"
            )
        if not 0 <= check_number("decay", decay) < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        for name, value in (("restart_below", restart_below), ("eps", eps), ("commitment_cost", commitment_cost)):
            if not check_number(name, value) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        self.normalize, self.commitment_cost, self.dim = normalize, commitment_cost, dim
        self.decay, self.restart_below, self.eps = decay, restart_below, eps
        codes = torch.randn(codebook_size, code_dim)
        codes = F.normalize(codes, dim=-1) if normalize else codes
        self.register_buffer("codebook", codes)
        self.register_buffer("usage", torch.ones(codebook_size))
        self.register_buffer("sums", codes.clone())

    def forward(self, latents: Tensor, mask: Tensor | None = None) -> Quantized:
        """What `titok.ops.quantize` returns for these latents; in training mode the codes are updated afterwards.

        Its `loss` is the commitment loss plus the codebook loss, which is a constant here.

        Args:
            latents: floating point, with C channels in dimension `dim`.
            mask: bool, of the shape of the indices, False where a latent is padding.

        Raises:
            TypeError, ValueError: as `titok.ops.quantize`.
        """
        quantized = quantize(
            latents, self.codebook, normalize=self.normalize, commitment_cost=self.commitment_cost, mask=mask,
            dim=self.dim,
        )  # fmt: skip
        if self.training:
            self._update(latents.detach(), quantized, mask)
        return quantized

    @torch.no_grad()
    def _update(self, latents: Tensor, quantized: Quantized, mask: Tensor | None) -> None:
        z = channels_last(latents, self.dim).float().flatten(0, -2)
        chosen = quantized.indices.flatten()
        is_visible = None if mask is None else mask.flatten()
        if is_visible is not None:
            z, chosen = z.masked_fill(~is_visible[:, None], 0), chosen.clamp(min=0)
        z = F.normalize(z, dim=-1) if self.normalize else z
        sums = torch.zeros_like(self.sums).index_add(0, chosen, z)
        counts = quantized.counts.float()[:, None]
        candidates = self._candidates(z, is_visible)
        counts, sums, candidates = _sum_over_processes(counts, sums, candidates)

        self.usage.lerp_(counts[:, 0], 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.usage.sum()
        smoothed = (self.usage + self.eps) / (total + len(self.usage) * self.eps) * total
        codes = self.sums / smoothed[:, None]
        codes = F.normalize(codes, dim=-1) if self.normalize else codes
        if candidates is not None:
            restarted = (self.usage < self.restart_below) & (counts.sum() > 0)
            codes = torch.where(restarted[:, None], candidates, codes)
            self.usage.masked_fill_(restarted, self.restart_below)
            self.sums.copy_(torch.where(restarted[:, None], candidates * self.restart_below, self.sums))
        self.codebook.copy_(codes)

    def _candidates(self, z: Tensor, is_visible: Tensor | None) -> Tensor | None:
        """V random rows of z (n, C) that are not hidden; zeros if there is none, and in all but the first process."""
        size = len(self.codebook)
        if not self.restart_below:
            return None
        if len(z) == 0 or (is_distributed() and dist.get_rank() > 0):
            return torch.zeros_like(self.sums)
        if is_visible is None:
            return z[torch.randint(len(z), (size,), device=z.device)]
        visible_first = is_visible.long().argsort(descending=True, stable=True)
        place = (torch.rand(size, device=z.device, dtype=torch.float64) * is_visible.sum()).long()
        return z[visible_first[place]]

    def extra_repr(self) -> str:
        """The arguments that `print` shows."""
        size, width = self.codebook.shape
        return f"{size}, {width}, normalize={self.normalize}, decay={self.decay}, dim={self.dim}"


def _sum_over_processes(
    counts: Tensor, sums: Tensor, candidates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each of them summed over the processes of the group, if there is one, in one exchange."""
    if not is_distributed():
        return counts, sums, candidates
    parts = [counts, sums] if candidates is None else [counts, sums, candidates]
    together = torch.cat(parts, dim=1)
    dist.all_reduce(together)
    counts, sums, *rest = together.split([part.shape[1] for part in parts], dim=1)
    return counts, sums, rest[0] if rest else None
