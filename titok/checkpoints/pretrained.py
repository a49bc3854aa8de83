"""The base class of the models: `from_pretrained` and `save_pretrained`, in our layout and in the official one.

A checkpoint is a folder with `config.json` and the weights. Our config.json is
`{"format": "titok", "model": CLASS NAME, "config": {...}}`; the official layout is described in
`titok/checkpoints/official.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titok.checkpoints.files import (
    locate_checkpoint,
    read_json,
    read_weights,
    write_json,
    write_safetensors,
)

M = TypeVar("M", bound="Pretrained")

FORMAT = "titok"


class Pretrained(nn.Module):
    """A module that is built from `config` alone, and that a checkpoint can be loaded into and saved from."""

    config: Any

    @staticmethod
    def convert_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an official checkpoint under this model's parameter names."""
        raise NotImplementedError

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[Any, bool]:
        """The model's configuration, and whether the weights beside it are in the official layout.

        Args:
            values: the "config" of our config.json, or a whole official config.json; empty where there is no file.

        Raises:
            TypeError, ValueError: `values` describe no such model.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[M],
        path_or_repo: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> M:
        """Loads a model, in eval mode, from a folder, from one weights file, or from a Hugging Face repository.

        Args:
            path_or_repo: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`; one such weights
                file, with `config.json` beside it; else the id of a repository, which is downloaded.
            dtype: of the networks. The codebook of a vector quantizer stays in float32 at least.
            device: of the networks.
            revision: of the repository; None takes the latest.

        Raises:
            FileNotFoundError: there is no such folder, file or repository, or it holds no weights.
            ValueError: the file is damaged or carries code, or the configuration and the weights contradict each
                other; lists missing, unexpected and misshapen names.
        """
        weights_file, config_file = locate_checkpoint(path_or_repo, revision)
        values = read_json(config_file) if config_file else {}
        if values.get("format") == FORMAT:
            if values.get("model") != cls.__name__:
                raise ValueError(f"{config_file}: expected a {cls.__name__}, got a {values.get('model')!r}")
            described = values.get("config")
            if not isinstance(described, dict):
                raise ValueError(f"{config_file}: config: expected a JSON object, got {type(described).__name__}")
            values = described
        try:
            config, official = cls.read_config(values)
        except (TypeError, ValueError) as error:
            if config_file is None:
                message = f"{weights_file}: no config.json beside it to tell what model this is"
                raise ValueError(message) from error
            raise ValueError(f"{config_file}: {error}") from error
        weights = read_weights(weights_file)
        if official:
            weights = cls.convert_official(weights)
        with torch.device("meta"):
            model = cls(config)
        _check_names(weights_file, {name: t.shape for name, t in model.state_dict().items()}, weights)
        codebook_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        converted = {
            name: tensor.to(device=device, dtype=codebook_dtype if name == "quantizer.codebook" else dtype)
            for name, tensor in weights.items()
        }
        model.load_state_dict(converted, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory`, which is made where it is missing."""
        directory = Path(directory)
        config = {"format": FORMAT, "model": type(self).__name__, "config": self.config.to_dict()}
        write_safetensors(directory / "model.safetensors", self.state_dict())
        write_json(directory / "config.json", config)


def _check_names(path: Path, expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> None:
    """Raises `ValueError` that lists every name in which `weights` differ from the names and shapes `expected`."""
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in weights and weights[name].shape != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path}: the weights contradict the configuration; {'; '.join(found)}")
