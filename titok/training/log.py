"""What a run shows while it trains: `metrics.jsonl`, the progress bar, pictures and trackers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from titok.processes import mean_of_all
from titok.training.folder import PICTURES
from titok.training.metrics import SPEED, Metrics, Tracker
from titok.training.pictures import save_png

if TYPE_CHECKING:
    from titok.training.run import Run


class Log:
    """The figures since the last entry, written to `metrics.jsonl`, the progress bar and the trackers."""

    def __init__(self, run: Run[Any], bar: tqdm[Any], trackers: Sequence[Tracker]) -> None:
        self.run, self.bar, self.trackers = run, bar, trackers
        self.metrics = Metrics(run.folder, run.step) if run.rank == 0 else None
        self.steps, self.waited, self.taken = 0, 0.0, 0.0

    def add(self, figures: dict[str, Tensor], waited: float, taken: float) -> None:
        """Takes the figures of a step of this process, and the seconds that it waited for data and took in all."""
        run, config = self.run, self.run.config
        self.steps, self.waited, self.taken = self.steps + 1, self.waited + waited, self.taken + taken
        last = run.step == config.steps
        evaluates = bool(config.evaluate_every) and (last or run.step % config.evaluate_every == 0)
        logs = last or evaluates or run.step % config.log_every == 0
        if not logs and run.step % config.checkpoint_every and not self._makes_picture():
            return
        figures = {**figures, **run.objective.shared_figures()}
        numbers = [float(figure) for figure in figures.values()]
        values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        means = dict(zip(figures, mean_of_all(values).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"loss is {means['loss']} at step {run.step}: try a learning_rate below {config.learning_rate:g}"
            )
        if logs:
            speed = (self.steps * config.batch_size / max(self.taken, 1e-9), self.waited / max(self.taken, 1e-9))
            entry = {"step": run.step, **means, **dict(zip(SPEED, speed, strict=True))}
            if evaluates:
                with self._averages_in_eval_mode():
                    entry |= {f"held_out_{name}": value for name, value in run.objective.evaluate().items()}
            if self.metrics is not None:
                self.metrics.append(entry)
            for tracker in self.trackers:
                tracker.log(run.step, {key: value for key, value in entry.items() if key != "step"})
            self.steps, self.waited, self.taken = 0, 0.0, 0.0
            self.bar.set_postfix(_formatted(entry), refresh=False)
        if self._makes_picture():
            self._picture()

    def _makes_picture(self) -> bool:
        every = self.run.config.picture_every
        return bool(every) and self.run.step % every == 0

    def _picture(self) -> None:
        """Writes a picture of what the model does, with averaged weights where there are any, in the first process."""
        run = self.run
        with self._averages_in_eval_mode():
            picture = run.objective.picture() if run.rank == 0 else None
        if picture is not None:
            path = run.folder / PICTURES / f"{run.step:08}.png"
            save_png(path, picture)
            for tracker in self.trackers:
                tracker.picture(run.step, path)

    @contextlib.contextmanager
    def _averages_in_eval_mode(self) -> Iterator[None]:
        """Within, the model has its averaged weights, if there are any, and is in eval mode."""
        run = self.run
        run.objective.eval()
        with torch.no_grad(), torch.random.fork_rng([]), run.averaged():
            yield
        run.objective.train()

    def flush(self) -> None:
        """Returns when all entries are on the disk."""
        if self.metrics is not None:
            self.metrics.flush()

    def close(self) -> None:
        """Closes the file and the trackers."""
        if self.metrics is not None:
            self.metrics.close()
        for tracker in self.trackers:
            tracker.close()


def _formatted(figures: dict[str, float]) -> dict[str, str]:
    texts = {key: f"{value:.4g}" for key, value in figures.items() if key not in ("step", *SPEED)}
    return {**texts, "images/s": f"{figures[SPEED[0]]:.3g}", "waiting": f"{figures[SPEED[1]]:.0%}"}
