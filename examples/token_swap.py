"""Token swaps: two pictures exchange some of their tokens, one position after the other.

    python examples/token_swap.py                                              # random weights: noise
    python examples/token_swap.py --models runs/quickstart                     # two generated digits
    python examples/token_swap.py --models runs/quickstart --pictures a.png b.png -o swapped.png

The first row shows the first picture with the first 0, 1, 2, ... tokens of the second one, the second row the reverse.
What changes at a position is what that token stands for.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig, sample_tokens
from titok.data.images import grid, read_image, to_uint8, write_image


def load_models(folder: str | None) -> tuple[TiTok, MaskGIT]:
    """The models in the sub-folders tokenizer and generator of a folder; without one, small random ones."""
    if folder is not None:
        pipe = Pipeline.from_pretrained(f"{folder}/tokenizer", f"{folder}/generator")
        return pipe.tokenizer, pipe.generator
    vit = ViTConfig(width=64, layers=2, heads=2, patch_size=8)
    tokenizer = TokenizerConfig(
        image_size=32, encoder=vit, decoder=vit, num_latent_tokens=8, code_dim=8, codebook_size=64
    )
    generator = GeneratorConfig(
        num_latent_tokens=8, codebook_size=64, num_classes=10, width=64, layers=2, heads=2, mlp_width=128
    )
    return TiTok(tokenizer).eval(), MaskGIT(generator).eval()


def swapped(first: Tensor, second: Tensor) -> Tensor:
    """Tokens (K,) of two pictures to (2, K + 1, K): each with the first 0 to K tokens of the other."""
    length = len(first)
    from_other = torch.arange(length) < torch.arange(length + 1)[:, None]
    return torch.stack([torch.where(from_other, second, first), torch.where(from_other, first, second)])


@torch.no_grad()
def main(arguments: list[str] | None = None) -> Tensor:
    """Reads the command line, writes the picture, and returns the tokens (2, K + 1, K)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="FOLDER", help="with sub-folders tokenizer and generator")
    parser.add_argument("--pictures", metavar="FILE", nargs=2, help="two pictures; else two that are generated")
    parser.add_argument("--classes", type=int, nargs=2, default=[3, 8], help="of the pictures that are generated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="swapped.png")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer, generator = load_models(options.models)
    config = tokenizer.config
    if options.pictures:
        images = torch.stack([read_image(path, config.image_size, config.channels) for path in options.pictures])
        first, second = tokenizer.encode(images)
    else:
        first, second = sample_tokens(generator, options.classes, seed=options.seed)
    tokens = swapped(first, second)
    pictures = to_uint8(tokenizer.decode(tokens.flatten(0, 1)))
    write_image(options.output, grid(pictures, columns=tokens.shape[1]))
    print(f"{options.output}: from left to right, more and more tokens of the other picture")
    return tokens


if __name__ == "__main__":
    main()
