"""Sharded training by PyTorch's FSDP2: each process keeps a part of every weight.

It keeps the same part of the gradient, of the average and of the optimizer's state. The weights of a transformer block,
or of a residual block of a convolutional network, are gathered while that block computes, all others while the
objective does. Everything that is written to files is whole, so that a run may go on with or without sharding.

A discriminator is not sharded: it has 2 million parameters and is trained as in any run of several processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from titok.checkpoints.pretrained import Pretrained
from titok.models.transformer import Block, Stack
from titok.models.vqgan import ResidualBlock
from titok.processes import is_distributed, own_part

M = TypeVar("M", bound=Pretrained)


def shard(objective: nn.Module) -> None:
    """Shards the parameters of an objective over all processes, which have equal ones.

    Afterwards the parameters are `DTensor`s. Outside of the objective's `forward` and `latents`, the model cannot
    compute: `whole_model` makes a copy that can.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(objective.parameters()).device.type, (own_part()[1],))
    for module in list(objective.modules()):
        if isinstance(module, Stack):
            module.whole_blocks = True
        if isinstance(module, (Block, ResidualBlock)):
            fully_shard(module, mesh=mesh)
        if isinstance(module, Block):
            register_fsdp_forward_method(module, "post_norm")
    # The root too gives its weights back after each call, so that they are never changed while they are gathered.
    fully_shard(objective, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(objective, "latents")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered by all processes; another tensor as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole_in_first_process(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The wholes of tensors, in the first process; none in the others. All processes call this.

    One tensor is gathered at a time, and sharded ones are moved to the CPU, so that no device holds more than one.
    """
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor.detach())
        if own_part()[0] == 0:
            found[name] = gathered.cpu() if _is_sharded(tensor) else gathered
    return found


def own_share(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process keeps, sharded as `like` is; `value` where `like` is not sharded."""
    if not _is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Without a source rank, every process cuts its own part from its own copy.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def own_shares(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`own_share` of each tensor, with the tensor of the same name in `like`, if there is one."""
    return {name: own_share(value, like[name]) if name in like else value for name, value in values.items()}


def whole_model(model: M, weights: Mapping[str, Tensor]) -> M:
    """A model with the configuration of `model` that holds the tensors `weights`, which are not copied."""
    with torch.device("meta"):
        made = type(model)(model.config)
    made.load_state_dict(weights, assign=True)
    for parameter, other in zip(made.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(other.requires_grad)
    return made.train(model.training)


def _is_sharded(tensor: Tensor) -> bool:
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
