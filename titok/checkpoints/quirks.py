"""What the published weights need from the layers, against the papers: mistakes of the official code they were
trained with.

The weights have learned to live with these mistakes, so a model that reads them must repeat them. Each one is a
function that a layer calls when its flag in the configuration is on:

| function | flag | turned on for |
| --- | --- | --- |
| `reread_latents` | `TokenizerConfig.reread_latents` | the tokenizers TiTok-L-32, B-64 and S-128 |
| `shortcut_of_result`, `fold_shortcut_of_result` | `VQGANConfig.shortcut_of_result` | the MaskGIT-VQGAN |

How the official files name their tensors is in `titok.checkpoints.official`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reread_latents(latents: Tensor) -> Tensor:
    """The latents that the official encoder projects to the code dimension, which mix the tokens.

    The official code lacks a transpose before that projection. It reads the memory of the (K, D) matrix of each
    image as if it were a (D, K) matrix: value d of token k is then element d * K + k of the flattened latents.

    Args:
        latents: (B, K, D), K tokens of D values.

    Returns:
        (B, K, D) of the same dtype, a view where PyTorch can make one.
    """
    batch, tokens, width = latents.shape
    return latents.reshape(batch, width, tokens).transpose(1, 2)


def shortcut_of_result(result: Tensor, shortcut: Callable[[Tensor], Tensor]) -> Tensor:
    """The output of a MaskGIT-VQGAN residual block whose number of channels changes: result + shortcut(result).

    A residual block should add shortcut(input). The official code applies the 1x1 convolution to the result of the
    two 3x3 convolutions, so no path leads around them.

    Args:
        result: (B, O, H, W), what the second 3x3 convolution returned.
        shortcut: a 1x1 convolution from O to O channels.

    Returns:
        (B, O, H, W).
    """
    return result + shortcut(result)


def fold_shortcut_of_result(weight: Tensor, shortcut: Tensor) -> Tensor:
    """The weight of one convolution that does the work of two: of a 3x3 convolution and `shortcut_of_result` after
    it.

    Both are linear and have no bias, so their composition is one convolution with the weight (I + shortcut) @
    weight.

    Args:
        weight: (O, C, k, k) of the convolution.
        shortcut: (O, O, 1, 1) of the 1x1 convolution.

    Returns:
        (O, C, k, k) in the dtype of `weight`. Sums are taken in float64 and rounded once.
    """
    identity = torch.eye(len(shortcut), dtype=torch.float64, device=shortcut.device)
    combined = shortcut.double().flatten(1) + identity
    return (combined @ weight.double().flatten(1)).view_as(weight).to(weight.dtype)
