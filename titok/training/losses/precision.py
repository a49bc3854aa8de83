"""The dtype in which losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def float32_or_wider(x: Tensor) -> Tensor:
    """`x` in float32 where it is float16 or bfloat16, and `x` itself otherwise. Differentiable."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
