"""The loss of stage 1 of TiTok's training (Yu et al. 2024): the decoder predicts the codes of a 2D tokenizer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor, check_tokens
from titok.training.losses.precision import float32_or_wider


def proxy_code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """The cross-entropy of the predicted proxy codes in nats, averaged over all codes of all images.

    Args:
        logits: (B, h, w, V) of any floating dtype, as `TiTok.decoder` with a "proxy" head returns them. V is the
            codebook size of the proxy tokenizer. Half precision is widened to float32.
        codes: (B, h, w), of any integer dtype, in [0, V): the proxy tokenizer's codes of the same images.

    Returns:
        a tensor of shape (), differentiable in `logits`.

    Raises:
        TypeError: `logits` is not a floating tensor, or `codes` not a tensor of integers.
        ValueError: the shapes do not fit, or a code is outside [0, V).
    """
    check_tensor("logits", logits, shape=("B", "h", "w", "V"), dtypes=FLOAT_DTYPES)
    batch, height, width, codebook_size = logits.shape
    check_tensor("codes", codes, shape=(batch, height, width))
    codes = check_tokens(codes.flatten(1), height * width, codebook_size, name="codes")
    return F.cross_entropy(float32_or_wider(logits).flatten(0, 2), codes.flatten())
