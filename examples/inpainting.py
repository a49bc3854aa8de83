"""In-painting by tokens: some tokens of pictures stay, and the generator draws the others anew.

    python examples/inpainting.py                                  # random weights: the pictures are noise
    python examples/inpainting.py --models runs/quickstart         # what `titok quickstart` trains
    python examples/inpainting.py --models runs/quickstart --keep 0-3 --draws 8 -o inpainted.png

Each row of the picture that is written shows one class: a generated picture, and then draws that keep some of its
tokens. `sample_tokens` fills the places of `init_tokens` that hold `generator.mask_token`.
"""

from __future__ import annotations

import argparse

import torch

from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, ViTConfig, sample_tokens
from titok.data.images import grid, to_uint8, write_image


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


def positions(text: str) -> list[int]:
    """The positions in a text such as "0-3,7"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


@torch.no_grad()
def main(arguments: list[str] | None = None) -> torch.Tensor:
    """Reads the command line, writes the picture, and returns all tokens (classes, 1 + draws, K)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="FOLDER", help="with sub-folders tokenizer and generator")
    parser.add_argument("--keep", type=positions, default=positions("0-3"), help="positions of tokens that stay")
    parser.add_argument("--classes", type=int, default=4, help="rows of the picture")
    parser.add_argument("--draws", type=int, default=5, help="of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="inpainted.png")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    tokenizer, generator = load_models(options.models)
    labels = torch.arange(options.classes) % generator.config.num_classes
    first = sample_tokens(generator, labels, seed=options.seed)
    start = torch.full_like(first, generator.mask_token)
    start[:, options.keep] = first[:, options.keep]
    draws = [
        sample_tokens(generator, labels, seed=options.seed + 1 + i, init_tokens=start)
        for i in range(options.draws)
    ]
    tokens = torch.stack([first, *draws], dim=1)
    pictures = to_uint8(tokenizer.decode(tokens.flatten(0, 1)))
    write_image(options.output, grid(pictures, columns=1 + options.draws))
    print(
        f"{options.output}: a generated picture of each class, then {options.draws} with tokens {options.keep} kept"
    )
    return tokens


if __name__ == "__main__":
    main()
