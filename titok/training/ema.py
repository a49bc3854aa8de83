"""Exponential moving averages of the parameters of a model, with the warm-up of the official code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from titok.training.sharding import own_shares


def ema_decay(update: int, decay: float = 0.999) -> float:
    """The share of the averages that update number `update` keeps, which counts from 1.

    It is 0 for the first update, which copies the parameters, and then min(decay, update / (update + 9)). With
    decay 0.999, update 8991 is the first that uses it.
    """
    return 0.0 if update <= 1 else min(decay, update / (update + 9))


class EMA:
    """Averages of the parameters of `model` that require gradients when this object is made.

    Frozen parameters and buffers have no averages: during `swapped` the model keeps its own. A parameter that several
    modules share has one average. Averages lie on the devices of the parameters. They are float32 where the parameters
    are narrower, because half precision would round away what an update with a decay near 1 adds. With `fully_shard`,
    each process averages its own shards.

    Attributes:
        updates: number of updates so far.
        averages: by the name of the parameter.

    Args:
        model: on the device that it is trained on. The module itself, without a wrapper such as
            `DistributedDataParallel`, so that the names are its own.
        decay: in [0, 1), the largest share of the averages that an update keeps, see `ema_decay`.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        self.decay = decay
        self.updates = 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self._parameters.items()
        }
        self._is_swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters. Called after each optimizer step.

        Raises:
            RuntimeError: within `swapped`, where the parameters hold the averages.
        """
        if self._is_swapped:
            raise RuntimeError("update: the parameters hold the averages until the end of `swapped`")
        if not self.averages:
            return
        self.updates += 1
        averages = list(self.averages.values())
        parameters = [
            p.detach().to(average.dtype) for p, average in zip(self._parameters.values(), averages, strict=True)
        ]
        if self.updates == 1:
            _copy(averages, parameters)
        else:
            torch._foreach_lerp_(averages, parameters, 1 - ema_decay(self.updates, self.decay))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the parameters hold the averages. Afterwards they are what they were, bit for bit.

        It keeps a copy of the parameters meanwhile. Changes that are made to the parameters within are lost.

        Raises:
            RuntimeError: within another `swapped`.
        """
        if self._is_swapped:
            raise RuntimeError("swapped: the parameters hold the averages already")
        parameters = [p.detach() for p in self._parameters.values()]
        originals = [p.clone() for p in parameters]
        self._is_swapped = True
        try:
            _copy(parameters, list(self.averages.values()))
            yield
        finally:
            _copy(parameters, originals)
            self._is_swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """The number of updates as "updates", () int64, and each average as "averages.NAME". None is copied."""
        averages = {f"averages.{name}": average for name, average in self.averages.items()}
        return {"updates": torch.tensor(self.updates, device="cpu"), **averages}

    @staticmethod
    def by_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages in a state dict, by the names of their parameters."""
        prefix = "averages."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` returned. The values are copied.

        Raises:
            ValueError: `state` has other names, shapes or dtypes than `state_dict`. Nothing was taken over then.
        """
        own = self.state_dict()
        state = own_shares(state, own)
        if state.keys() != own.keys():
            names = sorted(state.keys() ^ own.keys())
            raise ValueError(f"state: expected the names of `state_dict`, got differences in {names[:3]}")
        for name, tensor in own.items():
            expected, got = (
                f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (tensor, state[name])
            )
            if got != expected:
                raise ValueError(f"state[{name!r}]: expected {expected}, got {got}")
        self.updates = int(state["updates"])
        for name, average in self.averages.items():
            average.copy_(state[f"averages.{name}"])


@torch.no_grad()
def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    """Copies each tensor of `values` into the one of `to` at the same place."""
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
