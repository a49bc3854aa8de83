"""What the page of `titok demo` computes, without the page.

Pictures are numpy arrays uint8 (H, W, channels), (H, W) where they are grey. Tokens are lists of K integers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titok.checks import check_labels
from titok.data.images import psnr, read_image, to_uint8
from titok.generation.pipeline import Pipeline
from titok.generation.sampling import sample_steps
from titok.models.tokenizer import TiTok

Picture = np.ndarray[Any, Any]
SHOWN_PIXELS = 256  # small pictures are enlarged to about this size, so that a browser does not blur them


class Stage(NamedTuple):
    """A picture on its way through the decoding steps.

    Attributes:
        picture: decoded from the tokens, with the mean of all codes where a token is still masked.
        caption: which step it is, and how many tokens are decided.
        tokens: K integers, None where a token is still masked.
    """

    picture: Picture
    caption: str
    tokens: list[int | None]


class Reconstruction(NamedTuple):
    """A picture, what its tokens decode to, the ratio between the two in dB, and the tokens."""

    original: Picture
    copy: Picture
    psnr: float
    tokens: list[int]


class Demo:
    """A tokenizer and a generator, for any number of visitors at a time: it keeps nothing between two calls.

    Args:
        pipe: of a vector-quantised tokenizer that decodes to pictures.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.tokenizer, self.generator = pipe, pipe.tokenizer, pipe.generator
        self.num_classes = self.generator.config.num_classes
        self.length = self.tokenizer.config.num_latent_tokens
        self.codes = self.tokenizer.config.codebook_size

    # -----------------------------------------------------------------------------------------------------------
    # What the tabs do

    def generate(
        self,
        label: int | None,
        seed: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
    ) -> Iterator[Stage]:
        """A picture of a class, step by step; the last one is the result.

        Args:
            label: None for no class.
            seed: in [0, 2^64).
            steps, guidance, temperature: of the decoding; None takes those of the generator.

        Raises:
            ValueError, TypeError: a value is out of its range.
        """
        start = [self.generator.mask_token] * self.length
        return self._sample(start, label, seed, steps=steps, guidance=guidance, temperature=temperature)

    def inpaint(
        self, tokens: Sequence[int], positions: Sequence[int], label: int | None, seed: int
    ) -> Iterator[Stage]:
        """Draws the tokens at `positions` anew, step by step, and keeps the others.

        Args:
            tokens: K of them, as `parse_tokens` returns them.
            positions: in [0, K), as `parse_positions` returns them.
            label, seed: as of `generate`, which also says what is raised.
        """
        start = list(tokens)
        for position in positions:
            start[position] = self.generator.mask_token
        return self._sample(start, label, seed)

    def reconstruct(self, path: str | os.PathLike[str] | None) -> Reconstruction:
        """Reads a picture, and decodes its tokens.

        Raises:
            ValueError: there is no picture, or the file is not a readable one.
        """
        image = self._read(path)
        tokens = self.tokenizer.encode(image)
        originals, copies = to_uint8(image.cpu()), self._decode(tokens)
        ratio = float(psnr(originals, copies)[0])
        return Reconstruction(_shown(originals[0]), _shown(copies[0]), ratio, tokens[0].tolist())

    def decode(self, tokens: Sequence[int]) -> Picture:
        """The picture of K tokens."""
        return _shown(self._decode(torch.tensor([list(tokens)], device=self.tokenizer.device))[0])

    def swap(
        self, first: Sequence[int], second: Sequence[int], positions: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """The tokens of two pictures with those at `positions` exchanged."""
        a, b = list(first), list(second)
        for position in positions:
            a[position], b[position] = second[position], first[position]
        return a, b

    # -----------------------------------------------------------------------------------------------------------
    # What visitors write

    def parse_tokens(self, text: str) -> list[int]:
        """K tokens from a text such as "17 3 250".

        Raises:
            ValueError: there are not K of them, or one is no code of the tokenizer; the message is a sentence.
        """
        words = re.split(r"[\s,;]+", text.strip()) if text.strip() else []
        tokens = [int(word) if _is_number(word) else -1 for word in words]
        for word, token in zip(words, tokens, strict=True):
            if not 0 <= token < self.codes:
                raise ValueError(f"Tokens are integers from 0 to {self.codes - 1}, and {word[:20]!r} is none.")
        if len(tokens) != self.length:
            raise ValueError(f"A picture has {self.length} tokens, and there are {len(tokens)} here.")
        return tokens

    def parse_positions(self, text: str) -> list[int]:
        """Positions of tokens, each once and in order, from a text such as "0-3, 7".

        Raises:
            ValueError: there is none, or one that a picture does not have; the message is a sentence.
        """
        found: set[int] = set()
        for word in re.split(r"[\s,;]+", text.strip()) if text.strip() else []:
            first, dash, last = word.partition("-")
            bounds = (first, last if dash else first)
            if not all(_is_number(bound) and int(bound) < self.length for bound in bounds):
                raise ValueError(
                    f"Positions are integers from 0 to {self.length - 1}, or ranges of them such as 0-3, and "
                    f"{word[:20]!r} is none."
                )
            found.update(range(int(bounds[0]), int(bounds[1]) + 1))
        if not found:
            raise ValueError("Positions are missing: give at least one, such as 0-3.")
        return sorted(found)

    # -----------------------------------------------------------------------------------------------------------

    def _sample(
        self,
        start: list[int],
        label: int | None,
        seed: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
    ) -> Iterator[Stage]:
        options = {"steps": steps, "guidance_scale": guidance, "temperature": temperature}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        sampling = dataclasses.replace(self.generator.config.sampling, **given)
        labels = torch.tensor([self.generator.no_class if label is None else label])
        check_labels(labels, self.num_classes)
        init_tokens = torch.tensor([start])
        history = sample_steps(self.generator, labels, sampling, seed=seed, init_tokens=init_tokens)
        return self._stages(tokens[0] for tokens in history)

    def _stages(self, history: Iterator[Tensor]) -> Iterator[Stage]:
        """The stages of tokens (K,) before and after each step, as they come; a step that decides nothing has none."""
        before = None
        for step, tokens in enumerate(history):
            masked = tokens == self.generator.mask_token
            count = int(masked.sum())
            if count == before:
                continue
            before = count
            caption = f"step {step}: {self.length - count} of {self.length}" if step else "start"
            shown = [
                None if hidden else token for token, hidden in zip(tokens.tolist(), masked.tolist(), strict=True)
            ]
            yield Stage(_shown(self._decode(tokens[None], masked[None])[0]), caption, shown)

    @torch.no_grad()
    def _decode(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, K) to pictures (B, H, W, channels) uint8 on the CPU; masked ones are the mean of all codes."""
        if masked is None or not bool(masked.any()):
            return to_uint8(self.tokenizer.decode(tokens)).cpu()
        quantizer = _quantizer(self.tokenizer)
        latents = quantizer.lookup(tokens.masked_fill(masked, 0))
        mean = quantizer.lookup(torch.arange(self.codes, device=tokens.device)).mean(dim=0)
        latents = torch.where(masked[..., None], mean, latents)
        return to_uint8(self.tokenizer.decode_latents(latents)).cpu()

    def _read(self, path: str | os.PathLike[str] | None) -> Tensor:
        if path is None:
            raise ValueError("Upload a picture first.")
        config = self.tokenizer.config
        try:
            image = read_image(path, config.image_size, config.channels)
        except (ValueError, OSError) as error:
            raise ValueError("This file is not a picture that can be read here. Try a PNG or a JPEG.") from error
        return image[None].to(self.tokenizer.device)


def _quantizer(tokenizer: TiTok) -> Any:
    if tokenizer.quantizer is None:
        raise ValueError("tokenizer: expected a vector-quantised one, got a VAE")
    return tokenizer.quantizer


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _shown(picture: Tensor) -> Picture:
    """A picture (H, W, channels) as the page shows it: enlarged by a whole factor, (H, W) where it is grey."""
    factor = max(1, math.ceil(SHOWN_PIXELS / max(picture.shape[:2])))
    enlarged = picture.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1).numpy()
    return enlarged[..., 0] if enlarged.shape[-1] == 1 else enlarged
