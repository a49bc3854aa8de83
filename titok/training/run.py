"""What both training loops share: the state of a run, its checkpoint file, and the steps with their progress bar.

The random numbers of a step come from a generator seeded with (seed, step), and the order of the data from one
seeded with (seed, epoch). A checkpoint therefore needs no state of a generator, and a run that was killed and
resumed gives the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from titok.checkpoints.files import read_weights, write_safetensors
from titok.checkpoints.writing import lock, remove_abandoned
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.profiling import annotate, each
from titok.training.config import TrainingConfig
from titok.training.optim import learning_rate, make_optimizer

PathLike = str | os.PathLike[str]
M = TypeVar("M", TiTok, MaskGIT)
Batch = TypeVar("Batch")

CHECKPOINT = "training.safetensors"
# Settings, and an entry of `Run.data`, that may differ between a run and its resumption, because the trained weights do
# not depend on them.
KEYS_THAT_MAY_CHANGE = ("checkpoint_every", "log_every", "times")
# Entries of `Run.data` that are hashes, and what an error says where they differ.
WORDS_FOR_HASHES = {
    "pictures": "the pictures are not those that the run was started with (other files, contents or names)",
    "tokens": "the tokens are not those that the run was started with (other pictures, or another tokenizer)",
    "labels": "the labels are not those that the run was started with",
}


OTHER_TIMES = (
    "the pictures have other modification times than when the run was started, as copies have. Their names and sizes "
    "and the contents of those that were compared are the same, so the run goes on"
)


def seed_of(*numbers: int) -> int:
    """One seed in [0, 2^63), made of several numbers. Seeds of similar numbers are unrelated."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def shuffled_batches(count: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Yields the indices of the samples in each step from `first_step` on, (batch_size,) int64, without an end.

    Each epoch is a random permutation of all `count` samples. A batch may contain the end of one epoch and the
    start of the next.
    """

    @lru_cache(maxsize=2)  # a step rarely needs more than the epoch of the step before
    def order_of(epoch: int) -> Tensor:
        return torch.randperm(
            count, generator=torch.Generator("cpu").manual_seed(seed_of(seed, 1, epoch)), device="cpu"
        )

    for step in itertools.count(first_step):
        # In all epochs, one after the other.
        positions = torch.arange(step * batch_size, (step + 1) * batch_size, device="cpu")
        epochs = positions // count
        indices = [order_of(int(epoch))[positions[epochs == epoch] % count] for epoch in epochs.unique()]
        yield torch.cat(indices)


class RunFolder:
    """The folder of a run, locked until `close` is called or the process ends; a context manager.

    A folder that this object made is removed at the end, if it is empty then.

    Attributes:
        path: of the folder.

    Raises:
        FileExistsError: the folder holds a run and `resume` is False.
        ValueError: another run is at work in the folder.
    """

    def __init__(self, path: PathLike, *, resume: bool) -> None:
        self.path = Path(path)
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._lock: int | None = None
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock(self.path)
        except (BlockingIOError, FileNotFoundError):  # the other run may just remove its folder
            raise ValueError(f"{self.path}: another training run is at work here") from None
        remove_abandoned(self.path)
        if self.checkpoint.exists() and not resume:
            self.close()
            raise FileExistsError(
                f"{self.path}: a training run is here already: resume it, or choose another folder"
            )

    @property
    def checkpoint(self) -> Path:
        """The path of the run's checkpoint."""
        return self.path / CHECKPOINT

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock is None:
            return
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(folder: PathLike | RunFolder, *, resume: bool) -> contextlib.AbstractContextManager[RunFolder]:
    """The folder of a run as a context manager: `RunFolder(folder)`, or one that its owner closes, as it is."""
    if isinstance(folder, RunFolder):
        return contextlib.nullcontext(folder)
    return RunFolder(folder, resume=resume)


