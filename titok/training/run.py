"""What the two loops share: the state of a run, its checkpoint file, and the steps with their progress bar.

The randomness of a step is drawn from a generator seeded by (seed, step), and the order of the data by (seed, epoch).
So a checkpoint needs no generator states, and a run that was killed and resumed equals, bit for bit, one that was not.
"""

from __future__ import annotations

import itertools
import json
import math
import os
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
# May differ between a run and its resumption: they change no result.
_FREE = ("checkpoint_every", "log_every")


def seed_of(*numbers: int) -> int:
    """One seed in [0, 2^63) out of several numbers; neighbours give unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def shuffled_batches(count: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[Tensor]:
    """Indices into `count` samples, (batch_size,) int64 for each step from `first_step` on, without an end. Every
    epoch is a permutation of all samples; a batch may straddle two."""

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 1, epoch)))

    for step in itertools.count(first_step):
        places = torch.arange(step * batch_size, (step + 1) * batch_size)
        epochs = places // count
        yield torch.cat([order(int(e))[places[epochs == e] % count] for e in epochs.unique()])


class Run(Generic[M]):
    """A model in training, its optimizer, how far it is and what was seen on the way; one file in `folder`.

    Attributes:
        step: optimizer steps done.
        history: one dict for every `log_every` steps: "step" and the loop's figures.
        extra: further tensors that the loop wants in its checkpoints, by name.

    Raises:
        FileExistsError: `folder` holds a run and `resume` is False.
        ValueError: the run there has another configuration, model or data, or its file is damaged.
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
        if (self.folder / CHECKPOINT).exists():
            if not resume:
                raise FileExistsError(
                    f"{self.folder}: a training run is here already: resume it, or remove {CHECKPOINT}"
                )
            self.load()

    def save(self) -> None:
        """Writes the checkpoint, then the model as `save_pretrained` does. A kill at any moment leaves each file
        either as it was or whole."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"extra/{name}": value for name, value in self.extra.items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{self.names[parameter]}/{key}": value for key, value in state.items()}
        about = {"step": self.step, "config": self.config.to_dict(), "data": self.data, "history": self.history}
        write_safetensors(self.folder / CHECKPOINT, tensors, metadata={"training": json.dumps(about)})
        self.model.save_pretrained(self.folder)

    def load(self) -> None:
        """Continues where the checkpoint in `folder` left off."""
        path = self.folder / CHECKPOINT
        tensors, about = read_weights(path), read_about(path)
        ours = json.loads(json.dumps({"config": self.config.to_dict(), "data": self.data}))
        for part in ("config", "data"):
            then: dict[str, Any] = about[part]
            now: dict[str, Any] = ours[part]
            changed = [key for key in sorted({*then, *now} - set(_FREE)) if then.get(key) != now.get(key)]
            if changed:
                what = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in changed)
                raise ValueError(f"{path}: cannot be resumed with another {part}: {what}")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "extra": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind][rest] = value
        self.model.load_state_dict(groups["model"])
        device = next(iter(self.names)).device
        for parameter, name in self.names.items():
            keys = [key for key in groups["optimizer"] if key.rpartition("/")[0] == name]
            if keys:
                state = {key.rpartition("/")[2]: groups["optimizer"][key].to(device) for key in keys}
                self.optimizer.state[parameter] = state
        self.extra = {name: value.to(device) for name, value in groups["extra"].items()}
        self.step, self.history = about["step"], about["history"]

    def train(
        self,
        batches: Iterable[Batch],
        compute: Callable[[Batch], dict[str, Tensor]],
        *,
        name: str,
        progress: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> M:
        """Runs the steps that are left and returns the model, in eval mode and saved.

        Args:
            batches: one batch for each step from `self.step` on.
            compute: batch -> figures, 0-d tensors; "loss" is what is minimised, the others are shown.
            name: in front of the progress bar.
            after_step: called after each optimizer step.

        Raises:
            FloatingPointError: the loss is not finite any more; the last checkpoint stays.
        """
        config = self.config
        parameters = list(self.names)
        device = parameters[0].device
        self.model.train()
        bar = tqdm(total=config.steps, initial=self.step, desc=name, unit="step", disable=not progress, leave=True)
        if self.history:
            bar.set_postfix(_shown(self.history[-1]), refresh=False)
        with bar, torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in each("train step", itertools.islice(batches, config.steps - self.step)):
                torch.manual_seed(seed_of(config.seed, 0, self.step))
                mixed = config.precision == "bfloat16"
                with annotate("forward"), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    figures = compute(batch)
                self.optimizer.zero_grad()
                with annotate("backward"):
                    figures["loss"].backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(
                        self.step,
                        base=config.learning_rate,
                        final=config.final_learning_rate,
                        warmup=config.warmup_steps,
                        total=config.steps,
                    )
                with annotate("optimizer"):
                    self.optimizer.step()
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

    def _log(self, figures: dict[str, float], bar: tqdm[Any]) -> None:
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"loss is {figures['loss']} at step {self.step}: try a learning_rate below "
                f"{self.config.learning_rate:g}"
            )
        if self.step % self.config.log_every == 0 or self.step == self.config.steps:
            self.history.append({"step": self.step, **figures})
        bar.set_postfix(_shown(figures), refresh=False)


def read_about(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: step, config, data and history."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["training"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable training checkpoint") from error


def _shown(figures: dict[str, float]) -> dict[str, str]:
    return {key: f"{value:.4g}" for key, value in figures.items() if key != "step"}
