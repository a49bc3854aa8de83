"""The two training loops: that they learn, that a run can be stopped and resumed, and the errors they raise."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_processes, wait_for

from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig
from titok.checkpoints.files import read_weights
from titok.training import (
    GeneratorTraining,
    TokenizerTraining,
    tokenize_images,
    train_generator,
    train_tokenizer,
)
from titok.training.checkpoint import read_run_info
from titok.training.folder import CHECKPOINT, METRICS, RunFolder
from titok.training.metrics import SPEED, read_metrics
from titok.training.objective import Losses
from titok.training.reconstruction import augment
from titok.training.run import Run
from titok.training.tokenizer import TokenizerObjective

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = ViTConfig(width=16, layers=1, heads=2, patch_size=8)
TOKENIZER = TokenizerConfig(
    image_size=(16, 16), channels=1, encoder=VIT, decoder=VIT, num_latent_tokens=4, code_dim=4,
    codebook_size=16, l2_normalize=True, signed_pixels=True,
)  # fmt: skip
GENERATOR = GeneratorConfig(4, 16, num_classes=3, width=16, layers=1, heads=2, mlp_width=32)


def tokenizer_training(**changes: object) -> TokenizerTraining:
    base = TokenizerTraining(
        model=TOKENIZER, steps=12, batch_size=6, learning_rate=3e-3, warmup_steps=2, restart_every=3,
        random_shift=1, random_flip=True, checkpoint_every=5, log_every=4,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def generator_training(**changes: object) -> GeneratorTraining:
    base = GeneratorTraining(
        model=GENERATOR, steps=12, batch_size=8, learning_rate=3e-3, warmup_steps=2, checkpoint_every=5, log_every=4
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def pictures(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def train_one(kind: str, out: Path, **kwargs: object) -> torch.nn.Module:
    changes = kwargs.pop("changes", {})
    if kind == "tokenizer":
        return train_tokenizer(pictures(), tokenizer_training(**changes), out, progress=False, **kwargs)
    tokens = torch.randint(0, 16, (20, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    return train_generator(tokens, labels, generator_training(**changes), out, progress=False, **kwargs)


def content(folder: Path) -> dict[str, Any]:
    """The content of each file of a run, without what says how fast it was."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != METRICS]
    files: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    entries = read_metrics(folder)
    return {**files, METRICS: [{key: entry[key] for key in entry if key not in SPEED} for entry in entries]}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes a run raise `Stop` in its step `step`, which counts from 0, after the gradients are computed."""
    clip = torch.nn.utils.clip_grad_norm_
    calls = iter(range(1000))

    def dying(*args: object, **kwargs: object) -> object:
        if next(calls) == step:
            raise Stop
        return clip(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", dying)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_resumed_run_equals_an_uninterrupted_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_one(kind, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        with pytest.raises(Stop):
            train_one(kind, tmp_path / "cut")
    assert read_run_info(tmp_path / "cut" / CHECKPOINT)["step"] == 5
    torch.rand(3)  # changes the state of the global random generator
    resumed = train_one(kind, tmp_path / "cut", resume=True)
    assert same_weights(whole, resumed)
    assert (tmp_path / "whole" / CHECKPOINT).read_bytes() == (tmp_path / "cut" / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_the_seed_decides_the_weights_and_nothing_else_does(kind: str, tmp_path: Path) -> None:
    first = train_one(kind, tmp_path / "a")
    state = torch.random.get_rng_state()
    again = train_one(kind, tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), state)  # training does not change the caller's state
    other = train_one(kind, tmp_path / "c", changes={"seed": 1})
    assert same_weights(first, again)
    assert not same_weights(first, other)


@pytest.mark.parametrize(("kind", "model"), [("tokenizer", TiTok), ("generator", MaskGIT)])
def test_the_folder_holds_the_model_and_resuming_a_finished_run_changes_nothing(
    kind: str, model: type, tmp_path: Path
) -> None:
    trained = train_one(kind, tmp_path)
    assert not trained.training
    assert same_weights(trained, model.from_pretrained(tmp_path))
    before = content(tmp_path)
    assert sorted(before) == ["config.json", METRICS, "model.safetensors", CHECKPOINT]
    assert same_weights(trained, train_one(kind, tmp_path, resume=True))
    assert before == content(tmp_path)


def test_history_has_the_figures_of_the_progress_bar(tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path / "t")
    history = read_metrics(tmp_path / "t")
    assert [row["step"] for row in history] == [4, 8, 12]
    shared = {"step", "loss", "learning_rate", "gradient_norm", *SPEED}
    assert shared | {"psnr", "codes", "entropy", "reconstruction", "bottleneck"} == set(history[0])
    train_one("generator", tmp_path / "g")
    assert shared | {"accuracy"} == set(read_metrics(tmp_path / "g")[0])


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_progress_bar_is_for_terminals(
    is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    train_tokenizer(pictures(), tokenizer_training(), tmp_path)
    assert ("12/12" in stderr.getvalue()) == is_terminal
    assert is_terminal or stderr.getvalue() == ""


@pytest.mark.slow
def test_killed_run_leaves_a_loadable_state(tmp_path: Path) -> None:
    code = f"""
        import test_training as test
        test.train_one("tokenizer", Path({str(tmp_path)!r}), changes={{"steps": 100_000, "checkpoint_every": 1}})
    """
    started = start_processes(1, code)
    deadline = time.monotonic() + 200
    while not (tmp_path / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # so that the process is killed at some point between many checkpoints
    errors = wait_for(started, seconds=0)
    assert started[0].process.exitcode == -signal.SIGKILL, errors
    about = read_run_info(tmp_path / CHECKPOINT)
    assert about["step"] >= 1
    config = TokenizerTraining.from_dict(about["config"])
    with RunFolder(tmp_path, resume=True) as folder:
        run = Run(TokenizerObjective(TiTok(TOKENIZER), config), config, folder, data={"images": 20})
    assert run.step == about["step"]
    assert TiTok.from_pretrained(tmp_path).config == TOKENIZER


@pytest.mark.slow
def test_tokenizer_learns(tmp_path: Path) -> None:
    images = torch.zeros(8, 1, 16, 16)
    for i, image in enumerate(images):
        image[0, : 2 * i + 2] = 1
    changes = {"steps": 120, "warmup_steps": 10, "random_shift": 0, "random_flip": False, "learning_rate": 5e-3}
    train_tokenizer(images, tokenizer_training(**changes), tmp_path, progress=False)
    history = read_metrics(tmp_path)
    assert history[-1]["psnr"] > history[0]["psnr"] + 6


@pytest.mark.slow
def test_generator_learns_the_class(tmp_path: Path) -> None:
    tokens, labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([0, 1])
    changes = {"steps": 80, "learning_rate": 1e-2, "batch_size": 16}
    model = train_generator(tokens, labels, generator_training(**changes), tmp_path, progress=False)
    masked = torch.full((2, 4), model.mask_token)
    assert torch.equal(model(masked, labels).argmax(-1), tokens)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_bfloat16_keeps_weights_and_optimizer_in_float32(kind: str, tmp_path: Path) -> None:
    full = train_one(kind, tmp_path / "full")
    half = train_one(kind, tmp_path / "half", changes={"precision": "bfloat16"})
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    assert not same_weights(full, half)
    state = read_weights(tmp_path / "half" / CHECKPOINT)
    assert {v.dtype for name, v in state.items() if name.startswith("optimizer/")} == {torch.float32}
    histories = [read_metrics(tmp_path / name) for name in ("full", "half")]
    assert histories[0][0]["loss"] == pytest.approx(histories[1][0]["loss"], rel=0.1)


def test_positions_start_as_wide_as_asked(tmp_path: Path) -> None:
    changes = {"position_std": 0.7, "learning_rate": 0.0, "final_learning_rate": 0.0, "weight_decay": 0.0}
    wide = train_one("tokenizer", tmp_path / "wide", changes=changes)
    plain = train_one("tokenizer", tmp_path / "plain", changes={**changes, "position_std": None})
    drawn = torch.cat([wide.encoder.patch_positions, wide.encoder.latent_tokens, wide.decoder.latent_positions])
    assert float(drawn.detach().std()) == pytest.approx(0.7, rel=0.15)
    assert float(plain.encoder.patch_positions.detach().std()) < 0.4  # 16^-0.5
    assert torch.equal(wide.encoder.trunk.blocks[0].attn.qkv.weight, plain.encoder.trunk.blocks[0].attn.qkv.weight)


@pytest.mark.slow
def test_vae_trains(tmp_path: Path) -> None:
    model = dataclasses.replace(TOKENIZER, bottleneck="vae", l2_normalize=False)
    for kl_weight in (0.0, 1.0):
        out = tmp_path / str(kl_weight)
        changes = {"model": model, "kl_weight": kl_weight, "steps": 40, "random_shift": 0}
        trained = train_tokenizer(pictures(), tokenizer_training(**changes), out, progress=False)
        kl = trained.posterior(pictures()).kl().mean()
        if kl_weight == 0.0:
            free = kl
    assert kl < 0.5 * free


def test_fewer_latents_than_codes(tmp_path: Path) -> None:
    changes = {"model": dataclasses.replace(TOKENIZER, codebook_size=300), "steps": 4}
    train_tokenizer(pictures(), tokenizer_training(**changes), tmp_path, progress=False)


def test_augmentation_moves_and_mirrors() -> None:
    torch.manual_seed(0)
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(200, -1, -1, -1)
    assert torch.equal(augment(image, tokenizer_training(random_shift=0, random_flip=False)), image)
    flipped = augment(image, tokenizer_training(random_shift=0, random_flip=True))
    mirrored = (flipped == image.flip(-1)).flatten(1).all(dim=1)
    assert 60 < mirrored.sum() < 140
    assert torch.equal(flipped[~mirrored], image[~mirrored])
    moved = augment(image, tokenizer_training(random_shift=1, random_flip=False))
    assert len(moved.unique(dim=0)) == 9


def test_tokens_of_shifted_and_mirrored_copies(tmp_path: Path) -> None:
    tokenizer = train_one("tokenizer", tmp_path)
    images = pictures(5)
    tokens = tokenize_images(tokenizer, images, batch_size=2, flip=True, shifts=[(0, 0), (1, -1)])
    assert tokens.shape == (5, 4, 4)
    down_left = torch.nn.functional.pad(images, (0, 1, 1, 0), mode="replicate")[:, :, :16, 1:]
    assert torch.equal(tokens[:, 0], tokenizer.encode(images))
    assert torch.equal(tokens[:, 1], tokenizer.encode(down_left))
    assert torch.equal(tokens[:, 2], tokenizer.encode(images.flip(-1)))


def test_copies_count_as_samples_of_their_label(tmp_path: Path) -> None:
    tokens = torch.randint(0, 16, (6, 3, 4))
    labels = torch.arange(6) % 3
    copied = train_generator(tokens, labels, generator_training(), tmp_path / "a", progress=False)
    flat = train_generator(
        tokens.flatten(0, 1), labels.repeat_interleave(3), generator_training(), tmp_path / "b", progress=False
    )
    assert same_weights(copied, flat)


def test_a_run_is_not_overwritten_nor_mixed_with_another(tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(FileExistsError, match="resume"):
        train_one("tokenizer", tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.003, is 0\.1"):
        train_one("tokenizer", tmp_path, resume=True, changes={"learning_rate": 0.1})
    with pytest.raises(ValueError, match="images was 20, is 5"):
        train_tokenizer(pictures(5), tokenizer_training(), tmp_path, resume=True, progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train_one("tokenizer", tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=CHECKPOINT):
        train_one("tokenizer", tmp_path, resume=True)


def test_diverged_run_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TokenizerObjective.forward

    def diverging(self: TokenizerObjective, batch: torch.Tensor, step: int) -> Losses:
        losses = forward(self, batch, step)
        return losses._replace(loss=losses.loss * (torch.nan if step >= 7 else 1))

    monkeypatch.setattr(TokenizerObjective, "forward", diverging)
    with pytest.raises(FloatingPointError, match="step 8"):
        train_one("tokenizer", tmp_path)
    assert read_run_info(tmp_path / CHECKPOINT)["step"] == 5
    assert all(v.isfinite().all() for v in TiTok.from_pretrained(tmp_path).state_dict().values())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 0}, "steps"), ({"batch_size": -1}, "batch_size"), ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"), ({"warmup_steps": 12}, "warmup_steps"),
        ({"betas": (0.9, 1.0)}, "betas"), ({"clip_norm": 0.0}, "clip_norm"), ({"seed": -1}, "seed"),
        ({"restart_until": 1.5}, "restart_until"), ({"random_shift": -1}, "random_shift"),
        ({"precision": "fp8"}, "precision"), ({"position_std": 0.0}, "position_std"),
        ({"model": TokenizerConfig.preset("titok-l-32")}, "model"),
    ],
)  # fmt: skip
def test_configuration_refuses(changes: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"TokenizerTraining\.{name}: expected"):
        tokenizer_training(**changes)


def test_configuration_as_json() -> None:
    for config in (tokenizer_training(), generator_training()):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="class_dropout"):
        generator_training(class_dropout=2.0)
    with pytest.raises(ValueError, match="unknown keys"):
        GeneratorTraining.from_dict({"model": GENERATOR, "epochs": 3})


def test_data_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected at least one"):
        train_tokenizer(pictures(0), tokenizer_training(), tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="images"):
        train_tokenizer(torch.rand(4, 3, 16, 16), tokenizer_training(), tmp_path / "b", progress=False)
    good, labels = torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    for tokens, classes, name in (
        (good + 16, labels, "tokens"), (good[:, :3], labels, "tokens"), (good, labels + 4, "labels"),
        (good, labels[:3], "labels"), (good[:0], labels[:0], "labels"), (good.float(), labels, "tokens"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            train_generator(tokens, classes, generator_training(), tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()
