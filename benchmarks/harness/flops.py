"""What each stage of a model costs, by formula: FLOP and the least bytes moved.

FLOP: matrix products and convolutions count, one multiply-add as 2 FLOP. Norms, softmax and activations count as
0, as in `torch.utils.flop_counter`. Importing this module teaches that counter PyTorch's attention on a CPU, which it
does not know.

Least bytes: each pass reads every weight once. Each product, convolution and attention reads its input once and
writes its output once. Everything between two of them is taken to be fused into one of them. Nothing stays in a
cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig
from titok.generation.schedules import schedule


class Work(NamedTuple):
    """The cost of a stage: FLOP, and how many elements of weights and of activations it reads or writes."""

    flops: int = 0
    weights: int = 0
    activations: int = 0

    def plus(self, *others: Work) -> Work:
        return Work(*(sum(part) for part in zip(self, *others, strict=True)))

    def times(self, count: int) -> Work:
        """The work of `count` such parts; each reads weights, be they its own or the same again."""
        return Work(*(count * part for part in self))

    def bytes(self, element_size: int) -> int:
        return (self.weights + self.activations) * element_size


def total(parts: Iterable[Work]) -> Work:
    """The sum of all parts."""
    return Work().plus(*parts)


def linear(rows: int, inputs: int, outputs: int) -> Work:
    """x (rows, inputs) @ weight (inputs, outputs)."""
    return Work(2 * rows * inputs * outputs, inputs * outputs, rows * (inputs + outputs))


def conv(batch: int, height: int, width: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> Work:
    """A convolution with a kernel of kernel x kernel whose output has height x width pixels."""
    pixels, taps = batch * height * width, kernel * kernel
    read = pixels * stride * stride * inputs
    return Work(2 * pixels * taps * inputs * outputs, taps * inputs * outputs, read + pixels * outputs)


def upsample_conv(batch: int, height: int, width: int, channels: int, *, folded: bool) -> Work:
    """Nearest-neighbour upsampling by 2 to height x width pixels, then a 3x3 convolution.

    `folded` computes the same result with four 2x2 kernels on the small map padded by 1: 4 taps an output pixel
    (and a few for the padding) instead of 9.
    """
    pixels, square = batch * height * width, channels * channels
    taps = 16 * batch * (height // 2 + 1) * (width // 2 + 1) if folded else 9 * pixels
    return Work(2 * taps * square, (16 if folded else 9) * square, (pixels // 4 + pixels) * channels)


def attention(batch: int, queries: int, keys: int, width: int) -> Work:
    """Scores and weighted sums of values over all heads, together `width` channels; no score is stored."""
    return Work(4 * batch * queries * keys * width, 0, batch * (2 * queries + 2 * keys) * width)


# --- transformers


def block(batch: int, tokens: int, width: int, mlp: int, queries: int | None = None) -> Work:
    """One transformer layer over `tokens` tokens.

    `queries`: how many tokens are computed after the projection to queries, keys and values; None stands for all.
    """
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
    """All layers; the last one computes `read` tokens after its projection."""
    mlp = vit.mlp_ratio * vit.width
    layer = block(batch, tokens, vit.width, mlp)
    return layer.times(vit.layers - 1).plus(block(batch, tokens, vit.width, mlp, read))


def encoder(config: TokenizerConfig, batch: int = 1) -> Work:
    """Images to tokens: patch embedding, transformer, projection, nearest code."""
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
    """Tokens to pixels, or to logits over the proxy's codes.

    `all_rows`: the last layer also computes the class token and the latent tokens, which nothing reads.
    """
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
    """Logits over the proxy's codes to pixels: each position's expected code vector, then the VQGAN decoder."""
    assert config.proxy is not None
    h, w = (side // config.proxy.factor for side in config.image_size)
    mixture = linear(batch * h * w, config.proxy.codebook_size, config.proxy.code_dim)
    return mixture.plus(vqgan_decoder(config.proxy, batch, h, w, folded=folded))


# --- convolutional decoders


def residual(
    batch: int, h: int, w: int, inputs: int, outputs: int, shortcut_of_result: bool = False, folded: bool = False
) -> Work:
    """Two 3x3 convolutions, and a 1x1 convolution where the channels change.

    `shortcut_of_result`: the 1x1 convolution reads the block's result, and `folded` makes it part of the second
    3x3.
    """
    parts = [conv(batch, h, w, inputs, outputs), conv(batch, h, w, outputs, outputs)]
    if inputs != outputs and not (folded and shortcut_of_result):
        parts.append(conv(batch, h, w, outputs if shortcut_of_result else inputs, outputs, 1))
    return total(parts)


def vqgan_decoder(config: VQGANConfig, batch: int, h: int, w: int, *, folded: bool = False) -> Work:
    """Code vectors (batch, code_dim, h, w) to pixels.

    `folded`: as inference computes it, with upsampling and 1x1 shortcuts folded into the 3x3 convolutions beside
    them.
    """
    widths = [config.hidden_channels * m for m in config.channel_multipliers]
    parts = [conv(batch, h, w, config.code_dim, widths[-1])]
    parts += [residual(batch, h, w, widths[-1], widths[-1])] * 2
    for level in reversed(range(len(widths))):
        before = widths[min(level + 1, len(widths) - 1)]
        for inputs in [before] + [widths[level]] * (config.blocks_per_level - 1):
            parts.append(residual(batch, h, w, inputs, widths[level], config.shortcut_of_result, folded))
        if level > 0:
            h, w = 2 * h, 2 * w
            parts.append(upsample_conv(batch, h, w, widths[level], folded=folded))
    parts.append(conv(batch, h, w, widths[0], config.channels))
    return total(parts)


def vae_decoder(
    batch: int,
    size: int,
    channels: Sequence[int] = (128, 256, 512, 512),
    latent: int = 4,
    *,
    blocks: int = 3,
    attends: bool = True,
) -> Work:
    """The decoder of diffusers' `AutoencoderKL` or `VQModel`: latents (batch, latent, size, size) to pixels.

    By default that of Stable Diffusion, whose pictures have 8 times the size of the latents.

    Args:
        channels: of each level, that of the pixels first.
        blocks: residual blocks of each level.
        attends: whether there is attention between the first two blocks.
    """
    top, pixels = channels[-1], size * size
    parts = [conv(batch, size, size, latent, latent, 1), conv(batch, size, size, latent, top)]
    parts += [residual(batch, size, size, top, top)] * 2
    if attends:
        parts += [linear(batch * pixels, top, top)] * 4 + [attention(batch, pixels, pixels, top)]
    for level, (before, now) in enumerate(itertools.pairwise((top, *reversed(channels)))):
        parts += [residual(batch, size, size, inputs, now) for inputs in [before] + [now] * (blocks - 1)]
        if level < len(channels) - 1:
            size *= 2
            parts.append(upsample_conv(batch, size, size, now, folded=False))
    parts.append(conv(batch, size, size, channels[0], 3))
    return total(parts)


# --- generators


def generator_pass(config: GeneratorConfig, rows: int, logit_rows: int) -> Work:
    """One forward pass over `rows` sequences, with logits at `logit_rows` positions in total."""
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
        sampling: None takes the generator's own settings.
        distinct: how many different labels the batch has; None stands for `batch`. The first step runs once for
            each.
        as_written: count what the official code computes: a second pass for every sample in every guided step, and
            logits at every position. Otherwise count what titok's decoding loop computes.
    """
    sampling, tokens = sampling or config.sampling, config.num_latent_tokens
    parts, now = [], tokens
    for step in schedule(sampling):
        after = step.num_masked(tokens, now)
        guided = step.guidance != 1.0
        if as_written:  # the official code runs power-cosine's second pass even where its weight is zero
            rows = 2 * batch if guided or sampling.guidance_schedule == "power-cosine" else batch
            parts.append(generator_pass(config, rows, rows * tokens))
        elif after != now:
            first = now == tokens
            rows = (distinct or batch) + guided if first else batch * (1 + guided)
            parts.append(generator_pass(config, rows, rows * now))
        now = after
    return total(parts)


def dit_pass(
    rows: int,
    grid: int,
    *,
    width: int = 1152,
    layers: int = 28,
    patch: int = 2,
    channels: int = 4,
    outputs: int | None = None,
) -> Work:
    """One forward pass of DiT (Peebles and Xie 2023; by default XL/2) over `rows` latents of grid x grid patches.

    diffusers embeds the time step and the class again in every layer, and once more before the last projection.

    `outputs`: channels of the result; None stands for twice `channels`, as of DiT.
    """
    tokens = grid * grid
    condition = linear(rows, 256, width).plus(linear(rows, width, width))
    layer = total((condition, linear(rows, width, 6 * width), block(rows, tokens, width, 4 * width)))
    return total(
        (
            conv(rows, grid, grid, channels, width, patch, patch),
            layer.times(layers),
            condition,
            linear(rows, width, 2 * width),
            linear(rows * tokens, width, patch * patch * (outputs or 2 * channels)),
        )
    )


# --- PyTorch's op that its own counter does not know: attention on a CPU


def _register_attention_on_cpu() -> None:
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if op not in flop_registry:
        register_flop_formula(op)(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v))


_register_attention_on_cpu()
