"""Placeholder until the merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.model, self.decay = model, decay
        self.updates = torch.zeros((), dtype=torch.int64)
        self.averages = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        n = int(self.updates)
        decay = 0.0 if n <= 1 else min(self.decay, n / (n + 9))
        for name, p in self.model.named_parameters():
            self.averages[name].lerp_(p.detach(), 1 - decay) if decay else self.averages[name].copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.averages.items():
            value.copy_(state[name])
        self.updates.copy_(state["updates"])

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        raw = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(self.averages[n])
        try:
            yield
        finally:
            with torch.no_grad():
                for n, p in self.model.named_parameters():
                    p.copy_(raw[n])
