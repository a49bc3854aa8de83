"""How the processes of a group share the pictures of a set, and the bar that shows the progress of the first one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from titok.processes import own_part


def own_batches(count: int, batch_size: int) -> tuple[Tensor, ...]:
    """The batches of this process: consecutive numbers in [0, count), (B,) int64 each.

    The batches are the same for any number of processes, which take them in turn.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    rank, world = own_part()
    return torch.arange(count).split(batch_size)[rank::world] if count else ()


def progress_bar(total: int, progress: bool | None, unit: str = "img") -> Any:
    """A bar on stderr, in the first process alone.

    Args:
        total: of the units.
        progress: True shows it, None does so where stderr is a terminal, False does not.
        unit: what is counted.
    """
    hidden = own_part()[0] > 0 or progress is False
    disable = True if hidden else (None if progress is None else False)
    return tqdm(total=total, desc="pictures", unit=unit, leave=False, file=sys.stderr, disable=disable)
