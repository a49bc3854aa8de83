"""Tensors of a checkpoint that are read when they are needed, so that a model and its file are never both in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from titok.checkpoints.files import check_weights_file, read_shard_names, read_weights, safetensors_errors


class LazyTensor(NamedTuple):
    """A tensor that is known by its shape and dtype.

    Attributes:
        described: a tensor on the meta device with the shape and dtype.
        load: reads or computes the tensor, on the CPU. It is called once.
        mapped: the memory of what `load` returns may be that of the file, which others can change. Whoever keeps the
            tensor copies it.
    """

    described: Tensor
    load: Callable[[], Tensor]
    mapped: bool

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.described.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor, as it is in the file."""
        return self.described.dtype

    @classmethod
    def computed(cls, function: Callable[..., Tensor], *given: LazyTensor) -> LazyTensor:
        """What a function returns of other tensors.

        Raises:
            RuntimeError, IndexError: the function refuses their shapes.
        """
        described = function(*(tensor.described for tensor in given))
        mapped = any(tensor.mapped for tensor in given)
        return cls(described, lambda: function(*(tensor.load() for tensor in given)), mapped)


def open_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by name. Each can be loaded once.

    Args:
        path: of a .safetensors file, of an index of shards (.index.json), or of a pickled state dict.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: as `read_weights`; here or when a tensor is loaded.
    """
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    state = read_weights(path)
    return {
        name: LazyTensor(_described(state[name]), functools.partial(state.pop, name), mapped=False)
        for name in list(state)
    }


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_shard_names(index)
    weights: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.with_name(name)
        if not shard.is_file():
            raise FileNotFoundError(f"{index}: the shard {name:.60} is missing")
        tensors = open_weights(shard)
        if tensors.keys() != {tensor for tensor, file in weight_map.items() if file == name}:
            raise ValueError(f"{shard}: its tensors are not those that {index.name} lists")
        weights |= tensors
    return weights


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    check_weights_file(path)

    def load(name: str) -> Tensor:
        # The file is opened for each tensor: all pages that were read of a mapped file count as memory of this process
        # for as long as something refers to the mapping.
        with safetensors_errors(path), safetensors.safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
            if tensor.shape != described[name].shape or tensor.dtype != described[name].dtype:
                raise ValueError(f"{path}: the file has changed while it was read")
            return tensor

    with safetensors_errors(path), safetensors.safe_open(path, "pt") as file:
        described = {name: _described(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return {name: LazyTensor(described[name], functools.partial(load, name), mapped=True) for name in described}


def _described(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
