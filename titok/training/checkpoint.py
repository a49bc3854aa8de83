"""The checkpoint file of a training run: safetensors, with the run's settings as JSON in its header.

Tensors are named `<part>/<name>`: "model", "averages", "discriminator", the optimizers' states and "extra".
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from titok.checkpoints.files import read_weights, write_safetensors
from titok.checkpoints.writing import atomic_path
from titok.config import Config
from titok.training.folder import CHECKPOINT
from titok.training.sharding import own_share, own_shares

# Settings, and an entry of a run's data, that may differ between a run and its resumption, because the trained weights
# do not depend on them; on "shard" they depend by rounding alone.
KEYS_THAT_MAY_CHANGE = (
    "checkpoint_every", "keep_every", "keep_last", "log_every", "picture_every", "shard", "times",
)  # fmt: skip
# Entries of a run's data that are hashes, and what an error says where they differ.
WORDS_FOR_HASHES = {
    "pictures": "the pictures are not those that the run was started with (other files, contents or names)",
    "tokens": "the tokens are not those that the run was started with (other pictures, or another tokenizer)",
    "labels": "the labels are not those that the run was started with",
    "initial": "the weights that the run starts from are not those that it was started with",
    "proxy": "the MaskGIT-VQGAN is not the one that the run was started with",
}
OTHER_TIMES = (
    "the pictures have other modification times than when the run was started, as copies have. Their names and sizes "
    "and the contents of those that were compared are the same, so the run goes on"
)


def damaged(path: Path, problem: str = "") -> ValueError:
    """The error of a checkpoint that cannot be read, or is not one of this run."""
    return ValueError(f"{path}: not a readable training checkpoint{': ' if problem else ''}{problem}")


def write_checkpoint(
    folder: Path, step: int, config: Config, data: dict[str, Any], parts: dict[str, dict[str, Tensor]]
) -> None:
    """Writes the checkpoint of a run into its folder."""
    tensors = {f"{part}/{name}": t.detach().cpu() for part, named in parts.items() for name, t in named.items()}
    info = {"step": step, "config": config.to_dict(), "data": data, "checksum": _checksum(tensors)}
    write_safetensors(folder / CHECKPOINT, tensors, metadata={"training": json.dumps(info)})


def read_checkpoint(path: Path, config: Any, data: dict[str, Any]) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """The number of steps that are done, and the tensors of each part.

    Warns:
        UserWarning: the pictures were written since, and only some of their contents were compared.

    Raises:
        ValueError: it is damaged, or it is of a run with another configuration or other data; lists what differs.
    """
    tensors, info = read_weights(path), read_run_info(path)
    # Through JSON, because the checkpoint holds JSON, which has lists in place of tuples.
    given = json.loads(json.dumps({"config": config.to_dict(), "data": data}))
    for part in ("config", "data"):
        _check_unchanged(path, part, saved=info[part], given=given[part])
    if not 0 < info["step"] <= config.steps:
        raise damaged(path, f"step: expected an int in [1, {config.steps}], got {info['step']}")
    if info["checksum"] != _checksum(tensors):
        raise damaged(path, "its tensors are not those that were written")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    if info["data"].get("times") != given["data"].get("times"):
        warnings.warn(f"{path}: {OTHER_TIMES}", stacklevel=2)
    return info["step"], parts


def keep_checkpoint(folder: Path, step: int, *, last: int, every: int) -> None:
    """Keeps the checkpoint that was just written as `training-<step>.safetensors`, and removes those that are past.

    Args:
        last: how many checkpoints to keep, the one that a resumption reads included.
        every: also those whose step is a multiple of this; 0 keeps none for that.
    """
    if last > 1 or (every and step % every == 0):
        kept = folder / f"training-{step:08}.safetensors"
        if not kept.exists():
            with atomic_path(kept) as temporary:
                temporary.unlink()
                try:
                    os.link(folder / CHECKPOINT, temporary)
                except OSError:  # a file system without links
                    shutil.copyfile(folder / CHECKPOINT, temporary)
    steps = sorted(int(path.stem.split("-")[1]) for path in kept_checkpoints(folder))
    recent = set(steps[-last:]) if last > 1 else set()
    for other in steps:
        if other not in recent and not (every and other % every == 0):
            (folder / f"training-{other:08}.safetensors").unlink()


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that `keep_checkpoint` keeps, sorted by step."""
    return sorted(folder.glob("training-" + "[0-9]" * 8 + ".safetensors"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The state of AdamW by the names of the parameters."""
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_module(path: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Sets the parameters and buffers of a module to those of a checkpoint."""
    try:
        module.load_state_dict(own_shares(tensors, module.state_dict()))
    except RuntimeError as error:
        raise damaged(path, "its weights are of another model") from error


def load_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Sets the state of AdamW: of each parameter, the number of its steps and two averages, or none of them."""
    tensors = dict(tensors)
    for parameter, name in names.items():
        shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        state = {key: tensors.pop(f"{name}/{key}") for key in shapes if f"{name}/{key}" in tensors}
        for key, value in state.items():
            if len(state) != len(shapes) or value.shape != shapes[key] or value.dtype != torch.float32:
                raise damaged(path, f"the optimizer's state of {name} is of another kind")
            value = value.to(parameter.device)
            if key != "step":  # in the memory format of the parameter, as the fused AdamW expects it
                value = torch.empty_like(parameter).copy_(own_share(value, parameter))
            optimizer.state[parameter][key] = value
    if tensors:
        raise damaged(path, "its optimizer is of another model")


def read_run_info(path: Path) -> dict[str, Any]:
    """The "step", "config", "data" and "checksum" of the run that wrote a checkpoint.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            info = json.loads(file.metadata()["training"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path) from error
    types = {"step": int, "config": dict, "data": dict, "checksum": int}
    if not isinstance(info, dict) or not all(type(info.get(key)) is kind for key, kind in types.items()):
        raise damaged(path, f"expected {', '.join(types)}")
    return info


def _check_unchanged(path: Path, part: str, *, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises `ValueError` that lists the keys in which the settings of a checkpoint and those of a run differ."""
    keys = sorted({*saved, *given} - set(KEYS_THAT_MAY_CHANGE))
    changed = []
    for key in keys:
        if key in WORDS_FOR_HASHES:
            if key in saved and key in given and saved[key] != given[key]:
                changed.append(WORDS_FOR_HASHES[key])
        elif saved.get(key) != given.get(key):
            changed.append(f"{_shortened(key)} was {_shortened(saved.get(key))}, is {_shortened(given.get(key))}")
    if changed:
        raise ValueError(f"{path}: cannot be resumed with another {part}: {'; '.join(changed[:10])}")


def _checksum(tensors: dict[str, Tensor]) -> int:
    """A checksum of the names, shapes, dtypes and values of tensors on the CPU, about as fast as a disk writes them."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum


def _shortened(value: Any) -> str:
    """A value from a checkpoint as text on one line, of about 300 characters at most."""
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:300]}..." if len(text) > 300 else text.encode("unicode_escape").decode()
