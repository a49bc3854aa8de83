"""Training steps on a GPU: every recipe in float32 as on the CPU, and in bfloat16 within bounds of float32.

Masks, dropped classes and crops of a step come from the CPU on every device, so that the losses of two devices can be
compared. Only the noise of a VAE and the dropout of a generator are drawn on the device. The tests with bfloat16 run on
the CPU as well.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import KINDS, train

from titok.training import read_metrics

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SHORT: dict[str, Any] = {
    "steps": 4,
    "log_every": 1,
    "checkpoint_every": 4,
    "adversarial_start": 2,
    "warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def exact_products(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN computes float32 convolutions in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def figures(kind: str, out: Path, device: str, precision: str = "float32") -> list[dict[str, Any]]:
    """The figures of each step of a short run."""
    model = train(kind, out, {**SHORT, "precision": precision}, device=device)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert next(model.parameters()).device.type == device
    return list(read_metrics(out))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_trains_as_the_cpu(kind: str, tmp_path: Path) -> None:
    ours, theirs = (figures(kind, tmp_path / device, device) for device in ("cuda", "cpu"))
    assert len(ours) == len(theirs) == SHORT["steps"]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    draws_on_the_device = kind in ("vae", "vit")
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=2e-2 if draws_on_the_device else 1e-4)
    if not draws_on_the_device:
        assert ours[0]["gradient_norm"] == pytest.approx(theirs[0]["gradient_norm"], rel=1e-3)


@DEVICES
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "decoder", "vit", "uvit"])
def test_bfloat16_is_close_to_float32(kind: str, device: str, tmp_path: Path) -> None:
    """The first step, before which the weights are the same."""
    half, whole = (figures(kind, tmp_path / name, device, name) for name in ("bfloat16", "float32"))
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"], rel=2e-2)
    assert half[0]["gradient_norm"] == pytest.approx(whole[0]["gradient_norm"], rel=0.1)
    assert all(math.isfinite(step["loss"]) for step in half)
