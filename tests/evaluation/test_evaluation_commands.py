"""`titok evaluate` and `titok probe`: what they write, what they refuse, and what a kill leaves."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import evaluation_oracles as oracles
import numpy as np
import pytest
from PIL import Image

from cli_runner import refused, titok

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = ("--features", "evaluation_oracles:projection")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_classes(folder: Path, count: int = 24) -> None:
    """Pictures of two classes, which differ in colour."""
    for number, pixels in enumerate(oracles.random_pictures(count, 4)):
        path = folder / ("dark" if number % 2 else "light") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels // 3 if number % 2 else 255 - pixels // 3).save(path)


def test_reconstructions_are_measured(models: Path, photos: Path) -> None:
    lines = titok(
        "evaluate", "reconstruction", photos, "-t", models / "tokenizer", *FEATURES, "--without", "lpips",
        "--without", "ssim",
    )  # fmt: skip
    result = json.loads(Path("reconstruction.json").read_text())
    assert sorted(result["figures"]) == [
        "class_score_projection", "codebook_usage", "entropy_bits", "frechet_distance_projection", "psnr",
    ]  # fmt: skip
    assert result["counts"]["pictures"] == 5
    assert result["settings"]["features"] == "projection"
    assert result["settings"]["without"] == ["lpips", "ssim"]
    assert set(result["hashes"]) == {"tokenizer", "reference", "features"}
    assert len(result["hashes"]["tokenizer"]) == 64
    assert set(result["versions"]) >= {"titok", "python", "torch", "numpy"}
    assert any("5 pictures: published distances use 50000" in warning for warning in result["warnings"])
    assert any(line.startswith("psnr ") for line in lines)
    assert refused("evaluate", "reconstruction", photos, "-t", models / "tokenizer").startswith(
        "reconstruction.json: exists already"
    )
    command = ("evaluate", "reconstruction", photos, "-t", models / "other", *FEATURES, "--overwrite")
    titok(*command, "--without", "lpips", "--without", "ssim", "--batch-size", 2)
    assert (
        json.loads(Path("reconstruction.json").read_text())["hashes"]["tokenizer"] != result["hashes"]["tokenizer"]
    )


def test_the_hash_of_a_tokenizer_does_not_depend_on_preparation(models: Path) -> None:
    from titok import TiTok
    from titok.cli.evaluation_record import hash_of_model

    one = TiTok.from_pretrained(models / "tokenizer")
    assert hash_of_model(one) == hash_of_model(TiTok.from_pretrained(models / "tokenizer", prepare=True))


def test_what_is_missing_is_named_with_the_way_out(
    models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module = importlib.import_module

    def without_packages(name: str, *rest: Any) -> ModuleType:
        if name.split(".")[0] in ("torchmetrics", "torchvision", "efficientnet_lite_pytorch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_packages)
    command: tuple[Any, ...] = ("evaluate", "reconstruction", photos, "-t", models / "tokenizer")
    message = refused(*command, *FEATURES)
    assert message.startswith("SSIM needs torchmetrics: pip install 'titok-kernels[eval]'")
    assert message.endswith("--without ssim leaves it out")
    message = refused(*command, *FEATURES, "--without", "ssim")
    assert "torchvision" in message
    assert message.endswith("--without lpips leaves it out")
    message = refused(*command, "--without", "ssim", "--without", "lpips", "--features", "efficientnet")
    assert "need efficientnet-lite-pytorch: pip install 'titok-kernels[eval]'" in message
    assert message.endswith("--without distance leaves it out")


def test_wrong_options_are_refused(models: Path, photos: Path) -> None:
    command: tuple[Any, ...] = ("evaluate", "reconstruction", photos, "-t", models / "tokenizer")
    assert refused(*command, "--without", "psnr") == "--without: expected distance or ssim or lpips, got 'psnr'"
    assert refused(*command, "-o", "a.txt") == "a.txt: expected a name that ends in .json"
    assert refused(*command, "--without", "ssim", "--without", "lpips", "--features", "x").startswith("features: ")
    assert refused(*command, "--feature-dtype", "int8", "--without", "ssim", "--without", "lpips").startswith(
        "--feature-dtype: expected float32 or float64"
    )
    assert "no such file" in refused("evaluate", "samples", "none.npz", "--reference", photos)
    assert refused("probe", photos, "-t", models / "tokenizer", "--held-out", "1.5").startswith("--held-out: ")


def test_unreadable_pictures(models: Path) -> None:
    write_classes(Path("photos"))
    Path("photos/light/broken.png").write_bytes(b"no picture")
    command = ("evaluate", "reconstruction", "photos", "-t", models / "tokenizer", "--without", "distance")
    rest = ("--without", "lpips", "--without", "ssim")
    assert "broken.png: not a readable picture" in refused(*command, *rest)
    titok(*command, *rest, "--skip-unreadable")
    assert json.loads(Path("reconstruction.json").read_text())["counts"]["pictures"] == 24


def test_samples_are_compared_with_a_file_and_with_a_folder() -> None:
    pictures = oracles.random_pictures(20, 1)
    np.savez("samples.npz", arr_0=pictures, arr_1=np.arange(20) % 4)
    np.savez("reference.npz", arr_0=oracles.random_pictures(26, 2))
    titok("evaluate", "samples", "samples.npz", "--reference", "reference.npz", "--features",
          "evaluation_oracles:inception_like")  # fmt: skip
    result = json.loads(Path("samples.json").read_text())
    assert sorted(result["figures"]) == ["fid", "inception_score", "precision", "recall", "sfid"]
    assert result["counts"] == {"samples": 20, "reference": 26}
    write_classes(Path("photos"))
    command = ("evaluate", "samples", "samples.npz", "-r", "photos", *FEATURES, "-o", "folder.json")
    titok(*command, "--without", "precision")
    assert "precision_projection" not in json.loads(Path("folder.json").read_text())["figures"]


@pytest.mark.slow
def test_samples_of_titok_generate_are_read(models: Path) -> None:
    """Also those of a grey tokenizer, which are written as RGB."""
    titok("generate", "-t", models / "tokenizer", "-g", models / "generator", "-n", 6, "-o", "samples.npz")
    np.savez("reference.npz", arr_0=oracles.random_pictures(9, 2))
    titok("evaluate", "samples", "samples.npz", "-r", "reference.npz", *FEATURES)
    result = json.loads(Path("samples.json").read_text())
    assert result["counts"]["samples"] == 6
    assert not any("pictures of a class" in warning for warning in result["warnings"])


def test_a_probe_writes_its_result(models: Path) -> None:
    write_classes(Path("photos"), 60)
    titok("probe", "photos", "-t", models / "tokenizer", "--held-out", "0.3", "--base-rate", "100", "--epochs", "60",
          "--warmup-epochs", "2", "--probe-batch-size", "8")  # fmt: skip
    result = json.loads(Path("probe.json").read_text())
    assert sorted(result["figures"]) == ["last_block_top1", "last_block_top5", "latents_top1", "latents_top5"]
    assert all(0 <= value <= 1 for value in result["figures"].values())
    assert result["figures"]["latents_top5"] == 1.0  # of two classes
    assert result["counts"]["training"] + result["counts"]["held_out"] == 60
    assert set(result["settings"]["features"]) == {"latents", "last_block"}
    write_classes(Path("others"), 10)
    titok("probe", "photos", "-t", models / "tokenizer", "--held-out", "others", "-o", "two.json", "--epochs", "2",
          "--warmup-epochs", "0")  # fmt: skip
    result = json.loads(Path("two.json").read_text())
    assert result["counts"] == {"training": 60, "held_out": 10, "classes": 2}
    assert any("steps at MAE's learning rate are few" in warning for warning in result["warnings"])
    Path("others/dark").rename("others/black")
    assert "expected the sub-folders of photos" in refused(
        "probe", "photos", "-t", models / "tokenizer", "--held-out", "others", "-o", "three.json"
    )


def start(*arguments: Any) -> subprocess.Popen[str]:
    """Starts a command in a process of its own, which finds the extractors of these tests."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); from titok.cli.commands import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until_signals_are_handled(process: subprocess.Popen[str]) -> None:
    """Waits until a process has a handler of its own for SIGTERM, which a command has once it has started."""
    mask = 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), flags=re.M)
        if caught and int(caught[1], 16) & mask:
            return
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_file(number: signal.Signals, models: Path) -> None:
    write_classes(Path("photos"), 3000)
    command = ("evaluate", "reconstruction", "photos", "-t", models / "tokenizer", *FEATURES, "--without", "lpips",
               "--without", "ssim", "--batch-size", 1)  # fmt: skip
    process = start(*command)
    wait_until_signals_are_handled(process)
    time.sleep(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the command was done before the signal came")
    assert not list(Path().glob("*.json"))
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "interrupted: no file is half-written; the same command starts anew" in errors


@pytest.mark.slow
def test_two_processes_write_one_result(
    models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Callable[..., Any]
) -> None:
    import socket

    np.savez("samples.npz", arr_0=oracles.random_pictures(20, 1))
    write_classes(Path("photos"), 20)
    commands: dict[str, tuple[Any, ...]] = {
        "samples.json": ("evaluate", "samples", "samples.npz", "-r", "photos", *FEATURES, "--batch-size", 3),
        "probe.json": ("probe", "photos", "-t", models / "tokenizer", "--epochs", 3, "--warmup-epochs", 1,
                       "--batch-size", 3),
    }  # fmt: skip
    for file, command in commands.items():
        titok(*command, "-o", "one.json")
        one = json.loads(Path("one.json").read_text())
        Path("one.json").unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in range(2):
            with monkeypatch.context() as patch:
                for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                    "MASTER_PORT": port}.items():  # fmt: skip
                    patch.setenv(name, value)
                processes.append(start(*command, "-o", file))
        outputs = [process.communicate(timeout=300) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        two = json.loads(Path(file).read_text())
        assert two["figures"] == pytest.approx(one["figures"], rel=1e-6)
        assert two["settings"]["processes"] == 2
        assert outputs[1][0] == ""
