"""What is recorded of the machine, from a folder that stands in for /proc and /sys, and a module for nvidia-ml-py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.conditions import Watch, disturbances
from benchmarks.harness.results import Results, read

TICKS = os.sysconf("SC_CLK_TCK")


def machine(root: Path, *, steal: int, busy: int, throttles: int, pressure: int, kilohertz: int) -> Path:
    """Writes the files of a machine with one core: seconds of steal and of work, and microseconds of waiting."""
    files = {
        "proc/stat": f"cpu  {busy * TICKS} 0 0 {100 * TICKS} 0 0 0 {steal * TICKS} 0 0\ncpu0 0\n",
        "proc/loadavg": "1.50 1.00 0.50 2/100 1\n",
        "proc/pressure/memory": f"some avg10=0.00 avg60=0.00 avg300=0.00 total={pressure}\nfull total=0\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": f"{throttles}\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": f"{kilohertz}\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


class FakeNvml:
    """A card whose clock falls because of heat at the second reading."""

    def __init__(self) -> None:
        self.readings = 0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.readings += 1
        return "card"

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:
        return 650_000 + self.readings

    def nvmlDeviceGetTotalEccErrors(self, card: str, kind: int, counter: int) -> int:
        return 0

    def nvmlDeviceGetMigMode(self, card: str) -> list[int]:
        return [0, 0]

    def nvmlDeviceGetClockInfo(self, card: str, clock: int) -> int:
        return {1: 1980 if self.readings == 1 else 1200, 2: 2619}[clock]

    def nvmlDeviceGetTemperature(self, card: str, sensor: int) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: str) -> int:
        return 0x1 if self.readings == 1 else 0x21


def test_cpu_conditions(tmp_path: Path) -> None:
    machine(tmp_path, steal=0, busy=0, throttles=3, pressure=0, kilohertz=3_000_000)
    watch = Watch(root=tmp_path)
    machine(tmp_path, steal=1, busy=9, throttles=5, pressure=10**9, kilohertz=2_000_000)
    found = watch.result()
    assert found["steal"] == 0.1
    assert found["load"] == 1.5
    assert found["mhz"] == [2000, 3000]
    assert found["throttles"] == 2
    assert found["memory_pressure"] > 1
    assert found["others"] > 1
    assert found["gpu"] is None
    said = " / ".join(disturbances(found))
    for words in (
        "hypervisor took 10%",
        "other processes used",
        "slowed down 2 times",
        "waited for memory",
        "2000",
    ):
        assert words in said


def test_a_quiet_machine_is_undisturbed(tmp_path: Path) -> None:
    machine(tmp_path, steal=5, busy=5, throttles=7, pressure=8, kilohertz=3_000_000)
    assert disturbances(Watch(root=tmp_path).result()) == []
    assert disturbances(None) == []


def test_what_is_not_reported_is_none(tmp_path: Path) -> None:
    found = Watch(root=tmp_path).result()
    assert {name for name, value in found.items() if value is None} == {
        "steal", "others", "load", "mhz", "throttles", "memory_pressure", "gpu",
    }  # fmt: skip
    assert disturbances(found) == []


def test_gpu_conditions(tmp_path: Path) -> None:
    found = Watch(FakeNvml(), tmp_path).result()["gpu"]
    assert found["sm_mhz"] == [1200, 1980]
    assert found["memory_mhz"] == [2619, 2619]
    assert found["watts"] == pytest.approx([650.001, 650.002])
    assert found["celsius"] is None
    assert (found["reasons"], found["ecc_errors"], found["mig"]) == (["heat"], 0, False)
    assert disturbances({"gpu": found}) == ["the GPU lowered its clock: heat"]


def test_every_line_of_results_has_conditions(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.jsonl")
    results.row("a", {}, {"x": [1.0]})
    given: dict[str, Any] = {"steal": 0.5}
    results.row("a", {}, {"x": [1.0]}, conditions=given)
    first, second = (row["conditions"] for row in read([tmp_path / "r.jsonl"]))
    assert first["seconds"] >= 0
    assert set(first) >= {"steal", "load", "mhz", "throttles", "memory_pressure", "gpu"}
    assert second == given
