"""The two rates that every benchmark compares with: a large matrix product and a large copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from titok.inference import onednn

# Device -> (side of the square matrices, bytes copied): large enough to reach the machine's full rate.
SIZES = {"cpu": (3072, 1 << 28), "cuda": (8192, 1 << 30)}


def ceiling_runs(dtype: torch.dtype, device: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What to time for the machine's ceilings.

    Returns:
        runs: "mm", a square matrix product in `dtype`, and "copy", functions without arguments. On a CPU the product is
            oneDNN's with a packed weight, the fastest that PyTorch has; on a GPU it is `torch.mm`.
        work: FLOP of one "mm", and bytes read plus bytes written by one "copy".
    """
    size, num_bytes = SIZES[device]
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    out = torch.empty_like(a)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "mm": partial(torch.mm, a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    if device == "cpu" and onednn.packs(b):
        runs["mm"] = partial(onednn.packed_linear, a, onednn.pack_linear(b), None, False)
    return runs, {"mm": 2.0 * size**3, "copy": 2.0 * source.numel()}
