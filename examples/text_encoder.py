"""A BERT-like text encoder (Devlin et al. 2019) for texts of many lengths, exported with dynamic shapes.

    python examples/text_encoder.py "A short text." "A text that is longer than the other one."
    python examples/text_encoder.py --save encoder.pt2

`titok.ops.masked_attention` reads the packed projection of queries, keys and values. `key_mask` is True where a token
is visible; a mask of Hugging Face (`attention_mask`, 1 for tokens) becomes one by `.bool()`. A process that loads the
exported file imports `titok.ops` first, which registers the op.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.ops import masked_attention

PADDING = 0  # a byte that no text contains


class Block(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, N, D), visible (B, N) bool."""
        x = x + self.out(masked_attention(self.qkv(self.norms[0](x)), self.heads, key_mask=visible))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class TextEncoder(nn.Module):
    """Bytes (B, N) int64, padded with 0, to one vector for each text, (B, D)."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, longest: int = 512) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Parameter(0.02 * torch.randn(longest, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor) -> Tensor:
        """The mean of the last block's outputs over the bytes of each text."""
        visible = text != PADDING
        x = self.bytes(text) + self.positions[: text.shape[1]]
        for block in self.blocks:
            x = block(x, visible)
        weights = visible.to(x.dtype)[..., None]
        return (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1)


def padded(texts: list[str]) -> Tensor:
    """The bytes of texts (B, N) int64, filled up with 0 to the longest."""
    rows = [torch.tensor(list(text.encode()), dtype=torch.int64) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


def export(model: TextEncoder) -> torch.export.ExportedProgram:
    """The model as a program for any number of texts and any length up to the longest."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=len(model.positions))
    return torch.export.export(
        model, (torch.ones(2, 8, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},)
    )


def main(arguments: list[str] | None = None) -> float:
    """Reads the command line, compares the exported program with the model, and returns the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", default=["Tokens.", "A picture is worth 32 tokens.", "One more text"])
    parser.add_argument("--save", metavar="FILE", help="for the exported program, such as encoder.pt2")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = TextEncoder().eval()
    program = export(model)
    text = padded(options.texts)
    with torch.no_grad():
        together = model(text)
        alone = torch.cat([model(padded([one])) for one in options.texts])
        exported = program.module()(text)
    print(f"{len(options.texts)} texts of up to {text.shape[1]} bytes: vectors {tuple(together.shape)}")
    print(f"padding changes them by {(together - alone).abs().max().item():.1e} at most")
    difference = (together - exported).abs().max().item()
    print(f"the exported program differs by {difference:.1e} at most")
    if options.save:
        torch.export.save(program, options.save)
    return difference


if __name__ == "__main__":
    main()
