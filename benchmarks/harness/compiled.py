"""Whether a call really runs what `torch.compile` made: a rival that silently runs uncompiled would flatter titok."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# How the profiler names a compiled graph, and the launch of a kernel that TorchInductor wrote for a GPU.
COMPILED = ("Torch-Compiled Region", "triton_")


def compiled_parts(run: Callable[[], Any]) -> int:
    """How many compiled graphs and generated kernels one call of `run` launches; 0 where it runs uncompiled.

    Only the host is profiled: the profiler of GPUs would slow down what is measured later in this process.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.name.startswith(COMPILED) for event in profile.events())
