"""Whether a call really runs what `torch.compile` made: a rival that silently runs uncompiled would flatter titok."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# How the profiler names a compiled graph, and a kernel that TorchInductor wrote for a GPU.
COMPILED = ("Torch-Compiled Region", "triton_")


def compiled_parts(run: Callable[[], Any]) -> int:
    """How many compiled graphs and generated kernels one call of `run` executes; 0 where it runs uncompiled."""
    with torch.profiler.profile() as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return sum(event.name.startswith(COMPILED) for event in profile.events())
