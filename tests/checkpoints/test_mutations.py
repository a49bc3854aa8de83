"""Damaged checkpoints: each loads, or gives one line that names the file. `TITOK_MUTATIONS` sets how many are tried."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from mutations import COUNT, mutate_bytes, mutate_json, one_clear_line_or_success
from titok import GeneratorConfig, MaskGIT, TiTok, TokenizerConfig, ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")

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
        with one_clear_line_or_success(seed, tmp_path):
            kind.from_pretrained(tmp_path if target != pickled else pickled)
