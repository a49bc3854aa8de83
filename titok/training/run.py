"""What both training loops share: the state of a run, its checkpoint file, and the steps with their progress bar.

The random numbers of a step come from a generator seeded with (seed, step), and the order of the data from one
seeded with (seed, epoch). A checkpoint therefore needs no state of a generator, and a run that was killed and
resumed gives the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import weakref
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
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.profiling import annotate, each
from titok.training.config import TrainingConfig
from titok.training.optim import learning_rate, make_optimizer

M = TypeVar("M", TiTok, MaskGIT)
Batch = TypeVar("Batch")

CHECKPOINT = "training.safetensors"
# Settings that may differ between a run and its resumption, because the trained weights do not depend on them.
KEYS_THAT_MAY_CHANGE = ("checkpoint_every", "log_every")
# Entries of `Run.data` that are hashes, and what an error says where they differ.
WORDS_FOR_HASHES = {
    "pictures": "the pictures are not those that the run was started with (other files, contents or names)",
    "tokens": "the tokens are not those that the run was started with (other pictures, or another tokenizer)",
    "labels": "the labels are not those that the run was started with",
}


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


class Run(Generic[M]):
    """The state of a training run: model, optimizer, number of steps and history. It is saved in `folder`.

    Args:
        model: in the state in which training starts.
        config: settings of the run.
        folder: made where it is missing; holds the checkpoint and the model.
        resume: True continues the run in `folder`, if there is one.
        data: what identifies the data, such as {"images": 1000}, to refuse a resumption with other data. The keys of
            `WORDS_FOR_HASHES` stand for hashes.

    Attributes:
        step: number of optimizer steps that are done.
        history: one dict for every `log_every` steps, with "step" and the figures of the loop.
        extra: further tensors that the loop keeps in its checkpoints, by name.

    The folder is locked until `close` is called, or the process ends.

    Raises:
        FileExistsError: `folder` holds a run and `resume` is False.
        ValueError: another process trains in `folder`; or the run in `folder` has another configuration, model or
            data, or its file is damaged.
    """

    def __init__(
        self,
        model: M,
        config: TrainingConfig,
        folder: str | os.PathLike[str],
        *,
        resume: bool,
        data: dict[str, Any],
    ) -> None:
        self.model: M = model
        self.config, self.folder, self.data = config, Path(folder), data
        self.optimizer = make_optimizer(model, config)
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.extra: dict[str, Tensor] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._release: Callable[[], object] = weakref.finalize(self, os.close, _locked(self.folder))
        try:
            if (self.folder / CHECKPOINT).exists():
                if not resume:
                    raise FileExistsError(
                        f"{self.folder}: a training run is here already: resume it, or remove {CHECKPOINT}"
                    )
                self.load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlocks the folder."""
        self._release()

    def save(self) -> None:
        """Writes the checkpoint, then the model with `save_pretrained`.

        If the process is killed meanwhile, each of the files is either the one from before or complete.
        """
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{self.names[parameter]}/{key}": value for key, value in state.items()}
        info = {"step": self.step, "config": self.config.to_dict(), "data": self.data, "history": self.history}
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
        device = next(iter(self.names)).device
        parameters = {name: parameter for parameter, name in self.names.items()}
        for key, value in groups["optimizer"].items():
            name, _, entry = key.rpartition("/")
            if name in parameters:
                self.optimizer.state[parameters[name]][entry] = value.to(device)
        self.extra = {name: value.to(device) for name, value in groups["extra"].items()}
        self.step, self.history = info["step"], info["history"]

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
            progress: True shows a progress bar on stderr.
            after_step: called after each optimizer step.

        Raises:
            FloatingPointError: the loss is no longer finite; the last checkpoint stays.
        """
        config = self.config
        device = next(iter(self.names)).device
        if self.step == config.steps:  # the run may have been stopped between the two files of its last save
            self.model.save_pretrained(self.folder)
        self.model.train()
        bar = tqdm(total=config.steps, initial=self.step, desc=name, unit="step", disable=not progress, leave=True)
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
            changed.append(f"{key} was {saved.get(key)!r}, is {given.get(key)!r}")
    if changed:
        raise ValueError(f"{path}: cannot be resumed with another {part}: {'; '.join(changed)}")


def _locked(folder: Path) -> int:
    """A handle of a folder that no other process holds; the system unlocks the folder when the handle is closed.

    Raises:
        ValueError: another run holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another training run is at work here") from None
    except OSError:
        pass  # a file system without locks
    return handle


def read_run_info(path: Path) -> dict[str, Any]:
    """The "step", "config", "data" and "history" of the run that wrote a checkpoint.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            info = json.loads(file.metadata()["training"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable training checkpoint") from error
    types = {"step": int, "config": dict, "data": dict, "history": list}
    if not isinstance(info, dict) or not all(isinstance(info.get(key), kind) for key, kind in types.items()):
        raise ValueError(f"{path}: not a readable training checkpoint: expected {', '.join(types)}")
    return info


def _formatted(figures: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4g}" for key, value in figures.items() if key != "step"}
