"""What an optimizer minimises: a module that computes the loss of a micro-batch.

A module, because PyTorch averages gradients over processes only for what one call of a wrapped module computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from titok.checkpoints.pretrained import Pretrained
from titok.models.transformer import Stack
from titok.models.vqgan import VQGANDecoder, VQGANEncoder
from titok.processes import in_first_process
from titok.training import fingerprint
from titok.training.code_restarts import CodeRestarts
from titok.training.order import seed_of

M = TypeVar("M", bound=Pretrained)


class RestartSettings(Protocol):
    """The settings of a recipe whose codes are restarted."""

    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def restart_every(self) -> int: ...
    @property
    def restart_until(self) -> float: ...


class Losses(NamedTuple):
    """The result of an objective for one micro-batch.

    Attributes:
        loss: (), which is minimised.
        figures: further tensors of shape (), without gradients, that the run shows. They are averaged over the
            micro-batches.
        compared: the images and their reconstructions, without gradients, in a step in which a discriminator learns
            to tell them apart; otherwise empty, so that they are not kept.
    """

    loss: Tensor
    figures: dict[str, Tensor]
    compared: tuple[Tensor, ...] = ()


class Objective(nn.Module, Generic[M]):
    """The loss of a model, as a function of a micro-batch and the number of steps that are done.

    A subclass overrides `forward` and, where it needs them, `latents` and `picture`. Only the model is registered as a
    module: networks that the loss reads but does not train are kept from the optimizer and from checkpoints.

    Attributes:
        model: that is trained.
        restarts: of the codes of the model that no latent uses; None where it has no codes.
        state: further tensors that checkpoints hold, by name. They are the same in every process when a checkpoint is
            written.
    """

    def __init__(self, model: M) -> None:
        super().__init__()
        self.model: M = model
        self.restarts: CodeRestarts | None = None
        self.state: dict[str, Tensor] = {}

    def restart_codes(self, owner: nn.Module, config: RestartSettings, *, l2_normalize: bool) -> None:
        """Replaces codes of `owner.codebook` that no latent uses, as the configuration says."""
        self.restarts = CodeRestarts(
            owner,
            l2_normalize=l2_normalize,
            every=config.restart_every,
            until=config.restart_until * config.steps,
            seed=config.seed,
        )
        self.state["used"] = self.restarts.used

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The loss of a micro-batch, which may lie on another device than the model."""
        raise NotImplementedError

    def latents(self, batch: Tensor) -> Tensor:
        """The latents (..., C) of a micro-batch, of which codes are made; for a model whose codes are restarted."""
        raise NotImplementedError

    def start(self, batch: Tensor) -> None:
        """Called before the first step of a run, with the first micro-batch of the process: codes become latents."""
        if self.restarts is not None:
            with torch.no_grad():
                self.restarts.start(self.latents(batch))

    def after_step(self, steps_done: int) -> None:
        """Called after each step, in every process: replaces codes that no latent uses, where it is time."""
        if self.restarts is not None:
            self.restarts.after_step(steps_done)

    def before_saving(self) -> None:
        """Called before each checkpoint, in every process: makes `state` the same everywhere."""
        if self.restarts is not None:
            self.restarts.merge()

    def shared_figures(self) -> dict[str, Tensor]:
        """Figures of shape () of what all processes did, called in every process before figures are written."""
        return {} if self.restarts is None else self.restarts.figures()

    def evaluate(self) -> dict[str, float]:
        """Figures on pictures that are held out, called in every process and the same in all of them."""
        return {}

    def picture(self) -> Tensor | None:
        """A picture of what the model does now, (C, H, W) in [0, 1], or None."""
        return None


@contextlib.contextmanager
def switched_trunks(model: nn.Module, *, compiled: bool, checkpointed: bool) -> Iterator[None]:
    """A context in which the transformers and convolutional networks of a model are compiled, or save memory.

    Args:
        compiled: compile them with torch.compile.
        checkpointed: let transformers compute the activations of each block again in the backward pass.
    """
    trunks = [m for m in model.modules() if isinstance(m, (Stack, VQGANEncoder, VQGANDecoder))]
    for trunk in trunks:
        if compiled:
            trunk.compile()
        if checkpointed and isinstance(trunk, Stack):
            trunk.checkpoint_activations = True
    try:
        yield
    finally:
        for trunk in trunks:
            if compiled:
                trunk._compiled_call_impl = None  # what `compile` sets; PyTorch has no public way back
            if checkpointed and isinstance(trunk, Stack):
                del trunk.checkpoint_activations


def data_of(images: Any) -> dict[str, Any]:
    """What identifies a set of images: their number and hashes, which the first process computes.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    return {"images": len(images), **in_first_process(lambda: fingerprint.of_images(images))}


@contextlib.contextmanager
def drawing_weights(seed: int) -> Iterator[None]:
    """A context in which the initial weights of models are drawn: from the seed of the run, on the CPU."""
    with torch.random.fork_rng([]), torch.device("cpu"):  # whatever default device the host has set
        torch.manual_seed(seed_of(seed))
        yield


def load_initial(model: nn.Module, initial: nn.Module | None, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Copies the weights of `initial`, if any, into `model`. Returns their hash, as an entry of a run's data.

    Args:
        without: beginnings of the names of weights that are left out.

    Raises:
        ValueError: the models have different parameters.
    """
    if initial is None:
        return {}
    weights = {name: value for name, value in initial.state_dict().items() if not name.startswith(without)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        message = "expected a model with the configuration that is trained, got one with other parameters"
        raise ValueError(f"initial: {message}") from error
    return {"initial": fingerprint.of_weights(weights)}
