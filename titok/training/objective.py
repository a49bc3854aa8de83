"""What an optimizer minimises: a module that computes the loss of a micro-batch.

A module, because PyTorch averages gradients over processes only for what one call of a wrapped module computes.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.models.vqgan import MaskGITVQGAN

M = TypeVar("M", TiTok, MaskGIT, MaskGITVQGAN)


class Losses(NamedTuple):
    """The result of an objective for one micro-batch.

    Attributes:
        loss: (), which is minimised.
        figures: further tensors of shape (), without gradients, that the run shows. They are averaged over the
            micro-batches.
        compared: the images and their reconstructions, without gradients, where a discriminator learns to tell them
            apart.
    """

    loss: Tensor
    figures: dict[str, Tensor]
    compared: tuple[Tensor, ...] = ()


class Objective(nn.Module, Generic[M]):
    """The loss of a model, as a function of a micro-batch and the number of steps that are done.

    A subclass overrides `forward` and, where it needs them, the other methods. Only the model is registered as a
    module: networks that the loss reads but does not train are kept from the optimizer and from checkpoints.

    Attributes:
        model: that is trained.
        state: further tensors that checkpoints hold, by name. They are the same in every process when a checkpoint is
            written.
    """

    def __init__(self, model: M) -> None:
        super().__init__()
        self.model: M = model
        self.state: dict[str, Tensor] = {}

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The loss of a micro-batch, which may lie on another device than the model."""
        raise NotImplementedError

    def start(self, batch: Tensor) -> None:
        """Called before the first step of a run, with the first micro-batch of the process."""

    def after_step(self, steps_done: int) -> None:
        """Called after each step, in every process."""

    def before_saving(self) -> None:
        """Called before each checkpoint, in every process: makes `state` the same everywhere."""

    def picture(self) -> Tensor | None:
        """A picture of what the model does now, (C, H, W) in [0, 1], or None."""
        return None


def gradient_free(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures without gradients."""
    return {name: value.detach() for name, value in figures.items()}


def unregistered(module: nn.Module) -> tuple[nn.Module]:
    """A module in a tuple, which another module may have as an attribute without owning its parameters."""
    return (module,)


def freeze(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on `device`, in eval mode, without gradients for its parameters."""
    return module.to(device).eval().requires_grad_(False)
