"""Memory of long runs: thousands of pictures take no more than the first batch.

Each run has its own process, whose peak is compared. The data of a run is many times larger than the growth that is
allowed. That growth is left to what fills up once: batches that are read ahead, and the allocator's arenas of the
threads that read or write.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig

pytestmark = pytest.mark.slow

MIB = 2**20
SIZE = 96  # a picture is 27 KiB in 8 bits, 108 KiB in float32
BATCH = 16


def peak() -> int:
    """The most memory that this process has had resident at any time, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def small_pipeline() -> Pipeline:
    vit = ViTConfig(width=32, layers=1, heads=2, patch_size=16)
    config = TokenizerConfig(
        image_size=(SIZE, SIZE), num_latent_tokens=8, code_dim=4, codebook_size=64, encoder=vit, decoder=vit
    )
    generator = GeneratorConfig(8, 64, num_classes=3, width=32, layers=1, heads=2, mlp_width=64)
    return Pipeline(TiTok(config), MaskGIT(generator))


def generate(folder: Path) -> int:
    pictures = small_pipeline().generate_many(torch.arange(1000) % 3, batch_size=BATCH)
    first = [next(pictures) for _ in range(BATCH)]
    before = peak()
    assert len(first) + sum(1 for _ in pictures) == 1000
    return peak() - before


def write_set(folder: Path) -> int:
    from titok.generation.sample_sets import generate_set

    pipe, labels = small_pipeline(), torch.arange(1000) % 3
    # Three batches are in memory at most, so four show the peak.
    generate_set(pipe, folder / "few.npz", labels[: 4 * BATCH], batch_size=BATCH)
    before = peak()
    generate_set(pipe, folder / "many.npz", labels, batch_size=BATCH)
    assert (folder / "many.npz").stat().st_size > 1000 * 3 * SIZE**2
    return peak() - before


def tokenize(folder: Path) -> int:
    from titok.data.folders import ImageFolder, read_batches

    rng = np.random.default_rng(0)
    for i in range(10_000):
        if i < 20:
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        else:
            os.link(folder / f"{i % 20}.png", folder / f"{i}.png")
    tokenizer, images = small_pipeline().tokenizer, ImageFolder(folder, SIZE)
    tokens, before = [], 0
    with torch.no_grad():
        for number, batch in enumerate(read_batches(images, torch.arange(len(images)).split(BATCH))):
            tokens.append(tokenizer.encode(batch))
            if number == 100:  # by then every reading thread has started and has its memory
                before = peak()
    assert torch.cat(tokens).shape == (10_000, 8)
    return peak() - before


@pytest.mark.parametrize(
    ("run", "allowed"),
    [
        (generate, 8 * MIB),  # the pictures take 26 MiB; measured: 2 to 4 MiB
        (write_set, 8 * MIB),
        (tokenize, 64 * MIB),  # images after the 100th batch: 880 MiB; measured: 4 MiB, 32 under load
    ],
)
def test_a_long_run_takes_no_more_memory(run: Callable[[Path], int], allowed: int, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(run, (tmp_path,)) <= allowed
