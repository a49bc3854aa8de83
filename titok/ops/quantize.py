"""Vector quantization with what training needs: straight-through values, losses, code counts, masks, feature maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_bool, check_int, check_number, check_tensor
from titok.ops.core.mode import last_backend, note_backend
from titok.ops.core.op import register_composite
from titok.ops.nearest_codebook import compute_dtype, look_up, nearest_codebook
from titok.profiling import annotate


class Quantized(NamedTuple):
    """What `quantize` returns; floating-point members in float32 (float64 if an argument is)."""

    quantized: Tensor  # as the latents: the chosen rows, with the gradient of the (normalised) latents
    indices: Tensor  # (...) int64, as the latents without their dimension of channels
    loss: Tensor  # (): commitment_loss + codebook_loss
    commitment_loss: Tensor  # (): commitment_cost * mean((sg(q) - z)^2), pulls latents to their codes
    codebook_loss: Tensor  # (): mean((q - sg(z))^2), pulls codes to their latents
    counts: Tensor  # (V,) int64: how many latents chose each code


def quantize(
    latents: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = False,
    commitment_cost: float = 0.25,
    mask: Tensor | None = None,
    dim: int = -1,
    backend: str | None = None,
) -> Quantized:
    """Replaces each latent by its nearest code (van den Oord et al. 2017, equation 3), straight-through.

    With z the latents and q the codes, both divided by their norms if `normalize`: `quantized` is z + sg(q - z),
    which is q but for rounding, and the losses compare z and q by means over all elements. All of it is computed
    in float32 or better, also under autocast. No latents at all give losses of 0.

    Args:
        latents: (..., C), floating point; of another layout with `dim`.
        codebook: (V, C), floating point.
        normalize, backend: as in `nearest_codebook`, which also says what NaN and infinities do.
        commitment_cost: weight of the commitment loss, at least 0.
        mask: bool, of the shape of the indices, False where a latent is padding. Such a latent gets index -1 and
            zeros, receives no gradient and takes no part in losses and counts, even if it holds NaN or infinities.
        dim: the dimension of `latents` that holds the C channels: 1 for feature maps (B, C, H, W), whose indices and
            mask are (B, H, W). `quantized` has the layout of `latents`.

    Raises:
        TypeError, ValueError, RuntimeError: as `nearest_codebook`; ValueError also for a negative cost, for a mask
            of another shape, and for a `dim` that `latents` does not have.
    """
    commitment_cost = check_number("commitment_cost", commitment_cost)
    check_bool("normalize", normalize)
    if not commitment_cost >= 0:
        raise ValueError(f"commitment_cost: expected a number >= 0, got {commitment_cost!r}")
    if torch.compiler.is_compiling():
        return Quantized(*_quantize(latents, codebook, normalize, commitment_cost, backend, mask, dim))
    with annotate("quantize"):
        return Quantized(*_quantize(latents, codebook, normalize, commitment_cost, backend, mask, dim))


def _quantize(
    latents: Tensor,
    codebook: Tensor,
    normalize: bool,
    commitment_cost: float,
    backend: str | None = None,
    mask: Tensor | None = None,
    dim: int = -1,
) -> tuple[Tensor, ...]:
    """The members of `Quantized`."""
    for name, tensor in (("latents", latents), ("codebook", codebook)):
        check_tensor(name, tensor, dtypes=FLOAT_DTYPES)
    latents = channels_last(latents, dim)
    if mask is not None:
        check_tensor("mask", mask, shape=latents.shape[:-1], dtypes=(torch.bool,), device=latents.device)
        hidden = ~mask[..., None]
        latents = latents.masked_fill(hidden, 0)
    indices = nearest_codebook(latents.detach(), codebook.detach(), normalize=normalize, backend=backend)
    if not torch.compiler.is_compiling():
        note_backend("quantize", last_backend("nearest_codebook") or "plain")
    z = latents.to(compute_dtype(latents.dtype, codebook.dtype))
    z = F.normalize(z, dim=-1) if normalize else z
    q = look_up(indices, codebook, normalize, latents.dtype)
    counted = torch.ones_like(indices)
    count: int | Tensor = max(z.numel(), 1)
    if mask is not None:
        q = q.masked_fill(hidden, 0)
        counted = mask.long()
        count = (counted.sum() * z.shape[-1]).clamp(min=1)
    difference = q.detach() - z.detach()
    commitment_loss = commitment_cost * (q.detach() - z).square().sum() / count
    codebook_loss = (q - z.detach()).square().sum() / count
    counts = torch.zeros(codebook.shape[0], dtype=torch.int64, device=indices.device)
    # `bincount` would make the host wait for the GPU.
    counts = counts.scatter_add(0, indices.reshape(-1), counted.reshape(-1))
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    quantized = (z + difference).movedim(-1, dim)
    return quantized, indices, commitment_loss + codebook_loss, commitment_loss, codebook_loss, counts


def channels_last(latents: Tensor, dim: int) -> Tensor:
    """A view of latents whose dimension `dim` is the last one."""
    dim = check_int("dim", dim)
    if not -latents.ndim <= dim < latents.ndim:
        raise ValueError(f"dim: expected a dimension of latents {tuple(latents.shape)}, got {dim}")
    return latents.movedim(dim, -1)


register_composite(
    "quantize(Tensor latents, Tensor codebook, bool normalize, float commitment_cost, str? backend=None, "
    "Tensor? mask=None, int dim=-1) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
)
