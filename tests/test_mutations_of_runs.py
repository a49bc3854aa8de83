"""Damaged files of a run: each is read, made anew, or named in one line. `TITOK_MUTATIONS` sets how many are tried."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from mutations import COUNT, mutate_bytes, mutate_json, mutate_npz, one_clear_line_or_success
from titok import GeneratorConfig, Pipeline, TiTok, TokenizerConfig, ViTConfig
from titok.cli.inputs import png_names
from titok.data.npz import read_arrays
from titok.data.tokens import read_tokens, write_tokens
from titok.generation import sample_sets
from titok.generation.sample_sets import generate_set
from titok.training import GeneratorTraining, TokenizerTraining, checkpoint, run, train_generator, train_tokenizer
from titok.training.folder import CHECKPOINT, RunFolder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
VIT = ViTConfig(16, 1, 2, 8)
NAMES = ["a.png", "cats/b.png", "c.jpg", "d.png"]


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Other bytes, other JSON in the metadata, or other tensors."""
    choice = rng.random()
    if choice < 0.4:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if choice < 0.7:
        metadata = header["__metadata__"]
        key = rng.choice(list(metadata))
        metadata[key] = (
            mutate_json(rng, metadata[key]) if rng.random() < 0.9 else rng.choice(["", "{", "[" * 10**5])
        )
    elif choice < 0.8:
        header = json.loads(mutate_json(rng, json.dumps(header)))
    else:
        return with_another_tensor(rng, data, header["__metadata__"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def with_another_tensor(rng: random.Random, data: bytes, metadata: dict[str, str]) -> bytes:
    tensors = load(data)
    name = rng.choice(list(tensors))
    match rng.randrange(4):
        case 0:
            del tensors[name]
        case 1:
            kind = rng.choice(
                [torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64, torch.float8_e5m2]
            )
            tensors[name] = tensors[name].to(kind)
        case 2:
            tensors[name] = rng.choice([torch.zeros(()), torch.zeros(0), torch.zeros(2, 3), torch.ones(4, 3, 1)])
        case 3:
            tensors[rng.choice(["extra", f"{name}/x", "optimizer/x/step", "other/used"])] = tensors.pop(name)
    if "training" in metadata and rng.random() < 0.8:
        info = json.loads(metadata["training"])
        metadata["training"] = json.dumps({**info, "checksum": checkpoint._checksum(tensors)})
    return save(tensors, metadata)


@pytest.mark.parametrize("kind", ["fsq", "vae"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_of_tokens(suffix: str, kind: str, tmp_path: Path) -> None:
    bottleneck: Any = {"bottleneck": "vae"} if kind == "vae" else {}
    config = TokenizerConfig(
        16, VIT, VIT, num_latent_tokens=3, code_dim=4, codebook_size=8, channels=1, **bottleneck
    )
    tokenizer = TiTok(config)
    path = tmp_path / f"tokens{suffix}"
    write_tokens(
        path, torch.randn(4, 3, 4) if kind == "vae" else torch.arange(12).view(4, 3) % 8, NAMES, tokenizer
    )
    original = path.read_bytes()
    mutate = mutate_npz if suffix == ".npz" else mutate_safetensors
    for seed in range(COUNT // 2):
        path.write_bytes(mutate(random.Random(seed), original))
        with one_clear_line_or_success(seed, tmp_path):
            tokens, names, _ = read_tokens(path, tokenizer)
            assert len(tokens) == len(names)
            with contextlib.suppress(ValueError):  # its message names a picture instead of the file
                png_names(names)


def test_sets_of_pictures(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.arange(4))
    original = path.read_bytes()
    for seed in range(COUNT):
        path.write_bytes(mutate_npz(random.Random(seed), original))
        with one_clear_line_or_success(seed, tmp_path):
            read_arrays(path, ["arr_0", "arr_1"])


def tokenizer_run(out: Path) -> None:
    model = TokenizerConfig(16, VIT, VIT, num_latent_tokens=4, code_dim=4, codebook_size=16, channels=1)
    config = TokenizerTraining(model=model, steps=6, batch_size=4, warmup_steps=1, checkpoint_every=3, log_every=1)
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    train_tokenizer(images, config, out, resume=True, progress=False)


def generator_run(out: Path) -> None:
    model = GeneratorConfig(4, 16, num_classes=3, width=16, layers=1, heads=2, mlp_width=32)
    config = GeneratorTraining(model=model, steps=6, batch_size=4, warmup_steps=1, checkpoint_every=3, log_every=1)
    tokens = torch.randint(0, 16, (8, 4), generator=torch.Generator().manual_seed(0))
    train_generator(tokens, torch.arange(8) % 3, config, out, resume=True, progress=False)


@pytest.mark.parametrize("train", [tokenizer_run, generator_run])
def test_checkpoints_of_training(
    train: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes on to the end of the run, or is named."""
    path = tmp_path / CHECKPOINT
    saved: list[bytes] = []
    save_run = run.Run.save
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", lambda self: save_run(self) or saved.append(path.read_bytes()))
        train(tmp_path)
    for seed in range(COUNT // 2):
        path.write_bytes(mutate_safetensors(random.Random(seed), saved[0]))
        with one_clear_line_or_success(seed, tmp_path):
            train(tmp_path)
    with RunFolder(tmp_path, resume=True):
        pass  # no failure has left a lock


def test_folders_of_parts(
    tiny_tokenizer: Callable[..., Any],
    tiny_generator: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A damaged part is made again; damaged settings are named, or those of another run are refused."""
    pipe, labels = Pipeline(tiny_tokenizer(), tiny_generator()), [0, 1, 2, 2, 1]
    monkeypatch.setattr("titok.checkpoints.writing.flush", lambda _: None)
    output, parts = tmp_path / "a.npz", tmp_path / "a.npz.parts"
    generate_set(pipe, output, labels, batch_size=2)
    want = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sample_sets._Parts, "join", lambda *_: None)
        generate_set(pipe, output, labels, batch_size=2)
    finished = shutil.copytree(parts, tmp_path / "finished")
    for seed in range(COUNT):
        rng = random.Random(seed)
        shutil.rmtree(parts, ignore_errors=True)
        shutil.copytree(finished, parts)
        output.unlink(missing_ok=True)
        target = rng.choice(sorted(parts.glob("*.*")))
        if target.suffix == ".json" and rng.random() < 0.7:
            target.write_text(mutate_json(rng, target.read_text()))
        elif target.suffix == ".u8" and rng.random() < 0.4:
            start, stop = (rng.choice([0, 1, 2, 4, 5, 10**12, 10**40]) for _ in range(2))
            target.rename(target.with_name(f"{start:012}-{stop:012}.u8"))
        else:
            target.write_bytes(mutate_bytes(rng, target.read_bytes()))
        with one_clear_line_or_success(seed, tmp_path):
            generate_set(pipe, output, labels, batch_size=2)
            assert output.read_bytes() == want, f"seed {seed}"
