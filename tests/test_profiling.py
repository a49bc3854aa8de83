"""Ranges: named, nested, balanced, and nothing at all when off."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from titok import (
    GeneratorConfig,
    MaskGIT,
    Pipeline,
    SamplingConfig,
    TiTok,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
    profiling,
    sample_tokens,
)
from titok.ops import masked_attention
from titok.training import GeneratorTraining, train_generator


class Recorder:
    """Every range with the ranges around it, as "outer/inner", in order of opening."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.paths: list[str] = []

    def push(self, name: str) -> None:
        self.open.append(name)
        self.paths.append("/".join(self.open))

    def pop(self) -> None:
        self.open.pop()


def tiny() -> Pipeline:
    vit = ViTConfig(width=32, layers=2, heads=2, patch_size=4)
    proxy = VQGANConfig(
        hidden_channels=32, channel_multipliers=(1, 1), codebook_size=16, code_dim=8, blocks_per_level=1
    )
    config = TokenizerConfig(
        16,
        vit,
        vit,
        num_latent_tokens=4,
        code_dim=6,
        codebook_size=20,
        head="proxy",
        proxy=proxy,
        pixel_decoder=True,
    )
    generator = GeneratorConfig(4, 20, num_classes=3, width=32, layers=1, heads=2, mlp_width=32)
    return Pipeline(TiTok(config), MaskGIT(generator))


def test_generate_names_stages_steps_and_ops():
    pipe, recorder = tiny(), Recorder()
    with profiling.enabled(recorder):
        pipe([0, 1], sampling=SamplingConfig(steps=2))
    assert recorder.open == []
    assert recorder.paths[0] == "generate"
    loop = "generate/sample tokens"
    for path in (
        f"{loop}/step 0/generator/masked_attention",
        f"{loop}/step 1/generator/add_layer_norm",
        f"{loop}/step 1/maskgit_decode_step",
        "generate/detokenize/decoder/masked_attention",
        "generate/detokenize/code_mixture",
        "generate/detokenize/pixel decoder/group_norm_silu",
    ):
        assert path in recorder.paths
    assert sum(path.startswith(loop) and path.count("/") == 2 for path in recorder.paths) == 2  # two steps


def test_tokenize():
    recorder = Recorder()
    tokenizer = tiny().tokenizer
    with profiling.enabled(recorder):
        tokenizer.encode(torch.rand(1, 3, 16, 16))
    assert recorder.paths[:2] == ["tokenize", "tokenize/encoder"]
    assert recorder.paths[-1] == "tokenize/nearest_codebook"


def test_training(tmp_path):
    recorder = Recorder()
    model = GeneratorConfig(4, 20, num_classes=3, width=32, layers=1, heads=2, mlp_width=32)
    config = GeneratorTraining(model=model, steps=2, batch_size=2, warmup_steps=0)
    with profiling.enabled(recorder):
        train_generator(
            torch.zeros(4, 4, dtype=torch.int64),
            torch.zeros(4, dtype=torch.int64),
            config,
            tmp_path,
            progress=False,
        )
    assert recorder.open == []
    for step in (0, 1):
        inner = [
            path for path in recorder.paths if path.startswith(f"train step {step}/") and path.count("/") == 1
        ]
        assert inner == [f"train step {step}/{part}" for part in ("forward", "backward", "optimizer")]


def test_an_error_closes_its_ranges():
    recorder = Recorder()
    generator = tiny().generator
    with profiling.enabled(recorder):
        with pytest.raises(TypeError):
            masked_attention("no tensor", 2)
        with pytest.raises(ValueError, match="labels"):
            sample_tokens(generator, [77])
    assert recorder.open == []
    assert recorder.paths == ["masked_attention", "sample tokens"]


def test_off_by_default_and_after_the_context():
    recorder = Recorder()
    with profiling.enabled(recorder), profiling.annotate("mine", 3):
        pass
    assert recorder.paths == ["mine 3"]
    masked_attention(torch.zeros(1, 2, 12), 2)
    assert recorder.paths == ["mine 3"]
    assert isinstance(profiling.annotate("mine"), nullcontext)


def test_torch_profiler_sees_them():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        profiling.enabled(profiling.TorchProfiler()),
    ):
        masked_attention(torch.zeros(1, 2, 12), 2)
    assert "titok: masked_attention" in {event.key for event in profile.key_averages()}


def test_nvtx_package(monkeypatch):
    nvtx = pytest.importorskip("nvtx")
    calls = []
    monkeypatch.setattr(nvtx, "push_range", lambda name, domain: calls.append((name, domain)))
    monkeypatch.setattr(nvtx, "pop_range", lambda domain: calls.append(("pop", domain)))
    with profiling.enabled():
        masked_attention(torch.zeros(1, 2, 12), 2)
    assert calls == [("masked_attention", "titok"), ("pop", "titok")]


def test_nvtx_of_pytorch_where_the_package_is_missing(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch._C, "_nvtx", None, raising=False)  # a PyTorch that was built with CUDA
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with profiling.enabled():
        masked_attention(torch.zeros(1, 2, 12), 2)
    assert calls == ["titok: masked_attention", "pop"]


def test_neither_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.delattr(torch._C, "_nvtx", raising=False)
    with pytest.raises(RuntimeError, match=r"pip install 'titok-kernels\[profile\]'"), profiling.enabled():
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False)])
def test_environment_variable(value, on):
    pytest.importorskip("nvtx")
    code = "from titok import profiling; print(type(profiling._SINK.get()).__name__)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TITOK_NVTX": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == ("NVTX" if on else "NoneType")
