"""A network with its optimizer: one step on the micro-batches of this process, averaged over all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from titok.processes import is_distributed, own_part
from titok.profiling import annotate
from titok.training.config import TrainingConfig
from titok.training.objective import Losses
from titok.training.optim import lay_out_convolutions, learning_rate, make_optimizer
from titok.training.order import seed_of
from titok.training.sharding import shard, whole

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Optimized:
    """A network, the objective by which it is trained, and its optimizer.

    Args:
        network: whose parameters are trained, those that require a gradient.
        objective: a module that contains it and returns `Losses`.
        first_step: of the run, in which its training starts, and from which its learning rate is counted.
        warmup_steps: of its learning rate.
        sharded: whether the network is sharded over all processes; by default each has all of it.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: nn.Module,
        config: TrainingConfig,
        *,
        first_step: int,
        warmup_steps: int,
        sharded: bool = False,
    ) -> None:
        if sharded:
            shard(objective)
        else:
            lay_out_convolutions(network)
        self.network, self.objective, self.config = network, objective, config
        self.first_step, self.warmup_steps = first_step, warmup_steps
        self.names: dict[Tensor, str] = {p: name for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(network, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.called: nn.Module = objective
        if is_distributed() and not sharded:
            self.called = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.names)).device

    def learning_rate(self, step: int) -> float:
        """The learning rate in step `step` of the run."""
        config = self.config
        return learning_rate(
            step - self.first_step,
            base=config.learning_rate,
            final=config.final_learning_rate,
            warmup=self.warmup_steps,
            total=config.steps - self.first_step,
        )

    def optimize(self, inputs: Sequence[tuple[Tensor, ...]], step: int) -> tuple[list[Losses], dict[str, float]]:
        """One optimizer step on the micro-batches of this process.

        Returns:
            the losses of each micro-batch, and the learning rate and the norm of the gradients.
        """
        config = self.config
        rank, world_size = own_part()
        results = []
        self.optimizer.zero_grad()
        for number, arguments in enumerate(inputs):
            torch.manual_seed(seed_of(config.seed, 0, step, rank + number * world_size))
            with self._averages_gradients(number + 1 == len(inputs)):
                with annotate("forward"), self._autocast():
                    losses: Losses = self.called(*arguments, step)
                with annotate("backward"):
                    self.scaler.scale(losses.loss / len(inputs)).backward()
            results.append(losses._replace(loss=losses.loss.detach()))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(list(self.names), config.clip_norm)
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with annotate("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return results, {"learning_rate": rate, "gradient_norm": whole(norm)}  # type: ignore[dict-item]

    def _averages_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of a micro-batch: after the last one, the gradients are averaged over the processes.

        A sharded network averages them after each one, so that no process keeps the gradients of all weights.
        """
        if isinstance(self.called, DistributedDataParallel) and not last:
            return self.called.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
