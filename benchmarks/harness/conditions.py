"""What the machine was doing during a measurement, and whether that disturbed it.

On a CPU this reads what Linux reports in /proc and /sys; on an NVIDIA GPU it asks the driver through the package
nvidia-ml-py, where that is installed. What a machine does not report is None.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS_BETWEEN_SAMPLES = 0.5
# Limits above which a measurement counts as disturbed.
MOST_STEAL = 0.01  # share of the CPU time that the hypervisor gave to other machines
MOST_OTHERS = 0.1  # cores that other processes used
MOST_MEMORY_PRESSURE = 0.01  # share of the time in which a process waited for memory
LEAST_CLOCK = 0.9  # lowest clock over highest clock
# Bits of the driver's reasons for a lower clock.
REASONS = {0x4: "power cap", 0x8: "slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


def nvml() -> Any:
    """The module of nvidia-ml-py, ready for use; None where it or the driver is missing."""
    try:
        module = importlib.import_module("pynvml")
        module.nvmlInit()
    except Exception:  # the package has an error class of its own for each reason
        return None
    return module


class Watch:
    """Watches the machine from when it is made until `result` is called.

    Args:
        gpu: the module of nvidia-ml-py; None watches the CPU alone.
        root: where /proc and /sys are.
    """

    def __init__(self, gpu: Any = None, root: Path = Path("/")) -> None:
        self.gpu, self.root = gpu, root
        self._clocks: list[float] = []
        self._gpu_samples: list[dict[str, Any]] = []
        self._next_sample = 0.0
        self._started = self._counters()
        self.load = _first_number(self._read("proc/loadavg"))
        self.sample()

    def sample(self) -> None:
        """Reads clocks, and on a GPU power and temperature too, at most every `SECONDS_BETWEEN_SAMPLES`."""
        if time.monotonic() < self._next_sample:
            return
        self._next_sample = time.monotonic() + SECONDS_BETWEEN_SAMPLES
        if (clock := self._clock()) is not None:
            self._clocks.append(clock)
        if self.gpu is not None:
            self._gpu_samples.append(self._read_gpu())

    def result(self) -> dict[str, Any]:
        """The conditions since this object was made.

        Returns:
            seconds: how long it watched.
            steal: share of the CPU time that the hypervisor gave to others.
            others: how many cores other processes used, on average.
            load: the load average over a minute, at the start.
            mhz: the lowest and the highest clock of the fastest core.
            throttles: how often a core was slowed down because of heat.
            memory_pressure: share of the time in which a process waited for memory.
            gpu: see `_summary_of_gpu`; None without one.
        """
        self._next_sample = 0.0
        self.sample()
        before, now = self._started, self._counters()

        def grown(name: str) -> float | None:
            return None if before[name] is None or now[name] is None else now[name] - before[name]

        wall = max(now["time"] - before["time"], 1e-9)
        steal, total, busy = grown("steal"), grown("total"), grown("busy")
        pressure = grown("memory_pressure")
        return {
            "seconds": round(wall, 3),
            "steal": None if not total or steal is None else round(steal / total, 4),
            "others": None if busy is None else round(max(0.0, busy - (grown("own") or 0.0)) / wall, 3),
            "load": self.load,
            "mhz": [min(self._clocks), max(self._clocks)] if self._clocks else None,
            "throttles": grown("throttles"),
            "memory_pressure": None if pressure is None else round(pressure / 1e6 / wall, 4),
            "gpu": self._summary_of_gpu() if self._gpu_samples else None,
        }

    def _read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text()
        except OSError:
            return None

    def _counters(self) -> dict[str, Any]:
        """Counters that only grow: CPU times in seconds, events, and microseconds of waiting for memory."""
        mine = os.times()
        found: dict[str, Any] = {
            "time": time.monotonic(),
            "own": mine.user + mine.system + mine.children_user + mine.children_system,
            "steal": None,
            "total": None,
            "busy": None,
        }
        fields = (self._read("proc/stat") or "").partition("\n")[0].split()
        if fields[:1] == ["cpu"] and len(fields) > 8:
            user, nice, system, idle, waiting, irq, softirq, steal = (
                int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1:9]
            )
            busy = user + nice + system + irq + softirq
            found |= {"steal": steal, "busy": busy, "total": busy + idle + waiting + steal}
        files = sorted(self.root.glob("sys/devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"))
        counts = [int(_first_number(path.read_text()) or 0) for path in files]
        found["throttles"] = sum(counts) if files else None
        some = (self._read("proc/pressure/memory") or "").partition("\n")[0]
        found["memory_pressure"] = int(some.rpartition("total=")[2]) if "total=" in some else None
        return found

    def _clock(self) -> float | None:
        """MHz of the core that is fastest now."""
        files = self.root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
        kilohertz = [int(path.read_text()) for path in files]
        if kilohertz:
            return max(kilohertz) / 1e3
        lines = (self._read("proc/cpuinfo") or "").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return max(found, default=None)

    def _read_gpu(self) -> dict[str, Any]:
        handle = self.gpu.nvmlDeviceGetHandleByIndex(0)

        def ask(name: str, *arguments: Any) -> Any:
            try:
                return getattr(self.gpu, name)(handle, *arguments)
            except Exception:  # the driver or the card does not report it
                return None

        power, ecc, mig = (
            ask("nvmlDeviceGetPowerUsage"),
            ask("nvmlDeviceGetTotalEccErrors", 1, 0),  # errors that were not corrected, since the last restart
            ask("nvmlDeviceGetMigMode"),
        )
        return {
            "sm_mhz": ask("nvmlDeviceGetClockInfo", 1),
            "memory_mhz": ask("nvmlDeviceGetClockInfo", 2),
            "watts": None if power is None else power / 1e3,
            "celsius": ask("nvmlDeviceGetTemperature", 0),
            "reasons": ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
            "ecc_errors": ecc,
            "mig": None if mig is None else bool(mig[0]),
        }

    def _summary_of_gpu(self) -> dict[str, Any]:
        """Lowest and highest reading of each number, all reasons for a lower clock, ECC errors and MIG."""
        samples, found = self._gpu_samples, dict[str, Any]()
        for name in ("sm_mhz", "memory_mhz", "watts", "celsius"):
            values = [sample[name] for sample in samples if sample[name] is not None]
            found[name] = [min(values), max(values)] if values else None
        bits = 0
        for sample in samples:
            bits |= sample["reasons"] or 0
        found["reasons"] = [name for bit, name in REASONS.items() if bits & bit]
        return found | {"ecc_errors": samples[-1]["ecc_errors"], "mig": samples[-1]["mig"]}


def _first_number(text: str | None) -> float | None:
    return float(text.split()[0]) if text and text.split() else None


def disturbances(conditions: Mapping[str, Any] | None) -> list[str]:
    """What disturbed a measurement, in words; empty where nothing did, or where nothing is known."""
    if not conditions:
        return []
    found: list[str] = []

    def above(name: str, limit: float, words: str) -> None:
        value = conditions.get(name)
        if value is not None and value > limit:
            found.append(words.format(value))

    above("steal", MOST_STEAL, "the hypervisor took {:.0%} of the CPU time")
    above("others", MOST_OTHERS, "other processes used {:.1f} cores")
    above("throttles", 0, "cores were slowed down {:.0f} times because of heat")
    above("memory_pressure", MOST_MEMORY_PRESSURE, "processes waited for memory {:.0%} of the time")
    if _fell(conditions.get("mhz")):
        found.append("the clock fell to {:.0f} from {:.0f} MHz".format(*conditions["mhz"]))
    gpu = conditions.get("gpu") or {}
    if gpu.get("reasons"):
        found.append(f"the GPU lowered its clock: {', '.join(gpu['reasons'])}")
    if gpu.get("ecc_errors"):
        found.append(f"the GPU's memory had {gpu['ecc_errors']} errors that were not corrected")
    return found


def _fell(clocks: Sequence[float] | None) -> bool:
    return bool(clocks) and clocks[0] < LEAST_CLOCK * clocks[1]  # type: ignore[index]