class Run(Generic[M]):
    """The state of a training run: model, optimizer, number of steps and history. It is saved in `folder`.

    Args:
        model: in the state in which training starts.
        config: settings of the run.
        folder: holds the checkpoint, from which the run continues if there is one, and the model.
        data: what identifies the data, such as {"images": 1000}, to refuse a resumption with other data. The keys of
            `WORDS_FOR_HASHES` stand for hashes.

    Attributes:
        step: number of optimizer steps that are done.
        history: one dict for every `log_every` steps, with "step" and the figures of the loop.
        extra: further tensors that the loop keeps in its checkpoints, by name.

    Raises:
        ValueError: the run in `folder` has another configuration, model or data, or its file is damaged.
    """

    def __init__(self, model: M, config: TrainingConfig, folder: RunFolder, *, data: dict[str, Any]) -> None:
        self.model: M = model
        self.config, self.folder, self.data = config, folder.path, data
        self.optimizer = make_optimizer(model, config)
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.extra: dict[str, Tensor] = {}
        if folder.checkpoint.exists():
            self.load()

    def save(self) -> None:
        """Writes the checkpoint, then the model with `save_pretrained`.

        If the process is killed meanwhile, each of the files is either the one from before or complete.
        """
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{self.names[parameter]}/{key}": value for key, value in state.items()}
        tensors = {name: value.detach().cpu() for name, value in tensors.items()}
        info = {
            "step": self.step,
            "config": self.config.to_dict(),
            "data": self.data,
            "history": self.history,
            "checksum": _checksum(tensors),
        }
        write_safetensors(self.folder / CHECKPOINT, tensors, metadata={"training": json.dumps(info)})
        self.model.save_pretrained(self.folder)

    def load(self) -> None:
        """Sets the state to that of the checkpoint in `folder`.

        Raises:
            ValueError: it is damaged, or it is of a run with another configuration or other data; lists what
                differs.
        """
        path = self.folder / CHECKPOINT
        tensors, info = read_weights(path), read_run_info(path)
        # Through JSON, because the checkpoint holds JSON, which has lists in place of tuples.
        given = json.loads(json.dumps({"config": self.config.to_dict(), "data": self.data}))
        for part in ("config", "data"):
            _check_unchanged(path, part, saved=info[part], given=given[part])
        if not 0 < info["step"] <= self.config.steps:
            raise ValueError(
                f"{path}: not a readable training checkpoint: step: expected an int in [1, {self.config.steps}], "
                f"got {info['step']}"
            )
        if info["checksum"] != _checksum(tensors):
            raise ValueError(
                f"{path}: not a readable training checkpoint: its tensors are not those that were written"
            )
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "extra": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, {})[rest] = value
        try:
            self.model.load_state_dict(groups["model"])
        except RuntimeError as error:
            raise ValueError(
                f"{path}: not a readable training checkpoint: its weights are of another model"
            ) from error
        self._load_optimizer(path, groups["optimizer"])
        device = next(iter(self.names)).device
        self.extra = {name: value.to(device) for name, value in groups["extra"].items()}
        self.step, self.history = info["step"], info["history"]
        if info["data"].get("times") != given["data"].get("times"):
            warnings.warn(f"{path}: {OTHER_TIMES}", stacklevel=2)

    def _load_optimizer(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Sets the state of AdamW: of each parameter, the number of its steps and two averages, or none of them."""
        for parameter, name in self.names.items():
            shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            state = {key: tensors.pop(f"{name}/{key}") for key in shapes if f"{name}/{key}" in tensors}
            for key, value in state.items():
                if len(state) != len(shapes) or value.shape != shapes[key] or value.dtype != torch.float32:
                    raise ValueError(
                        f"{path}: not a readable training checkpoint: the optimizer's state of {name} is of another "
                        "kind"
                    )
                self.optimizer.state[parameter][key] = value.to(parameter.device)
        if tensors:
            raise ValueError(f"{path}: not a readable training checkpoint: its optimizer is of another model")

    def train(
        self,
        batches: Iterable[Batch],
        compute: Callable[[Batch], dict[str, Tensor]],
        *,
        name: str,
        progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> M:
        """Runs the steps that remain. Returns the model, in eval mode; it is saved, too.

        The random numbers of the steps come from PyTorch's global generators, whose state is restored at the end.

        Args:
            batches: one batch for each step from `self.step` on.
            compute: returns the figures of a batch, tensors of shape (). "loss" is minimised; the others are only
                shown.
            name: in front of the progress bar.
            progress: True shows a progress bar on stderr, if that is a terminal.
            after_step: called after each optimizer step.

        Raises:
            FloatingPointError: the loss is no longer finite; the last checkpoint stays.
        """
        config = self.config
        device = next(iter(self.names)).device
        if self.step == config.steps:  # the run may have been stopped between the two files of its last save
            self.model.save_pretrained(self.folder)
        self.model.train()
        hide = None if progress else True  # None hides it where stderr is no terminal
        bar = tqdm(total=config.steps, initial=self.step, desc=name, unit="step", disable=hide, leave=True)
        if self.history:
            bar.set_postfix(_formatted(self.history[-1]), refresh=False)
        with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in each("train step", itertools.islice(batches, config.steps - self.step)):
                figures = self._optimize(batch, compute)
                if after_step is not None:
                    after_step()
                self.step += 1
                last = self.step == config.steps
                saves = last or self.step % config.checkpoint_every == 0
                if saves or self.step % config.log_every == 0:
                    self._log({key: float(value.detach()) for key, value in figures.items()}, bar)
                bar.update()
                if saves:
                    self.save()
        self.model.eval()
        return self.model

    def _optimize(self, batch: Batch, compute: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step; returns the figures of its batch."""
        config = self.config
        parameters = list(self.names)
        torch.manual_seed(seed_of(config.seed, 0, self.step))
        mixed = config.precision == "bfloat16"
        with annotate("forward"), torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=mixed):
            figures = compute(batch)
        self.optimizer.zero_grad()
        with annotate("backward"):
            figures["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        rate = learning_rate(
            self.step,
            base=config.learning_rate,
            final=config.final_learning_rate,
            warmup=config.warmup_steps,
            total=config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with annotate("optimizer"):
            self.optimizer.step()
        return figures

    def _log(self, figures: dict[str, float], bar: tqdm[Any]) -> None:
        """Checks the loss, adds to the history where it is time, and shows the figures beside the progress bar."""
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"loss is {figures['loss']} at step {self.step}: try a learning_rate below "
                f"{self.config.learning_rate:g}"
            )
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self.history.append({"step": self.step, **figures})
        bar.set_postfix(_formatted(figures), refresh=False)


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


def read_run_info(path: Path) -> dict[str, Any]:
    """The "step", "config", "data", "history" and "checksum" of the run that wrote a checkpoint.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            info = json.loads(file.metadata()["training"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable training checkpoint") from error
    types = {"step": int, "config": dict, "data": dict, "history": list, "checksum": int}
    if not isinstance(info, dict) or not all(type(info.get(key)) is kind for key, kind in types.items()):
        raise ValueError(f"{path}: not a readable training checkpoint: expected {', '.join(types)}")
    for entry in info["history"]:
        if not isinstance(entry, dict) or not all(type(figure) in (int, float) for figure in entry.values()):
            raise ValueError(f"{path}: not a readable training checkpoint: history: expected figures by name")
    return info


def _formatted(figures: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4g}" for key, value in figures.items() if key != "step"}
