"""How the training of a tokenizer begins: its first weights, and when quantisation sets in.

With random weights, a tokenizer first has to learn which patches a latent token reads, and which latent token a mask
token of the decoder reads. A small model spends most of a short training run on that. `start_as_patches` starts it with
an answer: latent token k reads the patch k * P / K of the P patches, and the decoder puts it back in that place.
Training is free to move away from it. The published training draws all weights at random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.models.quantizer import VectorQuantizer
from titok.models.tokenizer import TiTok
from titok.models.transformer import Block, Transformer
from titok.ops import Quantized
from titok.training.config import ProxyTraining, TokenizerTraining


def start_tokenizer(model: TiTok, config: TokenizerTraining | ProxyTraining) -> None:
    """Changes the initial weights of a tokenizer as `position_std` and `start_as_patches` of its recipe say."""
    if config.position_std is not None:
        for name, parameter in model.named_parameters():
            if name.endswith(("_positions", "_token", "_tokens")):
                nn.init.normal_(parameter, std=config.position_std)
    if config.start_as_patches:
        start_as_patches(model)


def quantize_latents(
    quantizer: VectorQuantizer, latents: Tensor, *, step: int, quantize_from: int
) -> tuple[Tensor, Quantized]:
    """What the decoder reads of latents (B, K, C), and the result of the quantizer.

    Before the step `quantize_from` the decoder reads the latents, of unit length where codes have it, and the loss of
    the quantizer is 0. It still depends on the codebook, because DDP expects a gradient of every parameter. A negative
    step always quantises.
    """
    quantized = quantizer(latents)
    if not 0 <= step < quantize_from:
        return quantized.quantized, quantized
    vectors = F.normalize(latents, dim=-1) if quantizer.l2_normalize else latents
    return vectors, quantized._replace(loss=0 * quantized.loss)


@torch.no_grad()
def start_as_patches(model: TiTok) -> None:
    """Gives a tokenizer weights with which each latent token copies a patch, in place.

    Half of the width holds positions and the other half the content of patches. Attention of the first block compares
    positions and moves content. What is random is drawn from PyTorch's global random numbers.

    Args:
        model: with new weights, on the CPU. A head "proxy" keeps those of its head.
    """
    encoder, decoder = model.encoder, model.decoder
    positions = encoder.patch_positions.shape[1] // 2
    _start_positions(encoder.patch_positions, encoder.latent_positions)
    encoder.latent_tokens.zero_()
    encoder.latent_tokens[:, positions:] = _filler(encoder.latent_tokens.shape[1] - positions)
    weight = encoder.patch_embed.weight  # (D, channels, patch, patch)
    content = _orthogonal(len(weight) - positions, weight[0].numel())
    weight[:positions] = 0
    # Values of about 1, and 0 for a grey patch.
    scale, grey = (1.25, 0.0) if model.config.signed_pixels else (2.5, 0.5)
    weight[positions:] = scale * content.view(weight[positions:].shape)
    assert encoder.patch_embed.bias is not None
    encoder.patch_embed.bias.copy_(-grey * weight.flatten(1).sum(dim=1))
    _start_transformer(encoder.trunk, positions)
    encoder.project.weight[:, :positions] = 0

    positions = decoder.patch_positions.shape[1] // 2
    _start_positions(decoder.patch_positions, decoder.latent_positions)
    decoder.mask_token.zero_()
    decoder.mask_token[..., positions:] = 0.6 * _filler(decoder.mask_token.shape[-1] - positions)
    decoder.embed.weight[:positions] = 0
    nn.init.normal_(decoder.embed.weight[positions:], std=0.6)  # vectors of unit length to values of about 0.6
    _start_transformer(decoder.trunk, positions)
    if decoder.smooth is not None:
        first = decoder.head[0]
        assert isinstance(first, nn.Linear)
        first.weight[:, :positions] = 0
        nn.init.dirac_(decoder.smooth.weight)
        assert decoder.smooth.bias is not None
        decoder.smooth.bias.zero_()


def _filler(size: int) -> Tensor:
    """Content (size,) of variance 1 for tokens that have none.

    Without it, the norm before attention would make their positions larger than those of tokens with content, and
    they would attend to themselves alone.
    """
    return torch.randn(size)


def _start_positions(patches: Tensor, latents: Tensor) -> None:
    """Gives patches (1 + P, D), of which the first is the class token, and latents (K, D) positions of unit variance.

    Each latent has the position of a patch. The other half of the width is 0.
    """
    count, width = len(patches) - 1, patches.shape[1] // 2
    rows = _orthogonal(count, width) if count <= width else torch.randn(count, width) / width**0.5
    rows = rows - rows.mean(dim=1, keepdim=True)  # norms subtract the mean, which would leak into the content
    patches[:, width:] = 0
    patches[1:, :width] = rows * width**0.5
    latents[:, width:] = 0
    latents[:, :width] = patches[1 + torch.arange(len(latents)) * count // len(latents), :width]


def _start_transformer(trunk: Transformer, positions: int) -> None:
    """Lets the first block copy content between tokens of the same position, and all other branches begin small."""
    for number, block in enumerate(trunk.blocks):
        assert isinstance(block, Block)
        block.mlp.fc2.weight.mul_(0.1)
        block.attn.proj.weight.mul_(0.1)
        if number == 0:
            _start_copying(block, positions)


def _start_copying(block: Block, positions: int) -> None:
    qkv, proj = block.attn.qkv.weight, block.attn.proj.weight
    width, head = qkv.shape[1], qkv.shape[1] // block.attn.heads
    qkv.zero_()
    proj.zero_()
    for start in range(0, width, head):
        compared = 1.5 * _orthogonal(head, positions)
        qkv[start : start + head, :positions] = compared
        qkv[width + start : width + start + head, :positions] = compared
    content = width - positions
    qkv[2 * width : 2 * width + content, positions:] = torch.eye(content)
    # Twice, so that what a token reads outweighs its filler.
    proj[positions:, :content] = 2 * torch.eye(content)


def _orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))
