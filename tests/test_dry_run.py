"""titok on GPUs that are not there (`fake_cuda`): no op may mix devices, let the host wait, or add work unnoticed.

Every test runs on two GPUs, of which `cuda:1` is not the current one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fake_cuda import Recorder, autocast, build, fake_gpus, prepared
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, TiTok, TokenizerConfig
from titok.checks import check_tokens
from titok.generation.captured import PictureDecoder, StaticDecode, is_captured
from titok.generation.decode_loop import DecodeBatch, HostInputs, _concatenated, decode
from titok.generation.request import GenerationRequest
from titok.inference import fused_linear
from titok.training.discriminator import PatchDiscriminator
from titok.training.generator import tokenize_images
from titok.training.losses import discriminator_loss, generator_loss, kl_loss, proxy_code_loss
from titok.training.masking import drop_classes, masked_token_loss, random_mask

pytest.importorskip("triton")

GPUS = pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
BF16 = torch.bfloat16
SIDES = ("encoder", "decoder")  # the transformers of a tokenizer
# The most ops and launches that give the GPU work. What lowers a count lowers its number here.
OPS_OF_A_BLOCK = 8  # four linear layers, GELU, attention, and two residual sums with their norms
OPS_OF_A_STEP = 8  # beside the blocks
OPS_BEFORE_THE_STEPS = 12  # of a run; in a captured one they come before the graph
OPS_OF_A_PICTURE = {"prepared": 129, "not prepared": 159}  # tokens to 8 bits, with one decoder layer
# TiTok-L-64 at 512 pixels. With separate launches the blocks take 1,728 of them, with fused linear layers 1,080.
OPS_OF_A_CALL = {"separate": 1919, "fused": 1271}
OPS_OF_A_FUSED_BLOCK = 5  # attention and four linear layers, with GELU or with a residual sum and its norm
# What a step must not do, because it can be done once or by the decoding step's kernel.
FORBIDDEN_IN_A_STEP = {"aten::sort", "aten::ne", "aten::zeros", "aten::zero_", "aten::fill_", "aten::full"}
OPS_OF_AN_ENCODING = 29  # pictures to tokens, with one encoder layer


@pytest.fixture(scope="module")
def configs() -> tuple[TokenizerConfig, GeneratorConfig]:
    """TiTok-L-32 with one layer in each of its transformers."""
    tokenizer, generator = TokenizerConfig.preset("titok-l-32"), GeneratorConfig.preset("titok-l-32")
    sides = {side: dataclasses.replace(getattr(tokenizer, side), layers=1) for side in SIDES}
    return dataclasses.replace(tokenizer, **sides), dataclasses.replace(generator, layers=1)


def request_for(config: GeneratorConfig, labels: list[int]) -> GenerationRequest:
    with _disable_current_modes():  # labels are on the host, where their values are known
        return GenerationRequest.checked(config, labels, seed=1, first_sample=0, sampling=None)


def host_inputs_for(generator: MaskGIT, request: GenerationRequest, tokens: Tensor | None = None) -> HostInputs:
    """The inputs of a request in pinned memory. `tokens`: real ones to start from."""
    with _disable_current_modes():
        on_host = SimpleNamespace(
            config=generator.config, mask_token=generator.mask_token, device=torch.device("cpu")
        )
        host = HostInputs.pack(on_host, request, tokens)  # type: ignore[arg-type]
    parts = [torch.empty(math.prod(shape), dtype=torch.int64) for shape in host.shapes.values()]
    return host._replace(packed=_concatenated(parts, pinned=True))


def batch_for(generator: MaskGIT, request: GenerationRequest, masked: list[int] | None = None) -> DecodeBatch:
    """The batch of a request. `masked`: how many tokens of each sample are masked at first; None: all."""
    if masked is None:
        return DecodeBatch.copied(generator, host_inputs_for(generator, request))
    with _disable_current_modes():
        tokens = torch.zeros(len(masked), generator.config.num_latent_tokens, dtype=torch.int64)
        for sample, count in zip(tokens, masked, strict=True):
            sample[:count] = generator.mask_token
    fake_tokens = torch.empty(tokens.shape, dtype=torch.int64)
    return DecodeBatch.copied(generator, host_inputs_for(generator, request, tokens), fake_tokens)


def run_loop(
    config: GeneratorConfig, device: str, masked: list[int] | None = None, *, nvcc: bool = True
) -> Recorder:
    with fake_gpus(nvcc=nvcc) as recorder, torch.no_grad():
        generator = build(lambda: MaskGIT(config), device, BF16)
        request = request_for(config, [1, 2, 2, 7])
        recorder.clear()
        batch = batch_for(generator, request, masked)
        recorder.expect_at_most(OPS_BEFORE_THE_STEPS)
        recorder.device_ops = []
        tokens = decode(generator, request.sampling, batch)
        assert not FORBIDDEN_IN_A_STEP & set(recorder.device_ops), recorder.device_ops
        assert (tokens.shape, str(tokens.device)) == ((4, config.num_latent_tokens), device)
    return recorder


@GPUS
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_the_decoding_loop(device: str, architecture: str, configs: Any) -> None:
    """One copy from the host, no wait, and no more work than the ceilings say."""
    found = []
    for layers in (2, 4):
        config = dataclasses.replace(configs[1], architecture=architecture, layers=layers)
        recorder = run_loop(config, device)
        assert recorder.findings == []
        assert recorder.host_copies == 1
        assert recorder.backends["masked_attention"] == recorder.backends["add_layer_norm"] == "triton"
        assert recorder.backends["maskgit_decode_step"] == "cuda"
        found.append(Counter(recorder.device_ops))
    steps = config.sampling.steps
    of_two_blocks = found[1] - found[0]
    if architecture == "vit":
        assert of_two_blocks.total() <= 2 * steps * OPS_OF_A_BLOCK, of_two_blocks
        others = found[0] - of_two_blocks
        assert others.total() <= steps * OPS_OF_A_STEP, others


@GPUS
@pytest.mark.slow
def test_the_decoding_loop_from_tokens(device: str, configs: Any) -> None:
    """Samples that start with different numbers of masked tokens: their counts are copied before the first step."""
    recorder = run_loop(configs[1], device, masked=[20, 32, 5, 1])
    assert recorder.findings == []
    assert recorder.host_copies == 1
    recorder.expect_at_most(configs[1].sampling.steps * (OPS_OF_A_BLOCK + OPS_OF_A_STEP + 1))


@GPUS
def test_between_two_runs_of_a_graph(device: str, configs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy from pinned memory prepares the next run, and the host goes on while the GPU computes."""
    monkeypatch.setattr(StaticDecode, "_padded_inputs", lambda self, *arguments: host_inputs_for(*arguments))
    monkeypatch.setattr(StaticDecode, "_compute", lambda self, generator: self._buffers.tokens)
    with fake_gpus() as recorder, torch.no_grad():
        generator = build(lambda: MaskGIT(configs[1]), device, BF16)
        request = request_for(configs[1], [1, 2, 2, 7])
        static = StaticDecode(generator, request, 4, 3)
        recorder.clear()
        static.run(generator, request)
    assert recorder.findings == []
    assert recorder.device_ops == ["aten::copy_"]
    assert recorder.host_copies == 1


