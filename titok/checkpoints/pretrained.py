"""The base class of the models: `from_pretrained` and `save_pretrained`, in our layout and in the official one.

A checkpoint is a folder with `config.json` and the weights. Our config.json is
`{"format": "titok", "model": CLASS NAME, "config": {...}}`; the official layout is described in
`titok/checkpoints/official.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from titok.checkpoints.files import locate_checkpoint, read_json, write_json, write_safetensors
from titok.checkpoints.lazy import LazyTensor, open_weights
from titok.inference.prepared import PreparableLayer, PreparableModel, own_memory, readable

M = TypeVar("M", bound="Pretrained")

FORMAT = "titok"
MAX_PARAMETERS = 100_000_000_000  # of a model that is loaded; the largest published one has 0.6e9
LISTED_NAMES = 20  # of one kind, in an error


class Pretrained(PreparableModel):
    """A model that is built from `config` alone, and that a checkpoint can be loaded into and saved from.

    `prepare()` prepares it for inference: see `titok.inference.prepared`.
    """

    config: Any

    @staticmethod
    def convert_official(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
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
        prepare: bool = False,
    ) -> M:
        """Loads a model, in eval mode, from a folder, from one weights file, or from a Hugging Face repository.

        Args:
            path_or_repo: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or the
                `.index.json` of either and its shards; one such file, with `config.json` beside it; else the id of a
                repository, which is downloaded.
            dtype: of the networks. The codebook of a vector quantizer stays in float32 at least.
            device: of the networks.
            revision: of the repository; None takes the latest.
            prepare: prepare the model for inference (`prepare()`), layer by layer while it is loaded, so that the
                weights are never in memory twice.

        Warns:
            UserWarning: weights are not finite.

        Raises:
            FileNotFoundError: there is no such folder, file or repository, or it holds no weights.
            ValueError: the file is damaged or carries code, or the configuration and the weights contradict each
                other; lists missing, unexpected and misshapen names.
        """
        weights_file, config_file = locate_checkpoint(path_or_repo, revision)
        values = read_json(config_file) if config_file else {}
        if values.get("format") == FORMAT:
            if values.get("model") != cls.__name__:
                raise ValueError(f"{config_file}: expected a {cls.__name__}, got a {values.get('model')!r:.60}")
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
        weights = open_weights(weights_file)
        if official:
            try:
                weights = cls.convert_official(weights)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{weights_file}: tensors have other shapes than in the official layout"
                ) from error
        with torch.device("meta"):
            model = cls(config)
        expected = {name: t.shape for name, t in model.state_dict().items()}
        if (count := sum(shape.numel() for shape in expected.values())) > MAX_PARAMETERS:
            message = f"expected a model of at most {MAX_PARAMETERS} parameters, got {count}"
            raise ValueError(f"{config_file or weights_file}: {message}")
        _check_names(weights_file, expected, weights)
        model.eval()
        broken = []
        for name in list(weights):
            codebook = name == "quantizer.codebook" and dtype != torch.float64
            stored = weights.pop(name)
            tensor = stored.load().to(device=device, dtype=torch.float32 if codebook else dtype)
            if not tensor.isfinite().all():
                broken.append(name)
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            setattr(layer, leaf, nn.Parameter(tensor))
            del tensor  # so that the parameter is the only owner of its memory
            if prepare and isinstance(layer, PreparableLayer) and layer.prepared_alone:
                layer.prepare_weights()
            if stored.mapped:
                own_memory(getattr(layer, leaf))
        if broken:
            warnings.warn(f"{weights_file}: values that are not finite in {', '.join(broken[:5])}", stacklevel=2)
        return model.prepare() if prepare else model

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory`, which is made where it is missing."""
        directory = Path(directory)
        config = {"format": FORMAT, "model": type(self).__name__, "config": self.config.to_dict()}
        weights = {name: readable(parameter).detach() for name, parameter in self.named_parameters()}
        write_safetensors(directory / "model.safetensors", weights)
        write_json(directory / "config.json", config)


def _check_names(path: Path, expected: Mapping[str, torch.Size], weights: Mapping[str, LazyTensor]) -> None:
    """Raises `ValueError` that lists the names in which `weights` differ from the names and shapes `expected`."""
    missing = sorted(expected.keys() - weights.keys())
    unexpected = sorted(weights.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in weights and weights[name].shape != shape
    ]
    other_dtype = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in sorted(weights.items())
        if name in expected and not tensor.dtype.is_floating_point
    ]
    problems = {
        "missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not floating": other_dtype,
    }  # fmt: skip
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path}: the weights contradict the configuration; {'; '.join(found)}")


def _listed(names: list[str]) -> str:
    """At most `LISTED_NAMES` names, on one line."""
    shown = [name[:200].encode("unicode_escape").decode() for name in names[:LISTED_NAMES]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
