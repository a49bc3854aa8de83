"""Replacing codes that no latent uses.

Codes start as latents of the first batch. Later, codes that were not used for `every` steps become random latents of
the batch. Otherwise almost all latents would use the same few codes until the end, because gradients reach only codes
that are used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.processes import broadcast, mean_of_all, reduce_max
from titok.training.losses.precision import float32_or_wider
from titok.training.order import seed_of
from titok.training.sharding import own_share, whole


class CodeRestarts:
    """Replaces unused codes of a codebook, with the same result in every process.

    Args:
        owner: the module whose parameter `codebook` (V, C) holds the codes. It is looked up at each replacement,
            because sharding puts another parameter in its place.
        l2_normalize: whether codes have unit length.
        every: in steps. 0 replaces none, and the codes start as the model has them.
        until: number of steps that are done, after which codes are no longer replaced.
        seed: of the choice of latents.

    Attributes:
        used: (V,) bool, codes that some latent of this process used since the last replacement.
    """

    def __init__(self, owner: nn.Module, *, l2_normalize: bool, every: int, until: float, seed: int) -> None:
        self.owner, self.l2_normalize = owner, l2_normalize
        self.every, self.until, self.seed = every, until, seed
        codes, device = len(self._codebook), self._codebook.device
        self.used = torch.zeros(codes, dtype=torch.bool, device=device)
        self._counts = torch.zeros(codes, dtype=torch.int64, device=device)  # of step `_step`
        # (n, C) float32, of the first micro-batch that this process computed in step `_step`
        self._latents, self._step = torch.empty(0, device=device), -1

    @property
    def _codebook(self) -> Tensor:
        codebook: Tensor = self.owner.codebook  # type: ignore[assignment]
        return codebook

    def start(self, latents: Tensor) -> None:
        """Makes all codes latents of the first batch. Without restarts, nothing happens.

        Args:
            latents: (..., C) of the first micro-batch of this process.
        """
        if self.every:
            self._latents = float32_or_wider(latents.detach()).flatten(0, -2)
            self._replace(torch.ones_like(self.used), 0)

    def observe(self, latents: Tensor, counts: Tensor, step: int) -> None:
        """Takes note of the latents of a micro-batch and the codes that they use.

        Args:
            latents: (..., C).
            counts: (V,) int64, how many latents each code is the nearest of.
            step: in which the micro-batch is computed.
        """
        self.used |= counts > 0
        if step != self._step:  # the first micro-batch of the step
            self._step = step
            self._counts.zero_()
            if self.every:
                self._latents = float32_or_wider(latents.detach()).flatten(0, -2)
        self._counts += counts

    def after_step(self, steps_done: int) -> None:
        """Replaces unused codes every `every` steps, and forgets which were used."""
        if not self.every or steps_done % self.every:
            return
        self.merge()
        if steps_done <= self.until:
            self._replace(~self.used, steps_done)
        self.used.zero_()

    def figures(self) -> dict[str, Tensor]:
        """The number of "codes" in use since the last replacement, and the "entropy" in bits of those of the last step.

        Both are those of all processes.
        """
        self.merge()
        shares = mean_of_all(self._counts.double())
        shares = shares / shares.sum().clamp(min=1)
        return {"codes": self.used.sum(), "entropy": -torch.special.xlogy(shares, shares).sum() / math.log(2)}

    def merge(self) -> None:
        """Makes `used` say what the latents of all processes used."""
        reduce_max(self.used)

    @torch.no_grad()
    def _replace(self, codes: Tensor, step: int) -> None:
        """Replaces the codes that are true in `codes` (V,) by random latents of the first process's first micro-batch.

        No latent is taken twice unless there are fewer latents than codes to replace.
        """
        latents = broadcast(self._latents)
        generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, 2, step))
        order = torch.randperm(len(latents), generator=generator, device="cpu").to(codes.device)
        replaced = codes.nonzero()[:, 0]
        latents = latents[order[torch.arange(len(replaced), device=codes.device) % len(order)]]
        if self.l2_normalize:
            latents = F.normalize(latents, dim=-1)
        codebook = whole(self._codebook).clone()
        codebook[replaced] = latents.to(codebook.dtype)
        self._codebook.copy_(own_share(codebook, self._codebook))
