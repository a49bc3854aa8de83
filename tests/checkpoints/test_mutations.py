"""Damaged checkpoints: each loads, or gives one line that names the file. `TITOK_MUTATIONS` sets how many are tried."""

from __future__ import annotations

import copy
import json
import os
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = int(os.environ.get("TITOK_MUTATIONS", "200"))
VIT = ViTConfig(16, 1, 2, 8)
MODELS: list[tuple[Any, Any]] = [
    (TiTok, TokenizerConfig(16, VIT, VIT, num_latent_tokens=3, code_dim=4, codebook_size=8, channels=1)),
    (MaskGIT, GeneratorConfig(3, 8, num_classes=2, width=16, layers=2, heads=2, mlp_width=32)),
]
OFFICIAL = {
    "model": {
        "vq_model": {"codebook_size": 8, "num_latent_tokens": 3, "token_size": 4, "vit_enc_model_size": "small"},
        "generator": {"model_type": "ViT", "hidden_size": 16, "image_seq_len": 3, "condition_num_classes": 2},
    },
    "dataset": {"preprocessing": {"crop_size": 16}},
}
VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**6, 10**8, 10**30, 0.5, 1e400, float("nan"), "", "text", "\n", [], {}, [[]], [0],
    {"a": None}, "x" * 10_000, [1] * 1000,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within JSON, as a container and a key."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def mutate_json(rng: random.Random, text: str) -> str:
    value = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(places(value))
        if rng.random() < 0.2:
            del container[key]
        elif isinstance(container, dict) and rng.random() < 0.2:
            container[rng.choice(["extra", "", "format"])] = copy.deepcopy(rng.choice(VALUES))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            return bytes(changed[: rng.randrange(len(changed))])
        case 1:
            start = rng.randrange(len(changed))
            del changed[start : start + rng.randint(1, 64)]
        case 2:  # near the beginning, where the headers are
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(min(len(changed), 600))] = rng.randrange(256)
        case 3:
            for _ in range(rng.randint(1, 32)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.slow
def test_damaged_checkpoints_give_one_clear_line(tmp_path: Path) -> None:
    config, safe, pickled = (tmp_path / n for n in ("config.json", "model.safetensors", "pytorch_model.bin"))
    originals = []
    for kind, settings in MODELS:
        model = kind(settings)
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), pickled)
        originals.append((kind, config.read_text(), safe.read_bytes(), pickled.read_bytes()))
    for seed in range(COUNT):
        rng = random.Random(seed)
        kind, text, safe_bytes, pickled_bytes = rng.choice(originals)
        target = rng.choice([config, config, safe, pickled])
        config.write_text(text)
        safe.write_bytes(safe_bytes)
        pickled.write_bytes(pickled_bytes)
        if target == config and rng.random() < 0.7:
            config.write_text(mutate_json(rng, json.dumps(OFFICIAL) if rng.random() < 0.4 else text))
        else:
            target.write_bytes(mutate_bytes(rng, target.read_bytes()))
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # weights that are not finite
                kind.from_pretrained(tmp_path if target != pickled else pickled)
        except ValueError as error:
            message = str(error)
            assert "\n" not in message, f"seed {seed}: {message}"
            assert str(tmp_path) in message, f"seed {seed}: {message}"
            assert "weights_only" not in message, f"seed {seed}: {message}"
            assert len(message) < 4000, f"seed {seed}: {message}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - began < 5, f"seed {seed} took long"  # far less on a machine that is idle