@GPUS
@pytest.mark.slow
def test_without_nvcc_triton_decodes(device: str, configs: Any) -> None:
    recorder = run_loop(configs[1], device, nvcc=False)
    assert recorder.findings == []
    assert recorder.backends["maskgit_decode_step"] == "triton"
    ops_of_a_step = OPS_OF_A_BLOCK + OPS_OF_A_STEP + 1  # two launches decode, rather than one
    recorder.expect_at_most(configs[1].sampling.steps * ops_of_a_step)


@pytest.mark.slow
def test_without_nvcc_and_triton_the_loop_would_wait_and_is_not_captured(configs: Any) -> None:
    with fake_gpus(nvcc=False, triton=False) as recorder, torch.no_grad():
        generator = build(lambda: MaskGIT(configs[1]), "cuda:1", BF16)
        request = request_for(configs[1], [1])
        assert not is_captured(generator, request)
        recorder.clear()
        with pytest.raises(Exception):  # noqa: B017 (of PyTorch's choice: nothing is known of the result)
            decode(generator, request.sampling, batch_for(generator, request))
    assert any("from cuda:1 to cpu" in finding for finding in recorder.findings), recorder.findings
    for options in ({}, {"nvcc": False}):
        with fake_gpus(**options):
            assert is_captured(generator, request)


