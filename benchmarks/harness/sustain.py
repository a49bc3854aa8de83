"""Minutes of one side without a pause: how its time spreads and drifts, and what an image costs in energy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checks import Checked
from benchmarks.harness.conditions import Watch, nvml


class CpuEnergy:
    """Joules that the processor packages have used (RAPL), where Linux lets this process read them.

    The counters wrap around every few minutes under load, so `joules` has to be called more often than that.

    Args:
        root: where /sys is.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._zones = [
            path for path in sorted(root.glob("sys/class/powercap/intel-rapl:*")) if ":" not in path.name[11:]
        ]
        self._total = 0.0
        self._last = self._read()

    def _read(self) -> list[int] | None:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self._zones] or None
        except OSError:  # on most systems only root may read it
            return None

    def joules(self) -> float | None:
        """Since this object was made; None where it cannot be read."""
        now = self._read()
        if self._last is None or now is None:
            return None
        for zone, before, after in zip(self._zones, self._last, now, strict=True):
            if after < before:
                after += int((zone / "max_energy_range_uj").read_text())
            self._total += (after - before) / 1e6
        self._last = now
        return self._total


class GpuEnergy:
    """Joules that the first GPU has used, by the driver's counter.

    Args:
        gpu: the module of nvidia-ml-py, or None.
    """

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._start = self._read()

    def _read(self) -> float | None:
        try:
            handle = self._gpu.nvmlDeviceGetHandleByIndex(0)
            return float(self._gpu.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except Exception:  # no package, no driver, or a card that does not count it
            return None

    def joules(self) -> float | None:
        """Since this object was made; None where it cannot be read."""
        now = self._read()
        return None if now is None or self._start is None else now - self._start


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least this share of all samples does not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def sustain(
    runs: Sequence[Callable[[], Any]], seconds: float, device: str, meter: CpuEnergy | GpuEnergy | None = None
) -> dict[str, Any]:
    """Calls all of `runs` one after another, again and again, for `seconds`.

    Returns:
        samples: seconds of each time.
        p50, p90, p99: percentiles of these seconds.
        drift: the median of the last tenth of the samples divided by that of the first tenth.
        joules: energy that the processor or the GPU used meanwhile; None where it cannot be read.
        conditions: what the machine was doing.
    """
    for run in runs:
        run()
    gpu = nvml() if device == "cuda" else None
    meter = meter or (GpuEnergy(gpu) if device == "cuda" else CpuEnergy())
    watch = Watch(gpu)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not samples:
        seed = 1 + len(samples)
        calls = [(run.run, run.inputs(seed)) if isinstance(run, Checked) else (run, ()) for run in runs]
        start = time.perf_counter()
        for call, arguments in calls:
            call(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
        watch.sample()
        meter.joules()
    tenth = max(1, len(samples) // 10)
    return {
        "samples": samples,
        **{f"p{share}": percentile(samples, share / 100) for share in (50, 90, 99)},
        "drift": percentile(samples[-tenth:], 0.5) / percentile(samples[:tenth], 0.5),
        "joules": meter.joules(),
        "conditions": watch.result(),
    }
