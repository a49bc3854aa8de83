"""Vector quantization with what training needs: straight-through values, losses, code counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.checks import check_bool, check_number, check_tensor
from titok.ops.core.mode import last_backend, note_backend
from titok.ops.core.op import register_composite
from titok.ops.nearest_codebook import compute_dtype, look_up, nearest_codebook
from titok.profiling import annotate


class Quantized(NamedTuple):
    """What `quantize` returns; floating-point members in float32 (float64 if an argument is)."""

    quantized: Tensor  # (..., C): the chosen rows, with the gradient of the (normalised) latents
    indices: Tensor  # (...) int64
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
    backend: str | None = None,
) -> Quantized:
    """Replaces each latent by its nearest code (van den Oord et al. 2017, equation 3), straight-through.

    With z the latents and q the codes, both divided by their norms if `normalize`: `quantized` is z + sg(q - z),
    which is q but for rounding, and the losses compare z and q by means over all elements. All of it is computed
    in float32 or better, also under autocast. No latents at all give losses of 0.

    Args:
        latents: (..., C), floating point.
        codebook: (V, C), floating point.
        normalize, backend: as in `nearest_codebook`, which also says what NaN and infinities do.
        commitment_cost: weight of the commitment loss, at least 0.

    Raises:
        TypeError, ValueError, RuntimeError: as `nearest_codebook`; ValueError also for a negative cost.
    """
    commitment_cost = check_number("commitment_cost", commitment_cost)
    check_bool("normalize", normalize)
    if not commitment_cost >= 0:
        raise ValueError(f"commitment_cost: expected a number >= 0, got {commitment_cost!r}")
    if torch.compiler.is_compiling():
        return Quantized(*_quantize(latents, codebook, normalize, commitment_cost, backend))
    with annotate("quantize"):
        return Quantized(*_quantize(latents, codebook, normalize, commitment_cost, backend))


def _quantize(
    latents: Tensor, codebook: Tensor, normalize: bool, commitment_cost: float, backend: str | None = None
) -> tuple[Tensor, ...]:
    """The members of `Quantized`."""
    for name, tensor in (("latents", latents), ("codebook", codebook)):
        check_tensor(name, tensor)
    indices = nearest_codebook(latents.detach(), codebook.detach(), normalize=normalize, backend=backend)
    if not torch.compiler.is_compiling():
        note_backend("quantize", last_backend("nearest_codebook") or "plain")
    z = latents.to(compute_dtype(latents.dtype, codebook.dtype))
    z = F.normalize(z, dim=-1) if normalize else z
    q = look_up(indices, codebook, normalize, latents.dtype)
    difference = q.detach() - z.detach()
    count = max(z.numel(), 1)
    commitment_loss = commitment_cost * (q.detach() - z).square().sum() / count
    codebook_loss = (q - z.detach()).square().sum() / count
    flat = indices.reshape(-1)
    counts = torch.zeros(codebook.shape[0], dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))  # bincount would make the host wait for the GPU
    return z + difference, indices, commitment_loss + codebook_loss, commitment_loss, codebook_loss, counts


register_composite(
    "quantize(Tensor latents, Tensor codebook, bool normalize, float commitment_cost, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
)
