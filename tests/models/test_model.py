"""The models: shapes, gradients, dtypes, dropout, bad input. Parity is in test_parity.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, TiTok, TokenizerConfig, ViTConfig, VQGANConfig
from titok.checkpoints import quirks
from titok.models.quantizer import VectorQuantizer
from titok.models.vqgan import ResidualBlock

SMALL = ViTConfig(32, 2, 4, 8)
PROXY = VQGANConfig(
    hidden_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, codebook_size=24, code_dim=8
)


def config(**change: Any) -> TokenizerConfig:
    base: dict[str, Any] = {
        "image_size": (32, 48),
        "encoder": SMALL,
        "decoder": SMALL,
        "num_latent_tokens": 6,
        "code_dim": 12,
        "codebook_size": 64,
    }
    return TokenizerConfig(**{**base, **change})


KINDS = {
    "pixels": config(),
    "grey, signed, l2": config(channels=1, signed_pixels=True, l2_normalize=True),
    "vae": config(bottleneck="vae"),
    "other decoder patch": config(decoder=ViTConfig(48, 2, 4, 16)),
    "two-stage": config(head="proxy", proxy=PROXY, pixel_decoder=True, decoder=ViTConfig(32, 1, 4, 2)),
    "two-stage, 4x4 codes a patch": config(head="proxy", proxy=PROXY, pixel_decoder=True),
    "one token": config(num_latent_tokens=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_gradients(kind: str) -> None:
    c = KINDS[kind]
    model = TiTok(c)
    images = torch.rand(3, c.channels, 32, 48)
    tokens = model.encode(images)
    assert model.encode_latents(images).shape == (3, c.num_latent_tokens, c.code_dim)
    wide = c.bottleneck == "vae"
    assert tokens.shape == ((3, c.num_latent_tokens, c.code_dim) if wide else (3, c.num_latent_tokens))
    assert model.decode(tokens).shape == images.shape
    assert model.encode(images[:0]).shape[0] == 0
    assert model.decode(tokens[:0]).shape == (0, *images.shape[1:])
    reconstruction, bottleneck = model(images)
    extra = bottleneck.kl().mean() if wide else bottleneck.loss
    ((reconstruction - images).square().mean() + extra).backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not without_gradient


def test_a_patch_predicts_the_codes_that_it_covers() -> None:
    """Patch (i, j) of the decoder predicts the proxy codes (4i..4i+3, 4j..4j+3), row by row."""
    c = KINDS["two-stage, 4x4 codes a patch"]
    model = TiTok(c)
    predictions: list[torch.Tensor] = []
    model.decoder.head.register_forward_hook(lambda _module, _input, output: predictions.append(output))
    with torch.no_grad():
        logits = model.decode_logits(torch.zeros(1, 6, dtype=torch.int64))
    assert logits.shape == (1, 24, 16, 24)
    patches = predictions[0].view(4, 6, 4, 4, 24)  # grid of 32/8 x 48/8 patches, codes within each, logits
    for y, x in [(0, 0), (5, 11), (15, 23)]:
        assert torch.equal(logits[0, :, y, x], patches[y // 4, x // 4, y % 4, x % 4])


def test_signed_pixels_map_outside_the_networks() -> None:
    model = TiTok(KINDS["grey, signed, l2"])
    inputs: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    model.encode(torch.full((1, 1, 32, 48), 0.25))
    assert torch.equal(inputs[0], torch.full((1, 1, 32, 48), -0.5))


def test_bfloat16_model_keeps_the_codebook_in_float32(tmp_path: Any) -> None:
    TiTok(KINDS["pixels"]).save_pretrained(tmp_path)
    model = TiTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert isinstance(model.quantizer, VectorQuantizer)
    assert model.quantizer.codebook.dtype == torch.float32
    images = torch.rand(2, 3, 32, 48)
    tokens = model.encode(images)
    assert model.decode(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["vit", "uvit"])
def test_generator_shapes_and_gradients(architecture: Any) -> None:
    model = MaskGIT(
        GeneratorConfig(6, 20, num_classes=5, architecture=architecture, width=32, layers=2, heads=4, mlp_width=64)
    )
    tokens = torch.tensor([[0, 19, 20, 20, 3, 4], [20] * 6])
    logits = model(tokens, torch.tensor([0, 5]))
    assert logits.shape == (2, 6, 20)
    assert torch.allclose(model(tokens[1:])[0], logits[1], atol=1e-5) or model.training
    logits.square().sum().backward()
    without_gradient = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not without_gradient
    assert model(tokens[:0]).shape == (0, 6, 20)


def test_dropout_is_for_training_mode_alone() -> None:
    tokens, labels = torch.tensor([[0, 19, 20, 20, 3, 4]]), torch.tensor([2])
    for architecture, rate, random in (("vit", 0.3, True), ("vit", 0.0, False), ("uvit", 0.3, False)):
        config = GeneratorConfig(
            6,
            20,
            num_classes=5,
            architecture=architecture,
            width=32,
            layers=2,
            heads=4,
            mlp_width=64,
            dropout=rate,
        )  # type: ignore[arg-type]
        model = MaskGIT(config)
        assert torch.equal(model(tokens, labels), model(tokens, labels)) is not random
        model.eval()
        assert torch.equal(model(tokens, labels), model(tokens, labels))


BAD_IMAGES = [
    (torch.rand(1, 3, 32, 32), ValueError, r"images: expected shape \(B, 3, 32, 48\), got \(1, 3, 32, 32\)"),
    (torch.rand(1, 1, 32, 48), ValueError, "images: expected shape"),
    (torch.rand(3, 32, 48), ValueError, "images: expected shape"),
    (torch.zeros(1, 3, 32, 48, dtype=torch.uint8), TypeError, "images: .*got uint8"),
    (torch.full((1, 3, 32, 48), float("nan")), ValueError, r"images: expected values in \[0, 1\], got nan"),
    (torch.full((1, 3, 32, 48), -0.5), ValueError, r"images: expected values in \[0, 1\], got -0.5"),
    (torch.full((1, 3, 32, 48), 255.0), ValueError, "got 255.0"),
    ([[1.0]], TypeError, "images: expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_bad_images(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TiTok(KINDS["pixels"]).encode(images)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), ValueError, r"tokens: expected shape \(B, 6\), got \(1, 5\)"),
        (torch.full((1, 6), 64), ValueError, r"tokens: expected ids in \[0, 64\), got 64"),
        (torch.full((1, 6), -1), ValueError, "tokens: expected ids"),
        (torch.zeros(1, 6), TypeError, "tokens: expected dtype int64, got float32"),
    ],
)
def test_bad_tokens(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TiTok(KINDS["pixels"]).decode(tokens)


def test_what_a_kind_cannot_do_is_said() -> None:
    vq, vae = TiTok(KINDS["pixels"]), TiTok(KINDS["vae"])
    images = torch.rand(1, 3, 32, 48)
    with pytest.raises(ValueError, match="sample: expected False"):
        vq.encode(images, sample=True)
    with pytest.raises(ValueError, match="posterior: expected a tokenizer whose bottleneck is 'vae'"):
        vq.posterior(images)
    with pytest.raises(ValueError, match="decode_logits: expected a tokenizer with head 'proxy'"):
        vq.decode_logits(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="latents: expected dtype float32"):
        vae.decode(torch.zeros(1, 6, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="latents: expected finite values"):
        vae.decode(torch.full((1, 6, 12), float("inf")))


def test_vqgan_bad_input() -> None:
    model = MaskGITVQGAN(PROXY)
    assert model.decode(model.encode(torch.rand(2, 3, 8, 6))).shape == (2, 3, 8, 6)
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.rand(1, 3, 7, 8))
    with pytest.raises(ValueError, match=r"codes: expected shape \(B, h, w\)"):
        model.decode(torch.zeros(1, 16, dtype=torch.int64))


def test_corrected_shortcut_leads_around_the_block() -> None:
    """With a second convolution of zeros the corrected block returns its shortcut, and the official one 0."""
    x = torch.randn(1, 32, 4, 4)
    for shortcut_of_result, passes_input in ((False, True), (True, False)):
        block = ResidualBlock(32, 64, size=(8, 8), shortcut_of_result=shortcut_of_result)
        torch.nn.init.zeros_(block.conv2.weight)
        assert bool(block(x).abs().sum() > 0) is passes_input


def test_folded_shortcut_is_the_shortcut_of_the_result() -> None:
    weight, shortcut = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, 6, 1, 1, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    result = F.conv2d(x, weight, padding=1)
    want = result + F.conv2d(result, shortcut)
    got = F.conv2d(x, quirks.fold_shortcut_of_result(weight, shortcut), padding=1)
    assert torch.allclose(got, want, rtol=1e-12)
    assert torch.equal(quirks.shortcut_of_result(result, lambda y: F.conv2d(y, shortcut)), want)


def test_latents_are_read_again_across_tokens() -> None:
    """Value d of token k is element d * K + k of the flattened latents of its image."""
    latents = torch.arange(2 * 3 * 5).view(2, 3, 5)
    got = quirks.reread_latents(latents)
    for image, token, value in itertools.product(range(2), range(3), range(5)):
        assert got[image, token, value] == latents[image].flatten()[value * 3 + token]


def test_generator_bad_input() -> None:
    model = MaskGIT(GeneratorConfig(6, 20, num_classes=5, width=32, layers=2, heads=4, mlp_width=64))
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 21\), got 21"):
        model(tokens + 21)
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 5\], got 6"):
        model(tokens, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="labels: expected one for each of 2 rows"):
        model(tokens, torch.tensor([0]))
