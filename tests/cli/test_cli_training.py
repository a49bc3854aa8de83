"""`titok train`: the two-stage path from pictures to a generator, and how settings are given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cli_runner import refused, titok
from titok import MaskGITVQGAN, TiTok
from titok.evaluation.held_out import held_out_by_name
from titok.training.metrics import read_metrics
from titok.training.presets import RECIPES, preset, preset_names

TINY = [
    "--steps", 4, "--batch-size", 2, "--set", "checkpoint_every=2", "--set", "log_every=2", "--set", "picture_every=2",
]  # fmt: skip
ADVERSARIAL = ["--set", "adversarial_start=2"]
VQGAN = [
    "--set", "model.channel_multipliers=[1, 1, 1]", "--set", "model.blocks_per_level=1",
    "--set", "model.codebook_size=16", "--set", "model.code_dim=8", "--set", "image_size=16",
]  # fmt: skip
TOKENIZER = [
    "--set", "model.proxy.channel_multipliers=[1, 1, 1]", "--set", "model.proxy.codebook_size=16",
    "--set", "model.proxy.code_dim=8", "--set", "model.image_size=16", "--set", "model.num_latent_tokens=4",
    "--set", "model.encoder.layers=1", "--set", "model.decoder.layers=1",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of two pictures each, below the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("cats/a", "red"), ("cats/b", "blue"), ("dogs/a", "green"), ("dogs/b", "white")):
        path = Path("photos", f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), colour).save(path)
    return Path("photos")


@pytest.mark.slow
def test_from_pictures_to_generated_ones_in_four_runs(photos: Path) -> None:
    titok("train", "vqgan", photos, "-o", "vqgan", "--held-out", photos, *TINY, *ADVERSARIAL, *VQGAN)
    shown = ["--held-out", photos]
    printed = titok("train", "proxy", photos, "-p", "vqgan", "-o", "first", *shown, *TINY, *TOKENIZER)
    assert printed[-1].startswith("first: stage 1 of a tokenizer of 4 pictures, step 4, loss ")
    second = ["train", "decoder", photos, "-f", "first", "-p", "vqgan", "-o", "whole"]
    second += [*shown, *TINY, *ADVERSARIAL, *TOKENIZER]
    titok(*second)
    assert "discriminator_loss" in read_metrics("whole")[-1]
    assert sorted(path.name for path in Path("whole/pictures").iterdir()) == ["00000002.png", "00000004.png"]
    assert TiTok.from_pretrained("whole").config.pixel_decoder
    titok("train", "generator", photos, "-t", "whole", "-o", "generator", "--width", 64, "--layers", 1, *TINY)
    titok("generate", "-t", "whole", "-g", "generator", "--per-class", 1)
    with Image.open("samples.png") as image:
        assert image.height == 2 * 16 + 2

    weights = Path("whole/model.safetensors").read_bytes()
    titok(*second, "--resume")
    assert Path("whole/model.safetensors").read_bytes() == weights
    message = "the weights that the run starts from are not those that it was started with"
    shutil.copytree("whole", "another")
    second[4] = "another"
    assert message in refused(*second, "--resume")
    titok("train", "vqgan", photos, "-o", "more", "--init", "vqgan", *TINY, *VQGAN)


@pytest.mark.slow
def test_a_share_of_the_pictures_is_held_out(photos: Path) -> None:
    held_out = held_out_by_name([f"{name}.png" for name in ("cats/a", "cats/b", "dogs/a", "dogs/b")], 0.5)
    assert 0 < held_out.sum() < 4
    command = [
        "train",
        "tokenizer",
        photos,
        *TINY,
        "--image-size",
        16,
        "--tokens",
        4,
        "--width",
        64,
        "--layers",
        1,
    ]
    printed = titok(*command, "--hold-out", 0.5, "--set", "evaluate_every=2")
    assert f"a tokenizer of {4 - int(held_out.sum())} pictures" in printed[-1]
    assert [entry["step"] for entry in read_metrics("runs/tokenizer") if "held_out_psnr" in entry] == [2, 4]
    assert "--hold-out: expected it without --held-out" in refused(
        *command, "-o", "other", "--hold-out", 0.5, "--held-out", photos
    )
    assert "--hold-out: expected a share of at least one" in refused(*command, "-o", "other", "--hold-out", 1e-9)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(photos: Path) -> None:
    command = [
        "train",
        "tokenizer",
        photos,
        "--image-size",
        16,
        "--tokens",
        4,
        "--width",
        64,
        "--layers",
        1,
        *TINY,
    ]
    command += ["--set", "micro_batch_size=1"]
    titok(*command, "-o", "one")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "titok",
    ]
    arguments = [*launcher, *map(str, command), "-o", "two"]
    run = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("two: a tokenizer of 4 pictures") == 1
    for name in ("model.safetensors", "training.safetensors"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_settings_are_those_of_a_preset_a_file_and_changes(photos: Path) -> None:
    command = ["train", "proxy", photos, "-p", "vqgan"]
    printed = json.loads("\n".join(titok(*command, "--preset", "titok-l-32", "--print-config")))
    assert printed == json.loads(json.dumps(preset("proxy", "titok-l-32").to_dict()))
    Path("settings.json").write_text(json.dumps({**printed, "steps": 7, "warmup_steps": 3}))
    changed = ["--config", "settings.json", "--set", "model.num_latent_tokens=64", "--set", "precision=bfloat16"]
    printed = json.loads("\n".join(titok(*command, *changed, "--learning-rate", "2e-4", "--print-config")))
    assert (printed["steps"], printed["warmup_steps"], printed["precision"]) == (7, 3, "bfloat16")
    assert printed["model"]["num_latent_tokens"] == 64
    assert (printed["learning_rate"], printed["final_learning_rate"]) == (2e-4, pytest.approx(2e-5))
    assert not Path("runs").exists(), "printing trains nothing"


def test_settings_that_do_not_exist(photos: Path) -> None:
    command = ["train", "tokenizer", photos]
    assert "--set: there is no setting 'model.nothing'; here are bottleneck, " in refused(
        *command, "--set", "model.nothing=1"
    )
    assert "--set: expected name=value, got 'steps'" in refused(*command, "--set", "steps")
    assert "TokenizerTraining.steps: expected an int >= 1, got 'many'" in refused(*command, "--set", "steps=many")
    assert "preset: expected one of small, titok-bl-64-vq8k," in refused(*command, "--preset", "titok-l-32")
    assert "--image-size: expected a small model" in refused(
        *command, "--preset", "titok-bl-64-vq8k", "--image-size", 64
    )
    assert "--log: expected tensorboard or wandb, got 'paper'" in refused(*command, "--log", "paper")
    assert not Path("runs").exists()


def test_the_published_numbers() -> None:
    """As the configurations of the official repository have them."""
    proxy, decoder = preset("proxy", "titok-s-128"), preset("decoder", "titok-s-128")
    assert (proxy.steps, proxy.batch_size, proxy.learning_rate, proxy.betas) == (1_000_000, 256, 1e-4, (0.9, 0.99))
    assert (proxy.warmup_steps, proxy.final_learning_rate, proxy.weight_decay) == (10_000, 1e-5, 1e-4)
    assert (decoder.steps, decoder.batch_size, decoder.warmup_steps, decoder.betas) == (
        500_000, 256, 5_000, (0.9, 0.999),
    )  # fmt: skip
    weights = ("reconstruction_weight", "perceptual_weight", "adversarial_weight", "lecam_weight")
    assert [getattr(decoder, name) for name in weights] == [1.0, 0.1, 0.01, 0.001]
    assert (decoder.adversarial_start, decoder.perceptual) == (20_000, "convnext_s")  # type: ignore[attr-defined]
    single = preset("tokenizer", "titok-bl-128-vq8k")
    assert (single.steps, single.batch_size, single.adversarial_start) == (650_000, 1_024, 200_000)  # type: ignore[attr-defined]
    assert [getattr(single, name) for name in weights] == [1.0, 1.1, 0.1, 0.001]
    generator = preset("generator", "titok-l-32")
    assert (generator.steps, generator.batch_size, generator.learning_rate) == (500_000, 2_048, 2e-4)
    assert (generator.betas, generator.weight_decay, generator.precision) == ((0.9, 0.96), 0.03, "bfloat16")
    for config in (proxy, decoder, single, generator):
        assert (config.ema_decay, config.clip_norm, config.log_every) == (0.999, 1.0, 50)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_preset_is_valid(recipe: str) -> None:
    for name in preset_names(recipe):
        config = preset(recipe, name)
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="recipe: expected one of vqgan, proxy"):
        preset("autoencoder", "small")


@pytest.mark.slow
def test_small_presets_fit_each_other() -> None:
    assert preset("proxy", "small").model.proxy == preset("vqgan", "small").model  # type: ignore[attr-defined]
    whole = preset("decoder", "small").model  # type: ignore[attr-defined]
    assert whole.image_size == (preset("vqgan", "small").image_size,) * 2  # type: ignore[attr-defined]
    MaskGITVQGAN(whole.proxy)
    TiTok(whole)
