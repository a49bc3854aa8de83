"""A share of pictures that is held out, chosen by their names, so that it is the same wherever and whenever."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def held_out_by_name(names: Sequence[str], share: float) -> Tensor:
    """Which pictures are held out, (N,) bool.

    A picture is held out where the SHA-256 of its name, read as a fraction of 2^256, is below `share`. Pictures that
    are added or removed do not change the choice of the others.

    Args:
        names: such as paths relative to the folder, with slashes.
        share: between 0 and 1.

    Raises:
        ValueError: `share` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    bound = int(share * (1 << 256))
    encoded = (name.encode(errors="surrogateescape") for name in names)
    return torch.tensor([int.from_bytes(hashlib.sha256(name).digest(), "big") < bound for name in encoded])