@GPUS
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["prepared", "not prepared"])
def test_tokens_to_pictures(device: str, weights: str, configs: Any) -> None:
    """All maps are channels-last."""
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(lambda: TiTok(configs[0]), device, BF16)
        with prepared(tokenizer) if weights == "prepared" else contextlib.nullcontext():
            recorder.clear()
            pictures = PictureDecoder(tokenizer, "nearest")(torch.empty(4, 32, dtype=torch.int64, device=device))
        assert (pictures.shape, pictures.dtype) == ((4, 256, 256, 3), torch.uint8)
        assert str(pictures.device) == device
    assert recorder.findings == []
    assert recorder.backends["group_norm_silu"] == recorder.backends["code_mixture"] == "triton"
    recorder.expect_at_most(OPS_OF_A_PICTURE[weights])


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["separate", "fused"])
def test_a_whole_call(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels to pictures at batch 1, as one graph: TiTok-L-64 at 512 pixels, of whose blocks one of 24 is traced."""
    if linear == "fused":
        monkeypatch.setattr(fused_linear, "LINEAR_GELU_LAYERS", {(768, 3072): 1 << 30, (1024, 4096): 1 << 30})
        layers_of_a_sum = frozenset({(768, 768), (3072, 768), (1024, 1024), (4096, 1024)})
        monkeypatch.setattr(fused_linear, "LINEAR_ADD_NORM_LAYERS", layers_of_a_sum)
    ops_of_a_block = OPS_OF_A_FUSED_BLOCK if linear == "fused" else OPS_OF_A_BLOCK
    generator_config = GeneratorConfig.preset("titok-l-64-512")
    tokenizer_config = TokenizerConfig.preset("titok-l-64-512")
    steps, layers = generator_config.sampling.steps, (generator_config.layers, tokenizer_config.decoder.layers)
    one_layer = {name: dataclasses.replace(getattr(tokenizer_config, name), layers=1) for name in SIDES}
    with fake_gpus() as recorder, torch.no_grad():
        generator = build(lambda: MaskGIT(dataclasses.replace(generator_config, layers=1)), "cuda:0", BF16)
        tokenizer = build(lambda: TiTok(dataclasses.replace(tokenizer_config, **one_layer)), "cuda:0", BF16)
        batch = batch_for(generator, request := request_for(generator_config, [1]))
        counters = fused_linear.new_counters(generator.device)
        with prepared(tokenizer), fused_linear.counters(counters):
            recorder.clear()
            pictures = PictureDecoder(tokenizer, "nearest")(decode(generator, request.sampling, batch))
        assert pictures.shape == (1, 512, 512, 3)
    assert recorder.findings == []
    of_other_blocks = ops_of_a_block * (steps * (layers[0] - 1) + layers[1] - 1)
    recorder.expect_at_most(OPS_OF_A_CALL[linear], others=of_other_blocks)


@GPUS
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_pictures_to_tokens(device: str, dtype: torch.dtype, configs: Any) -> None:
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(lambda: TiTok(configs[0]), device, dtype)
        recorder.clear()
        tokens = tokenizer.encode(torch.empty(4, 3, 256, 256, device=device))
        assert (tokens.shape, tokens.dtype, str(tokens.device)) == ((4, 32), torch.int64, device)
    assert recorder.findings == []
    assert recorder.backends["nearest_codebook"] == "triton"
    recorder.expect_at_most(OPS_OF_AN_ENCODING)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["titok-s-128", "titok-b-128-512", "titok-bl-64-vq8k", "titok-bl-64-vae-c16"])
def test_every_kind_of_tokenizer(preset: str) -> None:
    """With one layer in each of its transformers: pictures to tokens or latents, and back."""
    device = "cuda:1"
    config = TokenizerConfig.preset(preset)
    sides = {side: dataclasses.replace(getattr(config, side), layers=1) for side in SIDES}
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(lambda: TiTok(dataclasses.replace(config, **sides)), device, BF16)
        recorder.clear()
        codes = tokenizer.encode(torch.empty(2, 3, *config.image_size, device=device))
        pictures = tokenizer.decode(codes)
        assert (str(codes.device), str(pictures.device)) == (device, device)
        assert pictures.shape == (2, 3, *config.image_size)
    assert recorder.findings == []


@pytest.mark.slow
def test_the_two_dimensional_tokenizer() -> None:
    device = "cuda:1"
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(MaskGITVQGAN, device, torch.float32)
        recorder.clear()
        codes = tokenizer.encode(torch.empty(2, 3, 256, 256, device=device))
        assert tokenizer.decode(codes).shape == (2, 3, 256, 256)
    assert recorder.findings == []


@pytest.mark.slow
def test_encoding_a_data_set(configs: Any) -> None:
    """The images of a batch are copied to the GPU and their tokens back; nothing else makes the host wait."""
    device = "cuda:1"
    with fake_gpus() as recorder:
        tokenizer = build(lambda: TiTok(configs[0]), device, torch.float32)
        recorder.clear()
        images = torch.empty(3, 3, 256, 256)
        tokens = tokenize_images(tokenizer, images, batch_size=2, flip=True, shifts=[(1, -2), (0, 0)])
        assert (tokens.shape, str(tokens.device)) == ((3, 4, 32), "cpu")
    copies = Counter(finding.partition(": the host waits")[0] for finding in recorder.findings)
    assert copies == {
        "a copy (2, 3, 256, 256) from cpu to cuda:1": 1,
        "a copy (1, 3, 256, 256) from cpu to cuda:1": 1,
        "a copy (2, 32) from cuda:1 to cpu": 4,
        "a copy (1, 32) from cuda:1 to cpu": 4,
    }


PRECISIONS = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def as_trained(precision: str) -> contextlib.AbstractContextManager[None]:
    """The networks of a training run compute in bfloat16 under autocast."""
    return autocast() if precision == "bfloat16" else contextlib.nullcontext()


@GPUS
@pytest.mark.slow
@PRECISIONS
def test_the_loss_of_generator_training(precision: str, device: str, configs: Any) -> None:
    with fake_gpus() as recorder, torch.no_grad():
        model = build(lambda: MaskGIT(configs[1]), device, torch.float32)
        recorder.clear()
        targets = check_tokens(torch.empty(8, 32, dtype=torch.int64, device=device), 32, 4096)
        uniform = torch.empty(8, 34, device=device)
        classes = torch.empty(8, dtype=torch.int64, device=device)
        classes = drop_classes(classes, model.no_class, uniform[:, 0], 0.1)
        mask = random_mask(uniform[:, 1], uniform[:, 2:])
        with as_trained(precision):
            logits = model(targets.masked_fill(mask, model.mask_token), classes)
        assert logits.dtype == getattr(torch, precision)
        loss, _ = masked_token_loss(logits, targets, mask, label_smoothing=0.1, unmasked_weight=0.0)
        assert str(loss.device) == device
    assert recorder.findings == []


@pytest.mark.slow
@PRECISIONS
@pytest.mark.parametrize("preset", ["titok-bl-64-vq8k", "titok-bl-64-vae-c16"])
def test_the_losses_of_tokenizer_training(preset: str, precision: str) -> None:
    """Of a vector-quantised tokenizer and of a VAE, and of the discriminator."""
    device = "cuda:1"
    config = TokenizerConfig.preset(preset)
    sides = {side: dataclasses.replace(getattr(config, side), layers=1) for side in SIDES}
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(lambda: TiTok(dataclasses.replace(config, **sides)), device, torch.float32)
        discriminator = build(PatchDiscriminator, device, torch.float32)
        recorder.clear()
        images = torch.empty(2, 3, 256, 256, device=device)
        with as_trained(precision):
            reconstruction, bottleneck = tokenizer(images)
            term = bottleneck.loss if config.bottleneck == "vq" else kl_loss(bottleneck)
            loss, _ = generator_loss(
                reconstruction, images, step=1, bottleneck=term, perceptual_weight=0.0,
                discriminator=discriminator, adversarial_start=0,
            )  # fmt: skip
            judged, _ = discriminator_loss(discriminator, reconstruction, images)
        assert {str(t.device) for t in (loss, judged)} == {device}
        assert {t.dtype for t in (loss, judged)} == {torch.float32}
    # The discriminator computes in PyTorch's default layout, which the layers of titok's models do not.
    assert [f for f in recorder.findings if "not channels-last <- " not in f or "discriminator.py" not in f] == []


@pytest.mark.slow
@PRECISIONS
def test_the_loss_of_stage_one(precision: str, configs: Any) -> None:
    """A tokenizer with the head "proxy" predicts the codes of a MaskGIT-VQGAN."""
    device = "cuda:1"
    with fake_gpus() as recorder, torch.no_grad():
        tokenizer = build(lambda: TiTok(configs[0]), device, torch.float32)
        proxy = build(MaskGITVQGAN, device, torch.float32)
        recorder.clear()
        images = torch.empty(2, 3, 256, 256, device=device)
        codes = proxy.encode(images)
        with as_trained(precision):
            vectors = tokenizer.quantizer(tokenizer.encode_latents(images)).quantized
            logits = tokenizer.decoder(vectors.to(tokenizer.dtype))
            loss = proxy_code_loss(logits.float(), codes)
        assert str(loss.device) == device
    assert recorder.findings == []
