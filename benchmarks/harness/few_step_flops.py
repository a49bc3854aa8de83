"""What the models of `benchmarks.baselines.few_steps` cost, by formula; counted as in `benchmarks.harness.flops`."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.flops import Work, attention, conv, linear, residual, total


def dc_decoder(
    batch: int, size: int, channels: Sequence[int], layers: Sequence[int], latent: int, attending: int
) -> Work:
    """The decoder of diffusers' `AutoencoderDC`: latents (batch, latent, size, size) to pixels.

    Args:
        channels: of each level, that of the pixels first.
        layers: blocks of each level; a first level without any is a convolution to twice the size.
        attending: how many of the last levels have blocks with linear attention instead of two convolutions.
    """
    parts = [conv(batch, size, size, latent, channels[-1])]
    for level in reversed(range(len(channels))):
        width, count = channels[level], layers[level]
        if level < len(channels) - 1 and count:
            parts.append(conv(batch, size, size, channels[level + 1], 4 * width))
            size *= 2
        rows = batch * size * size
        if level < len(channels) - attending:
            parts += [residual(batch, size, size, width, width)] * count
            continue
        # Each head of 32 channels first sums its values over all positions, and one channel of ones beside them.
        linear_attention = Work(2 * 2 * rows * 33 * width, 0, 4 * rows * width)
        depthwise = Work(2 * rows * 9 * 8 * width, 9 * 8 * width, 2 * rows * 8 * width)
        block_parts = [linear(rows, width, width)] * 4 + [linear_attention, depthwise]
        block_parts += [linear(rows, width, 8 * width), linear(rows, 4 * width, width)]
        parts.append(total(block_parts).times(count))
    if layers[0]:
        parts.append(conv(batch, size, size, channels[0], 3))
    else:
        parts.append(conv(batch, size, size, channels[1], 4 * 3))
    return total(parts)


def uvit2d_pass(
    rows: int,
    grid: int,
    text: int = 77,
    *,
    hidden: int = 1024,
    layers: int = 22,
    mlp: int = 2816,
    channels: int = 768,
    embedding: int = 768,
    codes: int = 8192,
    text_width: int = 768,
    condition: int = 768 + 1280,
    blocks: int = 3,
    halved: bool = False,
) -> Work:
    """One forward pass of aMUSEd's U-ViT (Patil et al. 2024) over `rows` maps of grid x grid codes and `text` tokens.

    Args:
        halved: the layers work on maps of half the height and width.
        condition: channels of the pooled text and of the picture's size together.
    """
    outer, small = grid * grid, grid * grid // (4 if halved else 1)
    kernel = 2 if halved else 1

    def to_text(width: int) -> Work:
        """Attention of the small map to the text."""
        of_map, of_text = linear(rows * small, width, width), linear(rows * text, width, width)
        return total((of_map.times(2), of_text.times(2), attention(rows, small, text, width)))

    depthwise = Work(2 * rows * small * 9 * channels, 9 * channels, 2 * rows * small * channels)
    convolving = total(
        (
            depthwise,
            linear(rows * small, channels, 4 * channels),
            linear(rows * small, 4 * channels, channels),
            linear(rows, hidden, 2 * channels),
            linear(rows * text, hidden, channels) if hidden != channels else Work(),
            to_text(channels).times(2),
        )
    )
    layer = total(
        (
            linear(rows * small, hidden, hidden).times(4),
            attention(rows, small, small, hidden),
            to_text(hidden),
            linear(rows * small, hidden, 2 * mlp),
            linear(rows * small, mlp, hidden),
            linear(rows, hidden, 2 * hidden).times(3),
        )
    )
    resized = linear(rows * small, channels, channels).times(kernel * kernel) if halved else Work()
    return total(
        (
            linear(rows * text, text_width, hidden),
            linear(rows, condition, hidden),
            linear(rows, hidden, hidden),
            linear(rows * outer, embedding, channels),
            resized.times(2),
            convolving.times(2 * blocks),
            linear(rows * small, channels, hidden),
            layer.times(layers),
            linear(rows * small, hidden, channels),
            linear(rows * outer, channels, embedding),
            linear(rows * outer, embedding, codes),
        )
    )
