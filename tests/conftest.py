"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before any import of one


def _widen_bfloat16_dots() -> None:
    """Triton's interpreter keeps bfloat16 as its 16 bits and multiplies them as integers (3.6 to 3.9): widen first."""
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    import numpy as np
    import triton.language as tl

    create_dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = patched


_widen_bfloat16_dots()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of 4 tokens of 16 codes for 16x24 pictures; keywords change its configuration. Its weights
    are random, but other pictures get other tokens: its codes are latents of random pictures."""
    from titok import TiTok, TokenizerConfig, ViTConfig

    def make(seed: int = 0, **change: Any) -> TiTok:
        vit = ViTConfig(width=32, layers=1, heads=2, patch_size=8)
        base = {"image_size": (16, 24), "num_latent_tokens": 4, "code_dim": 4, "codebook_size": 16}
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = TiTok(TokenizerConfig(**{**base, "encoder": vit, "decoder": vit, **change})).eval()
            if model.quantizer is not None:
                for p in model.encoder.patch_embed.parameters():
                    p *= 4
                codes = model.config.codebook_size
                noise = torch.rand(codes, model.config.channels, *model.config.image_size)
                latents = model.encode_latents(noise).flatten(0, 1)
                model.quantizer.codebook.copy_(latents[torch.randperm(len(latents))[:codes]])
        return model

    return make


@pytest.fixture(scope="session")
def tiny_generator() -> Callable[..., Any]:
    """Makes a generator of 3 classes that fits `tiny_tokenizer`; keywords change its configuration."""
    from titok import GeneratorConfig, MaskGIT

    def make(seed: int = 0, **change: Any) -> MaskGIT:
        base = {
            "num_latent_tokens": 4,
            "codebook_size": 16,
            "num_classes": 3,
            "width": 32,
            "layers": 2,
            "heads": 2,
        }
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = MaskGIT(GeneratorConfig(**{**base, "mlp_width": 64, **change})).eval()
            for p in model.parameters():  # the usual 0.02 gives flat logits: classes and tokens would not matter
                if p.ndim > 1:
                    torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        return model

    return make


@pytest.fixture(scope="session")
def models(
    tiny_tokenizer: Callable[..., Any],
    tiny_generator: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Saved: tokenizer, another, a VAE, generator."""
    folder = tmp_path_factory.mktemp("models")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_tokenizer(seed=1).save_pretrained(folder / "other")
    tiny_tokenizer(num_latent_tokens=5).save_pretrained(folder / "five_tokens")
    tiny_tokenizer(codebook_size=8).save_pretrained(folder / "eight_codes")
    tiny_tokenizer(bottleneck="vae").save_pretrained(folder / "vae")
    tiny_tokenizer(channels=1, image_size=(8, 8)).save_pretrained(folder / "grey")
    tiny_generator().save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of several sizes, two of them in sub-folders, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, shape in {"a.png": (16, 24), "b.png": (40, 33), "cats/a.png": (20, 50), "cats/old/c.jpg": (16, 24),
                        "d.bmp": (30, 30)}.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder
