"""What each stage costs, by formula: multiply-adds of matrix products and convolutions, and the least bytes moved.

One multiply-add is 2 FLOP; norms, softmax and activations count as nothing, as in `torch.utils.flop_counter`. That
counter sees our ops once this module is imported: it registers a formula for each.

Least bytes: every weight is read once a pass; every product, convolution or attention reads its input and writes its
output once, and whatever stands between two of them is fused into one of them. Nothing is assumed to stay in a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

import titok.ops  # noqa: F401  (registers torch.ops.titok)
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig
from titok.generation.schedules import schedule


class Work(NamedTuple):
    """FLOP, and elements read or written: weights once a pass, activations with the batch."""

    flops: int = 0
    weights: int = 0
    activations: int = 0

    def plus(self, *others: Work) -> Work:
        return Work(*(sum(part) for part in zip(self, *others, strict=True)))

    def times(self, count: int) -> Work:
        """`count` such parts, each with weights of its own (or the same ones, read again)."""
        return Work(*(count * part for part in self))

    def bytes(self, element_size: int) -> int:
        return (self.weights + self.activations) * element_size


def total(parts: Iterable[Work]) -> Work:
    return Work().plus(*parts)


def linear(rows: int, inputs: int, outputs: int) -> Work:
    return Work(2 * rows * inputs * outputs, inputs * outputs, rows * (inputs + outputs))


def conv(batch: int, height: int, width: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Work:
    """height x width are those of the output."""
    pixels, taps = batch * height * width, kernel * kernel
    read = pixels * stride * stride * inputs
    return Work(2 * pixels * taps * inputs * outputs, taps * inputs * outputs, read + pixels * outputs)


def upsample_conv(batch: int, height: int, width: int, channels: int, *, folded: bool) -> Work:
    """Nearest-neighbour x2, then 3x3, to height x width. `folded`: the same result by four 2x2 kernels at every window
    of the small map and its rim, 4 taps a pixel in place of 9."""
    pixels, square = batch * height * width, channels * channels
    taps = 16 * batch * (height // 2 + 1) * (width // 2 + 1) if folded else 9 * pixels
    return Work(2 * taps * square, (16 if folded else 9) * square, (pixels // 4 + pixels) * channels)


def attention(batch: int, queries: int, keys: int, width: int) -> Work:
    """Scores and mixture over all heads; scores are never stored."""
    return Work(4 * batch * queries * keys * width, 0, batch * (2 * queries + 2 * keys) * width)


# --- transformers


def block(batch: int, tokens: int, width: int, mlp: int, queries: int | None = None) -> Work:
    """One layer; with `queries`, only so many of its rows are computed behind the projection to q, k, v."""
    read = tokens if queries is None else queries
    return total(
        (
            linear(batch * tokens, width, 3 * width),
            attention(batch, read, tokens, width),
            linear(batch * read, width, width),
            linear(batch * read, width, mlp),
            linear(batch * read, mlp, width),
        )
    )


def _trunk(vit: ViTConfig, batch: int, tokens: int, read: int) -> Work:
    mlp = vit.mlp_ratio * vit.width
    whole = block(batch, tokens, vit.width, mlp)
    return whole.times(vit.layers - 1).plus(block(batch, tokens, vit.width, mlp, read))


def encoder(config: TokenizerConfig, batch: int = 1) -> Work:
    """Images to tokens: patches, trunk, projection, nearest code."""
    vit, tokens = config.encoder, config.num_latent_tokens
    h, w = config.grid("encoder")
    vae = config.bottleneck == "vae"
    parts = [
        conv(batch, h, w, config.channels, vit.width, vit.patch_size, vit.patch_size),
        _trunk(vit, batch, 1 + h * w + tokens, tokens),
        linear(batch * tokens, vit.width, (1 + vae) * config.code_dim),
    ]
    if not vae:
        lookup = linear(batch * tokens, config.code_dim, config.codebook_size)
        parts.append(lookup._replace(activations=batch * tokens * (config.code_dim + 1)))
    return total(parts)


def decoder(config: TokenizerConfig, batch: int = 1, *, all_rows: bool = False) -> Work:
    """Tokens to pixels, or to logits over the proxy's codes. `all_rows`: the last layer computes rows nobody reads."""
    vit, tokens = config.decoder, config.num_latent_tokens
    h, w = config.grid("decoder")
    patches = h * w
    length = 1 + patches + tokens
    parts = [
        linear(batch * tokens, config.code_dim, vit.width),
        _trunk(vit, batch, length, length if all_rows else patches),
    ]
    if config.head == "pixels":
        parts.append(linear(batch * patches, vit.width, config.channels * vit.patch_size**2))
        parts.append(conv(batch, *config.image_size, config.channels, config.channels))
        return total(parts)
    assert config.proxy is not None
    outputs = config.proxy.codebook_size * (vit.patch_size // config.proxy.factor) ** 2
    parts += [
        linear(batch * patches, vit.width, 2 * vit.width),
        linear(batch * patches, 2 * vit.width, outputs),
    ]
    return total(parts)


def pixel_decoder(config: TokenizerConfig, batch: int = 1, *, folded: bool = False) -> Work:
    """Logits over the proxy's codes to pixels: their expected code vector, then the VQGAN's decoder."""
    assert config.proxy is not None
    h, w = (side // config.proxy.factor for side in config.image_size)
    mixture = linear(batch * h * w, config.proxy.codebook_size, config.proxy.code_dim)
    return mixture.plus(vqgan_decoder(config.proxy, batch, h, w, folded=folded))


# --- convolutional decoders


def _residual(
    batch: int, h: int, w: int, inputs: int, outputs: int, shortcut_of_result: bool = False, folded: bool = False
) -> Work:
    parts = [conv(batch, h, w, inputs, outputs), conv(batch, h, w, outputs, outputs)]
    if inputs != outputs and not (folded and shortcut_of_result):
        parts.append(conv(batch, h, w, outputs if shortcut_of_result else inputs, outputs, 1))
    return total(parts)


def vqgan_decoder(config: VQGANConfig, batch: int, h: int, w: int, *, folded: bool = False) -> Work:
    """Code vectors (batch, code_dim, h, w) to pixels. `folded`: as inference computes it, without what is exactly
    part of a convolution beside it."""
    widths = [config.hidden_channels * m for m in config.channel_multipliers]
    parts = [conv(batch, h, w, config.code_dim, widths[-1])]
    parts += [_residual(batch, h, w, widths[-1], widths[-1])] * 2
    for level in reversed(range(len(widths))):
        before = widths[min(level + 1, len(widths) - 1)]
        for inputs in [before] + [widths[level]] * (config.blocks_per_level - 1):
            parts.append(_residual(batch, h, w, inputs, widths[level], config.shortcut_of_result, folded))
        if level > 0:
            h, w = 2 * h, 2 * w
            parts.append(upsample_conv(batch, h, w, widths[level], folded=folded))
    parts.append(conv(batch, h, w, widths[0], config.channels))
    return total(parts)


def vae_decoder(batch: int, size: int, channels: tuple[int, ...] = (128, 256, 512, 512), latent: int = 4) -> Work:
    """Stable Diffusion's `AutoencoderKL`: latents (batch, latent, size, size) to pixels, 8 times as many a side."""
    top, pixels = channels[-1], size * size
    parts = [conv(batch, size, size, latent, latent, 1), conv(batch, size, size, latent, top)]
    parts += [_residual(batch, size, size, top, top)] * 2
    parts += [linear(batch * pixels, top, top)] * 4 + [attention(batch, pixels, pixels, top)]
    for level, (before, now) in enumerate(itertools.pairwise((top, *reversed(channels)))):
        parts += [_residual(batch, size, size, inputs, now) for inputs in (before, now, now)]
        if level < len(channels) - 1:
            size *= 2
            parts.append(upsample_conv(batch, size, size, now, folded=False))
    parts.append(conv(batch, size, size, channels[0], 3))
    return total(parts)


# --- generators


def generator_pass(config: GeneratorConfig, rows: int, logit_rows: int) -> Work:
    """One forward pass over `rows` sequences whose head runs at `logit_rows` positions in all."""
    width, tokens, layers = config.width, 1 + config.num_latent_tokens, config.layers
    parts = [linear(logit_rows, width, config.codebook_size)]
    if config.architecture == "uvit":
        parts.append(linear(rows * tokens, 2 * width, width).times(layers // 2))
        layers += 1
    parts.append(block(rows, tokens, width, config.mlp_width).times(layers))
    return total(parts)


def generate(
    config: GeneratorConfig,
    batch: int = 1,
    *,
    sampling: SamplingConfig | None = None,
    distinct: int | None = None,
    as_written: bool = False,
) -> Work:
    """All decoding steps of one batch.

    Args:
        distinct: different labels in the batch (None: all differ); the first step runs once for each.
        as_written: a second pass for every sample in every guided step, the head at every position, as the official
            code; otherwise what `titok.generation.decode_loop` leaves of it.
    """
    sampling, tokens = sampling or config.sampling, config.num_latent_tokens
    parts, now = [], tokens
    for step in schedule(sampling):
        after = step.num_masked(tokens, now)
        guided = step.guidance != 1.0
        if as_written:  # power-cosine runs the second pass even where its weight is zero
            rows = 2 * batch if guided or sampling.guidance_schedule == "power-cosine" else batch
            parts.append(generator_pass(config, rows, rows * tokens))
        elif after != now:
            first = now == tokens
            rows = (distinct or batch) + guided if first else batch * (1 + guided)
            parts.append(generator_pass(config, rows, rows * now))
        now = after
    return total(parts)


def dit_pass(
    rows: int, grid: int, *, width: int = 1152, layers: int = 28, patch: int = 2, channels: int = 4
) -> Work:
    """One forward pass of DiT (Peebles and Xie 2023, XL/2 by default) over `rows` latents of grid x grid patches.
    diffusers embeds time step and class in every layer anew, and once more before the last projection."""
    tokens = grid * grid
    condition = linear(rows, 256, width).plus(linear(rows, width, width))
    layer = total((condition, linear(rows, width, 6 * width), block(rows, tokens, width, 4 * width)))
    return total(
        (
            conv(rows, grid, grid, channels, width, patch, patch),
            layer.times(layers),
            condition,
            linear(rows, width, 2 * width),
            linear(rows * tokens, width, patch * patch * 2 * channels),
        )
    )


# --- what FlopCounterMode is told of our ops


def _register_formulas() -> None:
    ours, aten = torch.ops.titok, torch.ops.aten

    def attend(qkv: Any, mask: Any, heads: int, start: int, stop: int, *_: Any, **__: Any) -> int:
        return attention(qkv[0], stop - start, qkv[1], qkv[2] // 3).flops

    def attend_backward(grad: Any, qkv: Any, mask: Any, out: Any, lse: Any, *rest: Any, **__: Any) -> int:
        return attend(qkv, mask, *rest) * 5 // 2  # scores again, then four products of the same size

    def mix(logits: Any, codebook: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(logits) * codebook[1]

    def mix_backward(grad: Any, logits: Any, codebook: Any, mixture: Any, *need: Any, **__: Any) -> int:
        return mix(logits, codebook) * sum(bool(wanted) for wanted in need[:2])

    def nearest(latents: Any, codebook: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(latents) * codebook[0]

    formulas = {
        ours.masked_attention: attend,
        ours.masked_attention_backward: attend_backward,
        ours.code_mixture: mix,
        ours.code_mixture_backward: mix_backward,
        ours.nearest_codebook: nearest,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


_register_formulas()
