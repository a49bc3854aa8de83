"""The training loop of every recipe: steps, several processes, averages of the weights, checkpoints and figures.

The random numbers of a micro-batch come from a generator seeded with (seed, step, number of the micro-batch), and the
order of the data from one seeded with (seed, epoch). A checkpoint therefore needs no state of a generator, and a run
that was killed and resumed gives the same weights, bit for bit, as one that was not. So does a run of several
processes and a run of one, where the gradients of two micro-batches are added, which is the same in either order; with
more, the order of summation differs, and results agree up to rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic

import torch
from torch import Tensor
from tqdm import tqdm

from titok.data.folders import Images, Pictures, read_batches
from titok.processes import in_first_process, own_part
from titok.profiling import each
from titok.training import checkpoint
from titok.training.config import ProxyTraining, ReconstructionTraining, TrainingConfig
from titok.training.ema import EMA
from titok.training.folder import RAW, RunFolder
from titok.training.log import Log
from titok.training.metrics import Tracker
from titok.training.objective import Losses, M, Objective, switched_trunks
from titok.training.optimized import Optimized
from titok.training.order import micro_batches, seed_of, shuffled_draws
from titok.training.sharding import whole, whole_in_first_process, whole_model


class Run(Generic[M]):
    """The state of a training run. It is saved in a folder.

    Args:
        objective: with the model in the state in which training starts.
        config: settings of the run.
        folder: holds the checkpoint, from which the run continues if there is one, and the model.
        data: what identifies the data, such as {"images": 1000}, to refuse a resumption with other data. The keys of
            `titok.training.checkpoint.WORDS_FOR_HASHES` stand for hashes.
        adversary: the objective of a discriminator, which takes what `Losses.compared` has and the step. It has the
            attributes `discriminator`, `first_step` and `warmup_steps`, and `state` as an `Objective`.

    Attributes:
        step: number of optimizer steps that are done.

    Raises:
        ValueError: the run in `folder` has another configuration, model or data, or its file is damaged; or the number
            of processes does not divide the number of micro-batches.
    """

    def __init__(
        self,
        objective: Objective[M],
        config: TrainingConfig,
        folder: RunFolder,
        *,
        data: dict[str, Any],
        adversary: Any = None,
    ) -> None:
        self.rank, self.world_size = own_part()
        if config.micro_batches % self.world_size:
            raise ValueError(
                f"micro_batch_size: expected a number of micro-batches that {self.world_size} processes can share "
                f"equally, got {config.micro_batches} (batch_size {config.batch_size}, micro_batch_size "
                f"{config.micro_batch_size})"
            )
        self.objective: Objective[M] = objective
        self.model: M = objective.model
        self.config, self.data = config, data
        self.folder, self.adversary = folder.path, adversary
        self.step = 0
        objective.train()
        self.sharded = config.shard and self.world_size > 1
        self.parts = {
            "": Optimized(
                self.model,
                objective,
                config,
                first_step=0,
                warmup_steps=config.warmup_steps,
                sharded=self.sharded,
            )
        }
        if adversary is not None:
            self.parts["discriminator_"] = Optimized(
                adversary.discriminator,
                adversary,
                config,
                first_step=adversary.first_step,
                warmup_steps=adversary.warmup_steps,
            )
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        if folder.checkpoint.exists():
            self._load()

    def batches(self, count: int) -> Iterator[Tensor]:
        """The indices of the samples that this process computes, (micro_batch_size,) for each micro-batch to come."""
        for draws in self.draws(count):
            yield draws % count

    def draws(self, count: int) -> Iterator[Tensor]:
        """The same as draws of samples, which number epoch and sample: see `titok.training.order.shuffled_draws`."""
        config = self.config
        order = shuffled_draws(count, config.batch_size, config.seed, self.step)
        return micro_batches(order, config.batch_size // config.micro_batches, self.rank, self.world_size)

    # -----------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self) -> None:
        """Writes the checkpoint, then the model. Called by every process, of which the first writes.

        If the process is killed meanwhile, each of the files is either the one from before or complete.
        """
        self.objective.before_saving()
        parts = self._tensors()
        in_first_process(lambda: self._write(parts))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint by part and name; where the run is sharded, in the first process alone."""
        parts = {"model": self.model.state_dict(), "extra": dict(self.objective.state)}
        if self.ema is not None:
            parts["averages"] = self.ema.state_dict()
        if self.adversary is not None:
            parts["discriminator"] = self.adversary.discriminator.state_dict()
            parts["extra"] |= {f"discriminator/{name}": value for name, value in self.adversary.state.items()}
        for prefix, part in self.parts.items():
            parts[f"{prefix}optimizer"] = checkpoint.optimizer_tensors(part.optimizer, part.names)
            if part.scaler.is_enabled():
                for key, value in part.scaler.state_dict().items():
                    number = torch.tensor(float(value), dtype=torch.float64, device="cpu")
                    parts["extra"][f"{prefix}scaler/{key}"] = number
        return {name: whole_in_first_process(tensors) for name, tensors in parts.items()}

    def _write(self, parts: dict[str, dict[str, Tensor]]) -> None:
        checkpoint.write_checkpoint(self.folder, self.step, self.config, self.data, parts)
        checkpoint.keep_checkpoint(
            self.folder, self.step, last=self.config.keep_last, every=self.config.keep_every
        )
        self._write_model(parts)

    def _write_model(self, parts: dict[str, dict[str, Tensor]]) -> None:
        weights = parts["model"]
        whole_model(self.model, weights).save_pretrained(self.folder / RAW if self.ema else self.folder)
        if self.ema is not None:
            averages = self.ema.by_name(parts["averages"])
            whole_model(self.model, {**weights, **averages}).save_pretrained(self.folder)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the objective's model has its averaged weights, if there are any. Called by every process.

        Where the run is sharded, it is a copy that has all of the weights and computes without the other processes.
        """
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.swapped())
            if self.sharded:
                weights = {name: whole(value) for name, value in self.model.state_dict().items()}
                self.objective.model = whole_model(self.model, weights)
                stack.callback(setattr, self.objective, "model", self.model)
            yield

    def _load(self) -> None:
        path = self.folder / checkpoint.CHECKPOINT
        self.step, parts = checkpoint.read_checkpoint(path, self.config, self.data)
        extra = parts.get("extra", {})
        checkpoint.load_module(path, self.model, parts.get("model", {}))
        if self.adversary is not None:
            checkpoint.load_module(path, self.adversary.discriminator, parts.get("discriminator", {}))
        for prefix, part in self.parts.items():
            checkpoint.load_optimizer(path, part.optimizer, part.names, parts.get(f"{prefix}optimizer", {}))
            if part.scaler.is_enabled():
                try:
                    scale = {key: float(extra.pop(f"{prefix}scaler/{key}")) for key in SCALER}
                except KeyError as error:
                    raise checkpoint.damaged(path, "the scale of the loss is missing") from error
                growth = {
                    "_growth_tracker": int(scale["_growth_tracker"]),
                    "growth_interval": int(scale["growth_interval"]),
                }
                part.scaler.load_state_dict({**scale, **growth})
        states = {"": self.objective.state} | ({"discriminator/": self.adversary.state} if self.adversary else {})
        for prefix, state in states.items():
            for name, value in state.items():
                saved = extra.pop(prefix + name, None)
                if saved is None or saved.shape != value.shape or saved.dtype != value.dtype:
                    raise checkpoint.damaged(path, f"{prefix}{name} is missing or of another kind")
                value.copy_(saved)
        if self.ema is not None:
            try:
                self.ema.load_state_dict(parts.get("averages", {}))
            except (KeyError, RuntimeError, ValueError) as error:
                raise checkpoint.damaged(path, "its averages are of another model") from error

    # -----------------------------------------------------------------------------------------------------------
    # Steps

    def train(
        self, batches: Iterable[Tensor], *, name: str, progress: bool = True, trackers: Sequence[Tracker] = ()
    ) -> M:
        """Runs the steps that remain. Returns the model, in eval mode; it is saved, too.

        The random numbers of the steps come from PyTorch's global generators, whose state is restored at the end.

        Args:
            batches: the micro-batches of this process, from those of step `self.step` on.
            name: in front of the progress bar.
            progress: True shows a progress bar on stderr, if that is a terminal.
            trackers: receive the figures that `metrics.jsonl` gets, and the pictures. This method closes them.

        Raises:
            FloatingPointError: the loss is no longer finite; the last checkpoint stays.
        """
        config = self.config
        device = self.parts[""].device
        if self.step == config.steps:  # the run may have been stopped between the files of its last save
            parts = self._tensors()
            in_first_process(lambda: self._write_model(parts))
        hide = None if progress and self.rank == 0 else True  # None hides it where stderr is no terminal
        bar = tqdm(total=config.steps, initial=self.step, desc=name, unit="step", disable=hide, leave=True)
        devices = [device] if device.type == "cuda" else []
        trunks = switched_trunks(self.model, compiled=config.compile, checkpointed=config.checkpoint_activations)
        with (
            bar,
            contextlib.ExitStack() as stack,
            torch.random.fork_rng(devices),
            _tf32(config.precision),
            trunks,
        ):
            log = Log(self, bar, trackers if self.rank == 0 else ())
            stack.callback(log.close)
            self.objective.train()
            local = config.micro_batches // self.world_size
            stream = iter(batches)
            for _ in each("train step", range(config.steps - self.step)):
                started = time.perf_counter()
                inputs: list[tuple[Tensor, ...]] = [(batch,) for batch in itertools.islice(stream, local)]
                waited = time.perf_counter() - started
                if self.step == 0:
                    torch.manual_seed(seed_of(config.seed, 0, 0, self.rank))
                    self.objective.start(inputs[0][0])
                figures = self._one_step(inputs)
                self.step += 1
                log.add(figures, waited, time.perf_counter() - started)
                self.objective.after_step(self.step)
                bar.update()
                if self.step == config.steps or self.step % config.checkpoint_every == 0:
                    log.flush()
                    self.save()
        self.objective.eval()
        with self.averaged():
            if self.sharded:
                return self.objective.model
            averages = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(averages)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.contiguous()  # convolutions were laid out for the training
        return self.model

    def _one_step(self, inputs: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """One step of the model, and of the discriminator where it has begun; the mean figures of this process."""
        losses, figures = self.parts[""].optimize(inputs, self.step)
        results: dict[str, Any] = {**_mean_figures(losses), **figures}
        if self.ema is not None:
            self.ema.update()
        if self.adversary is not None and self.step >= self.adversary.first_step:
            part = self.parts["discriminator_"]
            losses, figures = part.optimize([one.compared for one in losses], self.step)
            self.adversary.after_step(losses)
            results |= {
                f"discriminator_{key}": value for key, value in {**_mean_figures(losses), **figures}.items()
            }
        return results


def train_on_images(
    objective: Objective[M],
    config: ProxyTraining | ReconstructionTraining,
    folder: RunFolder,
    images: Images | Tensor,
    *,
    name: str,
    data: dict[str, Any],
    adversary: Any = None,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
) -> M:
    """Runs the steps of a recipe whose samples are images: `Run.train`, with the images that its order asks for.

    Raises:
        ValueError: the settings ask for random crops, and `images` are not pictures that are read from files.
    """
    if config.random_crop and not isinstance(images, Pictures):
        raise ValueError(
            "random_crop: expected pictures that are read from files, such as titok.data.folders.ImageFolder, "
            f"got {type(images).__name__}"
        )
    run = Run(objective, config, folder, data=data, adversary=adversary)
    if config.random_crop and isinstance(images, Pictures):
        batches = read_batches(images.augmented(config.seed), run.draws(len(images)))
    else:
        batches = read_batches(images, run.batches(len(images)))
    return run.train(batches, name=name, progress=progress, trackers=trackers)


# What a scaler's state has that changes, and that it needs to be restored.
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def _mean_figures(losses: list[Losses]) -> dict[str, Tensor]:
    """The loss and the figures, averaged over micro-batches."""
    rows = [{"loss": one.loss, **one.figures} for one in losses]
    return {name: torch.stack([row[name].double() for row in rows]).mean() for name in rows[0]}


@contextlib.contextmanager
def _tf32(precision: str) -> Iterator[None]:
    """A context in which matrix products of a GPU are in TF32 if `precision` is "tf32"; then as they were."""
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
