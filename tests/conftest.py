"""Fixtures of several test files. Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before any module with kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _widen_bfloat16_dots() -> None:
    """Makes `tl.dot` of Triton's interpreter convert bfloat16 operands to float32.

    The interpreter of Triton 3.6 to 3.9 stores a bfloat16 as an integer of its 16 bits, and multiplies these
    integers.
    """
    try:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    import numpy as np
    import triton.language as tl

    create_dot = InterpreterBuilder.create_dot

    def to_float32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patched(self, a, b, *rest):
        return create_dot(self, to_float32(a), to_float32(b), *rest)

    InterpreterBuilder.create_dot = patched


def _patch_language_once_a_launch() -> None:
    """Makes Triton's interpreter replace the functions of `triton.language` once a launch.

    It does so again whenever a kernel calls a device function, which is a third of the time of the kernels' tests.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # another release of Triton
        return
    import triton.language as tl

    launch, patch_lang = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[bool, ...]] = set()  # which modules, in the launch that is running

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch(fn):
        modules = tuple(any(value is module for value in fn.__globals__.values()) for module in (tl, tl.core))
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch_lang(fn)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = call, patch


_widen_bfloat16_dots()
_patch_language_once_a_launch()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # a folder on the path may have that name
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Within, PyTorch computes with one thread, for tests with tensors so small that a second thread slows them
    down.

    If other processes use the cores, a second thread makes such tests many times slower, because the threads wait
    for each other after every operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def _tensors_for_triton() -> Iterator[None]:
    pytest.importorskip("triton")  # a PyTorch without CUDA does not bring it
    with torch.device("cuda") if torch.cuda.is_available() else contextlib.nullcontext():
        yield


@pytest.fixture
def triton_device() -> Iterator[None]:
    """Within, tensors are made where Triton kernels run: on the GPU, or without one on the CPU."""
    with _tensors_for_triton():
        yield


@pytest.fixture
def device_of_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Within a test whose parameter `backend` is "triton", `triton_device`; within any other test, nothing."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with _tensors_for_triton() if parameters.get("backend") == "triton" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """A function that makes a tokenizer with 4 tokens and 16 codes for 16x24 pictures.

    Keywords change its configuration. Its weights are random, and its codes are latents of random pictures, so
    that different pictures have different tokens.
    """
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
    """A function that makes a generator with 3 classes for `tiny_tokenizer`; keywords change its configuration."""
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
            # With the usual standard deviation of 0.02 the logits hardly depend on the class and the other tokens.
            for p in model.parameters():
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
    """A folder with saved models: several tokenizers, of which "vae" is a VAE, and a generator."""
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
    """A folder with five pictures of several sizes, two of them in sub-folders, and a text file."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    shapes = {
        "a.png": (16, 24),
        "b.png": (40, 33),
        "cats/a.png": (20, 50),
        "cats/old/c.jpg": (16, 24),
        "d.bmp": (30, 30),
    }
    for name, shape in shapes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder
