"""The fast path: results of the plain one, prepared weights that follow the parameters, memory that is kept.

This file is longer than 400 lines because all its tests share models that are slow to make.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.as_published import AsPublished
from titok import (
    GeneratorConfig,
    MaskGIT,
    Pipeline,
    TiTok,
    TokenizerConfig,
    ViTConfig,
    VQGANConfig,
    engine,
    sample_tokens,
)
from titok.generation.captured import PictureDecoder, decode_captured
from titok.generation.request import GenerationRequest
from titok.inference import onednn, prepared
from titok.inference.cuda_graphs import GraphCache
from titok.inference.memory import _glibc
from titok.inference.prepared import PreparedWeight
from titok.models import vqgan
from titok.models.layers import Conv3x3, Linear, UpsampleConv
from titok.ops import last_backends

VIT = ViTConfig(384, 2, 6, 16)  # wide enough for packed weights


def tokenizer(shortcut_of_result: bool = True, seed: int = 0) -> TiTok:
    torch.manual_seed(seed)
    proxy = VQGANConfig(
        hidden_channels=64,
        channel_multipliers=(1, 2, 4),
        blocks_per_level=2,
        codebook_size=48,
        code_dim=32,
        shortcut_of_result=shortcut_of_result,
    )
    config = TokenizerConfig(
        image_size=(64, 96),
        encoder=VIT,
        decoder=VIT,
        num_latent_tokens=8,
        code_dim=12,
        codebook_size=64,
        head="proxy",
        proxy=proxy,
        pixel_decoder=True,
    )
    model = TiTok(config).eval()
    with torch.no_grad():
        model.pixel_codebook.normal_()
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))  # fresh norms and biases are 0 or 1 and would hide mistakes
    return model


def generator() -> MaskGIT:
    torch.manual_seed(1)
    model = MaskGIT(GeneratorConfig(8, 64, num_classes=10, width=384, layers=2, heads=6, mlp_width=1536)).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


TOKENS = torch.arange(24).view(3, 8) * 37 % 64


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


# ---------------------------------------------------------------------------------------------------------------
# Same results


@pytest.mark.slow
@pytest.mark.parametrize("shortcut_of_result", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_pictures_are_those_of_the_plain_path(
    dtype: torch.dtype, tolerance: float, shortcut_of_result: bool
) -> None:
    model = tokenizer(shortcut_of_result).to(dtype)
    with torch.no_grad():
        fast = model.decode(TOKENS)
        with engine.plain():
            plain = model.decode(TOKENS)
    differentiable = model.decode(TOKENS)
    assert differentiable.requires_grad
    assert relative(fast, plain.double()) < tolerance
    assert relative(differentiable.detach(), plain.double()) < tolerance


def test_tokens_are_those_of_the_plain_path() -> None:
    model, coder = generator(), tokenizer()
    labels, images = [1, 3, 3, 9], torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        fast, coded = sample_tokens(model, labels, seed=4), coder.encode(images)
        with engine.plain():
            assert torch.equal(sample_tokens(model, labels, seed=4), fast)
            assert torch.equal(coder.encode(images), coded)
    assert len(fast.unique()) > 5


@pytest.mark.slow
def test_bfloat16_is_no_less_exact_than_as_published() -> None:
    model, tokens = tokenizer().bfloat16(), TOKENS
    exact = copy.deepcopy(model).double()
    published = AsPublished(model, generator().bfloat16())
    with torch.no_grad():
        logits = exact.decode_logits(tokens)
        error = relative(model.decode_logits(tokens), logits)
        assert error < 1.05 * relative(published.logits(tokens), logits)
        pixels = exact.decode_pixels(logits.movedim(1, -1))
        ours = relative(model.decode_pixels(logits.movedim(1, -1).bfloat16()), pixels)
        assert ours < 1.05 * relative(published.pixels(logits.bfloat16()), pixels)
    assert 1e-4 < error < 0.05  # the model did compute in bfloat16


@pytest.mark.slow
def test_the_decoder_takes_images_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer().double()
    sizes = []
    decode = model.pixel_decoder._decode
    monkeypatch.setattr(model.pixel_decoder, "_decode", lambda codes: sizes.append(len(codes)) or decode(codes))
    with torch.no_grad():
        at_once = model.decode(TOKENS)
        monkeypatch.setattr(vqgan, "_MAX_MAP_BYTES_CPU", 2 * 64 * 96 * 64 * 8)
        assert torch.allclose(model.decode(TOKENS), at_once, rtol=1e-12)
        assert model.decode(TOKENS[:0]).shape == (0, 3, 64, 96)
    assert sizes == [3, 2, 1, 0]


def test_one_graph_ends_in_pictures() -> None:
    """Without a GPU the buffers are tested uncaptured."""
    pipe = Pipeline(tokenizer(), generator())
    labels = torch.tensor([2, 2, 5])
    with torch.no_grad():
        config = pipe.generator.config
        request = GenerationRequest.checked(config, labels, seed=3, first_sample=7, sampling=None)
        pictures = PictureDecoder(pipe.tokenizer, "nearest")
        got = decode_captured(pipe.generator, request, GraphCache(), pictures, capture=False)
    want = pipe(labels, seed=3, first_sample=7)
    assert got.shape == want.shape == (3, 64, 96, 3)
    assert (got.int() - want.int()).abs().max() <= 1  # another batch size may round differently


# ---------------------------------------------------------------------------------------------------------------
# Which implementation runs


def calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    called: list[str] = []
    for name in names:
        was = getattr(onednn, name)
        monkeypatch.setattr(onednn, name, lambda *a, was=was, name=name: called.append(name) or was(*a))
    return called


@pytest.mark.slow
@pytest.mark.skipif(not onednn.available(torch.ones(1)), reason="this PyTorch has not oneDNN's ops")
def test_inference_on_a_cpu_runs_onednn_on_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    called = calls(monkeypatch, "packed_linear", "pack_linear", "pack_conv")
    model = tokenizer()
    with torch.no_grad():
        model.decode(TOKENS)
        assert {"packed_linear", "pack_linear", "pack_conv"} <= set(called)
        products = called.count("packed_linear")
        called.clear()
        model.decode(TOKENS)
        assert set(called) == {"packed_linear"}  # the packed weights are kept
        assert (
            called.count("packed_linear") == products - 1
        )  # that of the tokens which are the same in every image
        called.clear()
        with engine.plain():
            model.decode(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            model.decode(TOKENS)
        model.double().decode(TOKENS)
    model.float().decode(TOKENS)
    assert called == []


def test_the_plain_engine_runs_plain_pytorch() -> None:
    pipe = Pipeline(tokenizer(), generator(), engine="plain")
    pipe([1])
    used = ("group_norm_silu", "add_layer_norm", "masked_attention", "maskgit_decode_step", "code_mixture")
    assert {name: last_backends()[name] for name in used} == dict.fromkeys(used, "plain")


def test_stats() -> None:
    pipe = Pipeline(tokenizer(), generator())
    assert pipe.stats()["seconds"] == {}
    pipe([1, 2])
    stats = pipe.stats()
    assert list(stats["seconds"]) == ["generator", "decoder", "pixel decoder", "to 8 bits"]
    assert all(0 < seconds < 60 for seconds in stats["seconds"].values())
    assert stats["backends"]["group_norm_silu"] in ("cpp", "plain")


def test_unknown_engine() -> None:
    with pytest.raises(ValueError, match="engine: expected 'fast' or 'plain', got 'turbo'"):
        Pipeline(tokenizer(), generator(), engine="turbo")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# Prepared weights


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (
        lambda: Linear(384, 512),
        lambda m, x: F.linear(x, m.weight.double(), m.bias.double()),
        (5, 384),
    ),
    "convolution": (
        lambda: Conv3x3(32, 64, bias=True),
        lambda m, x: F.conv2d(x, m.weight.double(), m.bias.double(), padding=1),
        (1, 32, 6, 7),
    ),
    "upsampling": (
        lambda: UpsampleConv(32),
        lambda m, x: F.conv2d(F.interpolate(x, scale_factor=2.0), m.weight.double(), m.bias.double(), padding=1),
        (2, 32, 3, 5),
    ),
}
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "optimizer's step": lambda m: m.weight.mul_(1.5),
    "through .data": lambda m: m.weight.data.mul_(1.5),
    "average through .data": lambda m: m.weight.data.lerp_(torch.randn_like(m.weight), 0.01),
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: -v for k, v in m.state_dict().items()}, assign=True),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight + 1)),
    "there and back to float64": lambda m: m.double().float().weight.data.neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_changed_weights_are_noticed(kind: str, change: str) -> None:
    torch.manual_seed(0)
    make, oracle, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        before = layer(x)
        assert relative(before, oracle(layer, x.double())) < 1e-6
        CHANGES[change](layer)
        assert relative(layer(x), oracle(layer, x.double())) < 1e-6
        assert relative(layer(x), before.double()) > 1e-3


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_and_pickles_leave_prepared_weights_behind(kind: str) -> None:
    make, _, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    with torch.no_grad():
        want = layer(x)
        assert list(layer.state_dict()) == ["weight", "bias"]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            held = [v for v in vars(other).values() if isinstance(v, PreparedWeight)]
            assert held
            assert all(prepared_weight._kept is None for prepared_weight in held)
            assert torch.allclose(other(x), want, rtol=1e-5, atol=1e-6)


def test_inference_tensors_and_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = Linear(384, 512), torch.randn(3, 384)  # PyTorch counts no versions of these weights
        assert relative(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < 1e-6
        layer.weight.neg_()
        assert relative(layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < 1e-6


def test_gelu_behind_a_linear_layer() -> None:
    torch.manual_seed(0)
    for layer in (Linear(384, 512), Linear(8, 16), Linear(384, 512).bfloat16()):
        x = torch.randn(2, 7, layer.in_features, dtype=layer.weight.dtype)
        exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
        with torch.no_grad():
            assert relative(layer(x, gelu=True), exact) < (3e-3 if x.dtype == torch.bfloat16 else 1e-6)
        assert torch.equal(layer(x, gelu=True), F.gelu(layer(x)))  # with gradients


# ---------------------------------------------------------------------------------------------------------------
# bfloat16 on a CPU without instructions for it


def test_emulated_bfloat16_is_replaced_by_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "bfloat16_is_native", lambda: False)
    coder, model = tokenizer().bfloat16(), generator().bfloat16()
    exact = copy.deepcopy(coder).double()
    with torch.no_grad():
        images = coder.decode(TOKENS)
        assert images.dtype == torch.bfloat16
        assert relative(images, exact.decode(TOKENS)) < 2.5e-3  # rounded once, at the end
        coder.decoder.embed.weight.data.mul_(3)
        exact.decoder.embed.weight.data.mul_(3)
        assert relative(coder.decode(TOKENS), exact.decode(TOKENS)) < 2.5e-3
        assert coder.encode(torch.rand(1, 3, 64, 96)).shape == (1, 8)
        with engine.plain():
            assert relative(coder.decode(TOKENS), exact.decode(TOKENS)) > 2.5e-3  # every layer rounds to bfloat16
    assert Pipeline(coder, model)([1, 2]).shape == (2, 64, 96, 3)


def test_the_float32_copy_belongs_to_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "bfloat16_is_native", lambda: False)
    model = Linear(4, 4).bfloat16()
    names, owned = list(model.state_dict()), prepared.Float32Copy()
    model.float32_copy = owned
    with torch.no_grad():
        float32 = owned.of(model)
        assert float32.weight.dtype == torch.float32
        assert owned.of(model) is float32
        assert float32.float32_copy is not owned
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.float32_copy._copy._kept is None
        model.weight.mul_(2)
        assert torch.equal(owned.of(model).weight, model.weight.float())
        with engine.plain():
            assert owned.of(model) is model
    assert owned.of(model) is model, "gradients are on"
    assert list(model.state_dict()) == names
    for kind in (tokenizer(), generator()):
        assert isinstance(kind.float32_copy, prepared.Float32Copy)


def test_prepared_weights_are_shared_between_threads() -> None:
    """Threads that pass different keys each get the value of their own key."""
    weight, made = torch.ones(4), PreparedWeight()
    wrong: list[tuple[int, int]] = []

    def use(key: int) -> None:
        for _ in range(300):
            got = made.get(lambda: key, weight, key=key)
            if got != key:
                wrong.append((got, key))

    threads = [threading.Thread(target=use, args=(key,)) for key in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_bfloat16_with_onednn_held_to_avx2() -> None:
    program = (
        "import torch, test_engine as t; from titok.inference import prepared;"
        "assert not prepared.bfloat16_is_native();"
        "m = t.tokenizer().bfloat16(); e = t.copy.deepcopy(m).double();\n"
        "with torch.no_grad(): assert t.relative(m.decode(t.TOKENS), e.decode(t.TOKENS)) < 2.5e-3"
    )
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "TITOK_CPU_ISA": "avx2"}
    here = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=240)


# ---------------------------------------------------------------------------------------------------------------
# Memory


FAULTS = """
import resource
import torch
from titok import engine
from titok.inference.memory import memory_that_stays

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / (64 << 20)

torch.set_grad_enabled(False)
print(faults())
with memory_that_stays():
    for _ in range(10):  # until the heap has a free block of this size
        faults()
    with memory_that_stays():
        pass  # the end of an inner context must not end the outer one
    print(sum(faults() for _ in range(10)) / 10)
with memory_that_stays():
    print(sum(faults() for _ in range(10)) / 10)  # the next context finds the memory of the last one
engine.release_memory()
with memory_that_stays():
    print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(_glibc() is None, reason="needs glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_memory_stays_within_and_goes_when_released(kept: bool) -> None:
    """Counts page faults in a fresh process: the share of a 64 MiB tensor that is new memory from the system."""
    env = os.environ | {"TITOK_KEEP_HEAP": str(int(kept)), "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, check=True, capture_output=True, timeout=240)
    shares = [float(x) for x in done.stdout.split()]
    assert [share > 0.5 for share in shares] == [True, not kept, not kept, True]
