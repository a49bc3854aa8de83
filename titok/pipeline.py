"""Labels to pictures: a generator and the tokenizer whose tokens it was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from titok.config import SamplingConfig
from titok.generator import MaskGIT
from titok.images import to_uint8
from titok.profiling import ranged
from titok.sampling import sample_tokens
from titok.streaming import BatchSize, generate_batches, one_by_one
from titok.tokenizer import TiTok


class Pipeline:
    """`Pipeline(tokenizer, generator)(labels)` generates pictures.

    Raises:
        ValueError: tokenizer and generator do not share token count, codebook size and device, or the tokenizer
            cannot decode to pictures.
    """

    def __init__(self, tokenizer: TiTok, generator: MaskGIT) -> None:
        t, g = tokenizer.config, generator.config
        if t.bottleneck != "vq":
            raise ValueError("tokenizer: expected a vector-quantised one, got a VAE: MaskGIT generates codes")
        if t.head == "proxy" and not t.pixel_decoder:
            raise ValueError("tokenizer: expected one that decodes to pictures, got one that ends at proxy logits")
        ours, theirs = (t.num_latent_tokens, t.codebook_size), (g.num_latent_tokens, g.codebook_size)
        if ours != theirs:
            wanted = f"{theirs[0]} tokens of {theirs[1]} codes, as the generator"
            raise ValueError(f"tokenizer: expected {wanted}, got {ours[0]} of {ours[1]}")
        if tokenizer.device != generator.device:
            raise ValueError(
                f"tokenizer: expected on {generator.device}, as the generator, got {tokenizer.device}"
            )
        self.tokenizer, self.generator = tokenizer.eval(), generator.eval()

    @classmethod
    def from_pretrained(
        cls,
        tokenizer: str | os.PathLike[str],
        generator: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Pipeline:
        """Both models from folders, files or repository ids; see `TiTok.from_pretrained` for what is raised."""
        return cls(
            TiTok.from_pretrained(tokenizer, dtype=dtype, device=device),
            MaskGIT.from_pretrained(generator, dtype=dtype, device=device),
        )

    @torch.no_grad()
    @ranged("generate")
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        *,
        seed: int = 0,
        first_sample: int = 0,
        sampling: SamplingConfig | None = None,
        rounding: Literal["nearest", "truncate"] = "nearest",
    ) -> Tensor:
        """One picture for each label, uint8 (B, H, W, channels) on the models' device.

        Args:
            labels, seed, first_sample, sampling: as `sample_tokens` takes them; what is raised too.
            rounding: to 8 bits; "truncate" as the published FID script does.
        """
        tokens = sample_tokens(self.generator, labels, sampling, seed=seed, first_sample=first_sample)
        return to_uint8(self.tokenizer.decode(tokens), rounding)

    def generate_many(
        self,
        labels: Tensor | Sequence[int],
        *,
        batch_size: BatchSize = "auto",
        seed: int = 0,
        first_sample: int = 0,
        sampling: SamplingConfig | None = None,
        rounding: Literal["nearest", "truncate"] = "nearest",
        progress: bool | None = None,
    ) -> Iterator[Tensor]:
        """One picture for each label, in order, uint8 (H, W, channels) on the CPU: as many as there are labels, in the
        memory of two batches. A GPU computes the next batch while the caller uses the pictures of the last.

        The pictures are those of one call with all labels, whatever the batch size (see `sample_tokens`; a level of
        8 bits may differ where matrix products round differently for another batch size). A run that was stopped
        after k pictures goes on with `labels[k:]` and `first_sample=k`.

        Args:
            batch_size: "auto" doubles it for as long as that is faster and fits into memory.
            progress: a bar on stderr; None shows it where that is a terminal.
            labels, seed, first_sample, sampling, rounding: as when the pipeline is called; what is raised too, at once.
        """
        batches = generate_batches(
            self,
            labels,
            batch_size=batch_size,
            seed=seed,
            first_sample=first_sample,
            sampling=sampling,
            rounding=rounding,
            progress=progress,
        )
        return one_by_one(batches)
