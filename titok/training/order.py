"""The order of the data and the seeds of the steps. Neither depends on how many processes train, nor on which one asks.

A step has a batch of samples, which is cut into micro-batches of fixed size. Each process computes some of them, and a
micro-batch has the same samples and the same random numbers whichever process computes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def seed_of(*numbers: int) -> int:
    """One seed in [0, 2^63), made of several numbers. Seeds of similar numbers are unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def shuffled_draws(count: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Yields the draws of each step from `first_step` on, (batch_size,) int64, without an end.

    Draw number epoch * count + index is sample `index` in that epoch. Each epoch is a random permutation of all `count`
    samples. A batch may contain the end of one epoch and the start of the next.
    """

    @lru_cache(maxsize=2)  # a step rarely needs more than the epoch of the step before
    def order_of(epoch: int) -> Tensor:
        return torch.randperm(
            count, generator=torch.Generator("cpu").manual_seed(seed_of(seed, 1, epoch)), device="cpu"
        )

    for step in itertools.count(first_step):
        # In all epochs, one after the other.
        positions = torch.arange(step * batch_size, (step + 1) * batch_size, device="cpu")
        epochs = positions // count
        draws = [
            epoch * count + order_of(int(epoch))[positions[epochs == epoch] % count] for epoch in epochs.unique()
        ]
        yield torch.cat(draws)


def shuffled_batches(count: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Yields the indices of the samples in each step, as `shuffled_draws` yields the draws."""
    for draws in shuffled_draws(count, batch_size, seed, first_step):
        yield draws % count


def micro_batches(batches: Iterator[Tensor], size: int, rank: int, world_size: int) -> Iterator[Tensor]:
    """Yields the micro-batches of `size` indices that one process computes, of each batch in turn.

    Process `rank` of `world_size` takes the micro-batches rank, rank + world_size, ... of each batch.
    """
    for batch in batches:
        yield from batch.split(size)[rank::world_size]
