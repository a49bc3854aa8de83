"""The trackers of TensorBoard and of Weights & Biases, with stand-ins for packages that are not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from titok.training.metrics import TensorBoard, WeightsAndBiases


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "00000005.png"
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(path)
    return path


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    calls: list[Any] = []

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda figures, step: calls.append(("log", step, figures)), finish=lambda: calls.append("finish")
        )

    wandb: Any = ModuleType("wandb")
    wandb.init, wandb.Image = init, lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = WeightsAndBiases(project="titok", name="a")
    tracker.log(5, {"loss": 0.5})
    tracker.picture(5, picture)
    tracker.close()
    assert calls == [
        ("init", {"project": "titok", "name": "a"}),
        ("log", 5, {"loss": 0.5}),
        ("log", 5, {"00000005": ("image", str(picture))}),
        "finish",
    ]


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls.append(("open", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def add_image(self, name: str, pixels: np.ndarray, step: int, *, dataformats: str) -> None:
            calls.append((name, pixels.tolist(), step, dataformats))

        def close(self) -> None:
            calls.append("close")

    module: Any = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = TensorBoard("runs/a/tensorboard")
    tracker.log(5, {"loss": 0.5, "psnr": 20.0})
    tracker.picture(5, picture)
    tracker.close()
    pixels = np.arange(60).reshape(4, 5, 3).tolist()
    assert calls == [
        ("open", "runs/a/tensorboard"), ("loss", 0.5, 5), ("psnr", 20.0, 5), ("00000005", pixels, 5, "HWC"), "close",
    ]  # fmt: skip


def test_files_of_the_real_tensorboard(tmp_path: Path, picture: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoard(tmp_path / "events")
    tracker.log(5, {"loss": 0.5})
    tracker.picture(5, picture)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 0.5)]
    (image,) = events.Images("00000005")
    assert (image.step, image.width, image.height) == (5, 5, 4)
