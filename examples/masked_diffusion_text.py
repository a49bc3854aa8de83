"""A small masked-diffusion language model, trained in about a minute, and two ways to decode it.

    python examples/masked_diffusion_text.py --out steps.png

The text is `pydoc_data/topics.py`, the Python documentation that every Python brings along (PSF licence). A network
that sees both sides learns to fill in masked letters, for any share of masked letters (Austin et al., "Structured
Denoising Diffusion Models in Discrete State-Spaces", 2021; Nie et al., "Large Language Diffusion Models", 2025). Text
is then decoded from masks by `titok.ops.masked_decode_step`:

- by threshold: all letters whose probability exceeds it, and at least one in each row (Fast-dLLM, Wu et al. 2025);
- by entropy bound: the most certain letters while their summed entropy stays within it (Ben-Hamu et al. 2025).

The picture shows both texts. The colour of a letter says at which step it was decided: blue first, red last. A minute
of training teaches how common words are spelled, not what they mean.
"""

from __future__ import annotations

import argparse
import colorsys
import pydoc_data.topics
import re
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from titok.ops import masked_decode_step

LENGTH = 64  # letters of a sequence
ALPHABET = "abcdefghijklmnopqrstuvwxyz .,"


def load_letters() -> str:
    """The topics of the Python documentation in the letters of the alphabet; all else becomes one space."""
    text = " ".join(pydoc_data.topics.topics.values())
    return re.sub(r"[^a-z.,]+", " ", text.lower())


class Denoiser(nn.Module):
    """Logits (B, N, V) of the letters at all positions, from tokens (B, N), of which some are the mask V.

    Convolutions over letters on both sides learn spelling within a minute. A Transformer of this size would need longer
    to find out which positions are neighbours.
    """

    def __init__(self, codes: int, width: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 7, padding=3), nn.GELU(), nn.Conv1d(width, width, 1))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.head = nn.Linear(width, codes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            hidden = hidden + block(norm(hidden).mT).mT
        logits: Tensor = self.head(self.norms[-1](hidden))
        return logits


def train(data: Tensor, codes: int, seconds: float, most_steps: int, seed: int) -> Denoiser:
    """A model that has learned for so long: cross-entropy at the masked positions of random pieces of the text."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = Denoiser(codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    begin, loss = time.monotonic(), torch.zeros(())
    for step in range(most_steps):
        elapsed = (time.monotonic() - begin) / seconds
        if elapsed >= 1:
            break
        for group in optimizer.param_groups:  # warm-up, then down to a tenth
            group["lr"] = 2e-3 * min((step + 1) / 20, 1 - 0.9 * elapsed)
        starts = torch.randint(len(data) - LENGTH, (16, 1), generator=generator)
        clean = data[starts + torch.arange(LENGTH)]
        share = torch.rand(16, 1, generator=generator).clamp_min(0.05)
        masked = torch.rand(clean.shape, generator=generator) < share
        logits = model(clean.masked_fill(masked, codes))
        loss = nn.functional.cross_entropy(logits[masked], clean[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f} nats per masked letter", flush=True)
    print(f"trained for {time.monotonic() - begin:.0f} s, {step + 1} steps, last loss {loss.item():.2f}")
    return model.eval()


@torch.inference_mode()
def decode(model: Denoiser, tokens: Tensor, mask: int, **rule: Any) -> tuple[Tensor, Tensor]:
    """Decodes the masks of tokens (B, N). Returns the letters and the step at which each was decided, both (B, N);
    -1 where it was given."""
    step_map = torch.full(tokens.shape, -1, dtype=torch.int32)
    step = 0
    while bool((tokens == mask).any()):
        result = masked_decode_step(
            *(tokens, model(tokens)), mask_token=mask, step=step, step_map=step_map, in_place=True, **rule
        )
        tokens = result.tokens
        step += 1
    return tokens, step_map


def draw(texts: list[tuple[str, list[str], Tensor]]) -> Image.Image:
    """A picture of texts: title, lines, and the step (lines, letters) at which each letter was decided."""
    font = ImageFont.load_default(15)
    line, cell = 26, 13
    longest = max(cell * len(text) for _, lines, _ in texts for text in lines)
    height = sum(line * (len(lines) + 2) for _, lines, _ in texts)
    picture = Image.new("RGB", (int(longest) + 24, height), "white")
    pen, y = ImageDraw.Draw(picture), 4
    for title, lines, steps in texts:
        pen.text((10, y), title, fill="black", font=font)
        y += line
        for text, row in zip(lines, steps.tolist(), strict=True):
            for n, (letter, step) in enumerate(zip(text, row, strict=True)):
                x = 10 + cell * n
                hue = 0.62 * (1 - step / max(int(steps.max()), 1))
                colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.45, 1.0))
                pen.rectangle((x, y, x + cell - 2, y + line - 4), fill="white" if step < 0 else colour)
                pen.text((x + cell / 2 - 1, y + line / 2 - 2), letter, fill="black", font=font, anchor="mm")
            y += line
        y += line
    return picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("masked_diffusion_text.png"), help="picture to write")
    parser.add_argument("--seconds", type=float, default=50.0, help="training time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="most training steps (default: %(default)s)")
    parser.add_argument("--prompt", default="the object is ", help="what every line begins with (%(default)r)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    letters, mask = load_letters(), len(ALPHABET)
    data = torch.tensor([ALPHABET.index(letter) for letter in letters])
    print(f"{len(letters)} letters")
    model = train(data, mask, options.seconds, options.steps, options.seed)

    prompt = torch.tensor([ALPHABET.index(letter) for letter in options.prompt.lower() if letter in ALPHABET])
    prompt = prompt[:LENGTH].long()
    rules: dict[str, dict[str, Any]] = {
        "threshold 0.5": {"policy": "threshold", "threshold": 0.5},
        "entropy bound 1 nat": {"policy": "entropy", "entropy_bound": 1.0},
    }
    texts = []
    for name, rule in rules.items():
        tokens = torch.full((3, LENGTH), mask)
        tokens[:, : len(prompt)] = prompt
        tokens, steps = decode(model, tokens, mask, temperature=0.8, top_p=0.95, seed=options.seed, **rule)
        lines = ["".join(ALPHABET[code] for code in row) for row in tokens.tolist()]
        title = f"{name}: {int(steps.max()) + 1} steps for {LENGTH - len(prompt)} letters"
        print(title, *lines, sep="\n  ")
        texts.append((title, lines, steps))
    draw(texts).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
