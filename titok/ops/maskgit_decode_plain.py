"""`maskgit_decode_step` in plain PyTorch: policy "count" of `masked_decode_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from titok.ops import masked_decode_plain
from titok.ops.masked_decode_plain import TOP_P_ONE, Inputs, Logits
from titok.ops.maskgit_decode_params import StepParams


def decode_plain(
    tokens: Tensor, masked: Tensor, logits: Logits, counts: Tensor | None, is_maskgit: bool, numbers: StepParams
) -> tuple[Tensor, Tensor]:
    """New tokens and confidences, (B, N) both.

    Args:
        tokens, logits: checked; `maskgit_decode_step` documents them.
        masked: (B, N) bool.
        counts: (B,) int64, positions that stay masked, or None for those of `numbers`.
    """
    batch, length = tokens.shape
    seed = numbers.seed - (1 << 64) if numbers.seed >> 63 else numbers.seed
    sample = torch.arange(batch, device=tokens.device) + numbers.first_sample
    if counts is None:
        counts = torch.full_like(sample, numbers.num_masked)
    others = [torch.full_like(sample, value) for value in (seed, numbers.step, 0, TOP_P_ONE, 0, length)]
    integers = torch.stack([others[0], sample, others[1], counts, *others[2:]], 1)
    row = (numbers.guidance, numbers.inverse_temperature, numbers.draw_scale, numbers.noise, 0.0, 0.0)
    floats = torch.tensor(row, dtype=torch.float32, device=tokens.device).expand(batch, -1)
    if numbers.guidance == 1.0:
        logits = logits._replace(uncond=None)
    score = "log_probability" if is_maskgit else "logit"
    rule = Inputs(tokens, masked, None, None, integers, floats, "count", score, "drawn", False, False, 0)
    new, confidences, _, _ = masked_decode_plain.decode_plain(logits, rule)
    return new, confidences


def masked_first_order(tokens: Tensor, mask_token: int) -> Tensor:
    """The positions of each sample, the masked ones first, and each kind in ascending order.

    Args:
        tokens: (B, N) int64, codes or `mask_token`.

    Returns:
        (2, B, N) int64: [0] the positions in that order; [1] the place of each position in it.
    """
    positions = (tokens != mask_token).to(torch.int8).argsort(dim=1, stable=True)
    return torch.stack([positions, positions.argsort(dim=1)])
