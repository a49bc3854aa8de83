"""Philox4x32-10, the counter-based generator behind every random decision of decoding.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A block of four 32-bit words
is a pure function of a 128-bit counter and a 64-bit key, so a draw depends on *what* is drawn, never on how many
draws ran before it, on the batch or on the number of processes. csrc/common/philox.h is the same for C++ and CUDA.

Layout, the one place where it is decided:

    key     = (seed bits 0..31, seed bits 32..63)
    counter = (position in the sample, decoding step, sample index bits 0..31, sample index bits 32..63)
    words   = (0: high and 1: low half of the 64-bit uniform of the draw, 2: the confidence's noise, 3: unused)
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four words for each counter, Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 x 32-bit product wraps in int64, yet all its 64 bits are right; the mask undoes the sign extension.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def decode_words(sample: torch.Tensor, step: int, position: torch.Tensor, seed: int) -> Words:
    """The words of (sample, step, position) under `seed`, by the layout above.

    Args:
        sample, position: int64, broadcast together; sample indices lie in [0, 2^63).
        seed: in [0, 2^64).
    """
    counter = (position, torch.full_like(position, step), sample & _WORD, (sample >> 32) & _WORD)
    return philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
