"""The distance of a reconstruction to its image, pixel by pixel."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.training.losses.precision import float32_or_wider


def reconstruction_loss(x: Tensor, target: Tensor, kind: Literal["l2", "l1"] = "l2") -> Tensor:
    """The mean squared error ("l2") or the mean absolute error ("l1") over all values.

    Args:
        x: reconstructions, of any shape and floating dtype. Half precision is widened to float32.
        target: images, of the shape of `x`.

    Returns:
        a tensor of shape (), differentiable in both arguments.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes differ, or `kind` is neither "l2" nor "l1".
    """
    check_tensor("x", x, dtypes=FLOAT_DTYPES)
    check_tensor("target", target, shape=x.shape, dtypes=FLOAT_DTYPES)
    if kind not in ("l2", "l1"):
        raise ValueError(f"kind: expected 'l2' or 'l1', got {kind!r}")
    distance = F.mse_loss if kind == "l2" else F.l1_loss
    return distance(float32_or_wider(x), float32_or_wider(target))
