"""The base class of the models: `from_pretrained` and `save_pretrained`, in our layout and in the official one.

A checkpoint is a folder with `config.json` and the weights. Our config.json is
`{"format": "titok", "model": CLASS NAME, "config": {...}}`; the official layout is described in
`titok/checkpoints/official.py`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from titok.checkpoints.files import (
    HubOptions,
    locate_checkpoint,
    read_config_file,
    write_json,
    write_safetensors,
)
from titok.checkpoints.lazy import LazyTensor, open_weights
from titok.inference.int8 import check_int8
from titok.inference.prepared import PreparableLayer, PreparableModel
from titok.inference.prepared_weights import own_memory, readable

M = TypeVar("M", bound="Pretrained")

logger = logging.getLogger(__name__)

FORMAT = "titok"
MAX_PARAMETERS = 100_000_000_000  # of a model that is loaded; the largest published one has 0.6e9
LISTED_NAMES = 20  # of one kind, in an error


class Pretrained(PreparableModel):
    """A model that is built from `config` alone, and that a checkpoint can be loaded into and saved from.

    `prepare()` prepares it for inference: see `titok.inference.prepared`.
    """

    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in."""
        raise NotImplementedError

    @property
    def precision(self) -> str:
        """The name of `dtype`, or "int8" where layers were quantised to 8 bits."""
        return "int8" if self.quantized else str(self.dtype).removeprefix("torch.")

    @staticmethod
    def convert_official(weights: Mapping[str, LazyTensor], config: Any = None) -> dict[str, LazyTensor]:
        """The tensors of an official checkpoint under the parameter names of a model with this configuration."""
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
        preset: str | None = None,
        config: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        prepare: bool = False,
        int8: bool = False,
    ) -> M:
        """Loads a model, in eval mode, from a folder, from one weights file, or from a Hugging Face repository.

        Args:
            path_or_repo: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or the
                `.index.json` of either and its shards; one such file, with `config.json` or the official
                `config.yaml` beside it; else the id of a repository, which is downloaded.
            dtype: of the networks. The codebook of a vector quantizer stays in float32 at least.
            device: of the networks.
            preset: name of the configuration of weights that have no configuration file, such as "titok-l-32" for
                the official `tokenizer_titok_l32.bin`.
            config: path of a configuration file that is not beside the weights: ours, or the official JSON or YAML.
            revision, token, cache_dir, local_files_only: of the repository, as `huggingface_hub.hf_hub_download`
                takes them.
            subfolder: of the repository or folder, in which the files of the model are.
            prepare: prepare the model for inference (`prepare()`), layer by layer while it is loaded, so that the
                weights are never in memory twice.
            int8: prepare the model with the linear layers of its transformers in 8 bits (`prepare(int8=True)`).

        Warns:
            UserWarning: weights are not finite.

        Raises:
            FileNotFoundError: there is no such folder, file or repository, or it holds no weights.
            ValueError: the file is damaged or carries code, or the configuration and the weights contradict each
                other; lists missing, unexpected and misshapen names. Or there is no such preset, or both `preset`
                and `config` are given; or `dtype` is not floating; or `int8` on a CPU without AVX-512 VNNI or on a GPU.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        if int8:
            check_int8(device)
        if preset is not None and config is not None:
            raise ValueError(f"preset: expected None beside config={os.fspath(config)!r}, got {preset!r}")
        hub = HubOptions(revision, token, cache_dir, local_files_only, subfolder)
        needs_config = preset is None and config is None
        weights_file, config_file = locate_checkpoint(path_or_repo, hub, needs_config=needs_config)
        if preset is not None:
            model_config, config_file = cls.preset_config(preset), None
            weights = open_weights(weights_file)
            official = _has_other_names(cls._empty(model_config), weights)
        else:
            config_file = config_file if config is None else Path(config)
            model_config, official = cls._read_config_file(weights_file, config_file)
            weights = open_weights(weights_file)
        if official:
            try:
                weights = cls.convert_official(weights, model_config)
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{weights_file}: tensors have other shapes than in the official layout"
                ) from error
        model = cls._empty(model_config)
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
            if not _is_finite(tensor):
                broken.append(name)
            path, _, leaf = name.rpartition(".")
            layer = model.get_submodule(path)
            setattr(layer, leaf, nn.Parameter(tensor))
            del tensor  # so that the parameter is the only owner of its memory
            if int8 and isinstance(layer, PreparableLayer):
                layer.quantize_weights()
            if (prepare or int8) and isinstance(layer, PreparableLayer) and layer.prepared_alone:
                layer.prepare_weights()
            if stored.mapped:
                own_memory(getattr(layer, leaf))
        if broken:
            warnings.warn(f"{weights_file}: values that are not finite in {', '.join(broken[:5])}", stacklevel=2)
        logger.debug("%s: read a %s of %d parameters", weights_file, cls.__name__, count)
        return model.prepare(int8=int8) if prepare or int8 else model

    @classmethod
    def preset_config(cls, name: str) -> Any:
        """The configuration that `preset` names. Raises `ValueError` where there is none of that name."""
        raise ValueError(f"preset: expected None, because {cls.__name__} has no presets, got {name!r}")

    @classmethod
    def _empty(cls: type[M], config: Any) -> M:
        """A model whose parameters have shapes and no memory."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def class_of_file(cls) -> type[Pretrained]:
        """The class that config.json names: of a subclass, the model of titok that it derives from."""
        return next(c for c in cls.__mro__ if Pretrained in c.__bases__)

    @classmethod
    def _read_config_file(cls, weights_file: Path, config_file: Path | None) -> tuple[Any, bool]:
        """As `read_config`, from a file; the errors name the file."""
        values = read_config_file(config_file) if config_file else {}
        if values.get("format") == FORMAT:
            expected = cls.class_of_file().__name__
            if values.get("model") != expected:
                raise ValueError(f"{config_file}: expected a {expected}, got a {values.get('model')!r:.60}")
            described = values.get("config")
            if not isinstance(described, dict):
                raise ValueError(f"{config_file}: config: expected a JSON object, got {type(described).__name__}")
            values = described
        try:
            return cls.read_config(values)
        except (TypeError, ValueError) as error:
            if config_file is None:
                message = (
                    f"{weights_file}: no config.json beside it to tell what model this is (`preset` may name it)"
                )
                raise ValueError(message) from error
            raise ValueError(f"{config_file}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `directory`, which is made where it is missing."""
        directory = Path(directory)
        config = {"format": FORMAT, "model": self.class_of_file().__name__, "config": self.config.to_dict()}
        weights = {name: readable(parameter).detach() for name, parameter in self.named_parameters()}
        write_safetensors(directory / "model.safetensors", weights, {"format": "pt"})
        write_json(directory / "config.json", config)

    def push_to_hub(
        self, repo: str, *, private: bool = False, token: str | None = None, subfolder: str | None = None
    ) -> str:
        """Uploads the model and a model card to a repository of the Hugging Face hub, which is made where missing.

        Args:
            repo: the id, owner/name.
            private: whether a repository that is made can be seen by its owner alone.
            token: of the hub; None takes the one that the machine is logged in with.
            subfolder: of the repository, for the files of this model.

        Returns:
            the address of the commit.
        """
        from titok.checkpoints.hub import upload

        return upload({subfolder or "": self}, repo, private=private, token=token)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, by the smallest and the largest: that needs no memory."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _has_other_names(model: nn.Module, weights: Mapping[str, LazyTensor]) -> bool:
    """Whether weights have other names than the model's own, so that they are in the official layout."""
    return model.state_dict().keys() != weights.keys()


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
