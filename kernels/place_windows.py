"""Copies the windows of a folded upsampling convolution to the rows of the enlarged map, and adds a bias on the way.

`titok.inference.folded_upsample` computes the even and the odd rows of an enlarged map by one 2x2 convolution each. A
row of windows, in its order in memory, is a row of the enlarged map with one pixel too many at either end:

    windows[image, i + parity]    | x | 2 W pixels of C channels | x |
    result[image, 2 i + parity]       | 2 W pixels of C channels |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from titok.kernels._aot import AotVariant, label_launches, meta, name_of
from titok.kernels._launch import launch, record
from titok.kernels._tuning import PLACE_WINDOWS


@triton.jit
def place_windows(
    windows_ptr,  # (B, H + 1, W + 1, 2 C): two output pixels in each window
    bias_ptr,  # (C,) or None
    result_ptr,  # (B, 2 H, 2 W, C), of which the rows of one parity are written
    parity,
    H,
    W,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(2 * W, BLOCK_P)
    row = tl.program_id(0) // blocks
    image, i = (row // H).to(tl.int64), row % H
    columns = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < C
    mask = (columns < 2 * W)[:, None] & inside[None, :]
    offsets = columns[:, None] * C + channels[None, :]
    read = ((image * (H + 1) + i + parity) * (W + 1) * 2 + 1) * C
    values = tl.load(windows_ptr + read + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + bias[None, :]).to(result_ptr.dtype.element_ty)
    written = (image * 2 * H + 2 * i + parity) * 2 * W * C
    tl.store(result_ptr + written + offsets, values, mask=mask)


def place(windows: torch.Tensor, bias: torch.Tensor | None, result: torch.Tensor, parity: int) -> None:
    """Writes the rows of one parity of `result`.

    Args:
        windows: (B, 2 C, H + 1, W + 1), channels-last.
        bias: (C,) contiguous, or None.
        result: (B, C, 2 H, 2 W), channels-last, of the dtype of `windows`.
        parity: 0 for even rows, 1 for odd ones.
    """
    B, C, height, width = result.shape
    tile = PLACE_WINDOWS
    columns = min(triton.next_power_of_2(C), tile.columns)
    rows = tile.rows * tile.columns // columns
    launch(
        place_windows,
        (B * (height // 2) * triton.cdiv(width, rows), triton.cdiv(C, columns)),
        *(windows, bias, result, parity, height // 2, width // 2),
        C=C,
        BLOCK_P=rows,
        BLOCK_C=columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def aot_variants() -> list[AotVariant]:
    """The enlarged maps of the pixel decoder: 512 to 128 channels."""
    variants = []
    for dtype in (torch.bfloat16, torch.float32):
        for C in (512, 256, 128):
            windows, result = (
                meta(1, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
                for channels, side in ((2 * C, 33), (C, 64))
            )
            with record() as launches:
                for parity in (0, 1):
                    place(windows, meta(C, dtype=dtype), result, parity)
            variants += label_launches(launches, f"{name_of(dtype)} C={C}")
    return variants
