"""Parts that the published decoder and the published generators share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Linear, exact GELU, linear, under the names that checkpoints have for them."""
    layers: dict[str, nn.Module] = {
        "fc1": nn.Linear(width, hidden),
        "gelu": nn.GELU(),
        "fc2": nn.Linear(hidden, width),
    }
    return nn.Sequential(OrderedDict(layers))


def conv3x3(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def with_weights(make: Callable[[], Any], weights: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    """The model of `make()` in evaluation mode, with contiguous copies of `weights` in `dtype` as its parameters.

    A weight that is already contiguous and of that dtype is shared, not copied. None keeps each weight's dtype.

    Raises:
        RuntimeError: a parameter has no weight, or a weight no parameter.
    """
    with torch.device("meta"):
        model = make()
    contiguous = {name: value.detach().to(dtype or value.dtype).contiguous() for name, value in weights.items()}
    model.load_state_dict(contiguous, strict=True, assign=True)
    return model.eval().requires_grad_(False)
