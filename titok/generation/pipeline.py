"""Labels to pictures: a generator and the tokenizer whose tokens it was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titok.config import SamplingConfig
from titok.data.images import check_rounding, to_uint8
from titok.generation.batches import BatchSize, generate_batches, one_by_one
from titok.generation.decode_loop import decode_captured
from titok.generation.sampling import as_labels, captures, evaluating, sample_tokens
from titok.generation.stopwatch import Stopwatch
from titok.inference.memory import memory_that_stays
from titok.inference.prepared import float32_copy, select
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.ops import last_backends
from titok.profiling import annotate, ranged


@dataclass(frozen=True)
class _Painter:
    """Tokens to 8-bit pictures, behind the decoding loop in one CUDA graph."""

    tokenizer: TiTok
    rounding: Literal["nearest", "truncate"]

    def __call__(self, tokens: Tensor) -> Tensor:
        return to_uint8(self.tokenizer.decode(tokens), self.rounding)

    def parameters(self) -> Iterable[Tensor]:
        return self.tokenizer.parameters()


class Pipeline:
    """`Pipeline(tokenizer, generator)(labels)` generates pictures.

    Args:
        engine: "fast", or "plain" to compute as the models do in training, without prepared weights, kernels of ours
            and CUDA graphs: slower, for checking the other against, with less memory.

    Raises:
        ValueError: tokenizer and generator do not share token count, codebook size and device, or the tokenizer
            cannot decode to pictures.
    """

    def __init__(self, tokenizer: TiTok, generator: MaskGIT, *, engine: Literal["fast", "plain"] = "fast") -> None:
        select(engine)
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
        self.tokenizer, self.generator, self.engine = tokenizer.eval(), generator.eval(), engine
        self._stages = Stopwatch(tokenizer.device)

    @classmethod
    def from_pretrained(
        cls,
        tokenizer: str | os.PathLike[str],
        generator: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        engine: Literal["fast", "plain"] = "fast",
    ) -> Pipeline:
        """Both models from folders, files or repository ids; see `TiTok.from_pretrained` for what is raised."""
        return cls(
            TiTok.from_pretrained(tokenizer, dtype=dtype, device=device),
            MaskGIT.from_pretrained(generator, dtype=dtype, device=device),
            engine=engine,
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
        check_rounding(rounding)
        watch = self._stages = Stopwatch(self.tokenizer.device)
        with select(self.engine), memory_that_stays():
            drawn = as_labels(self.generator, labels, seed, first_sample)
            if captures(self.generator, drawn):
                with watch.stage("generate"), evaluating(self.generator):
                    painter = _Painter(self.tokenizer, rounding)
                    config = sampling or self.generator.config.sampling
                    return decode_captured(self.generator, config, drawn, seed, first_sample, painter)
            with watch.stage("generator"):
                tokens = sample_tokens(self.generator, drawn, sampling, seed=seed, first_sample=first_sample)
            tokenizer = float32_copy(self.tokenizer)
            with annotate("detokenize"):
                with watch.stage("decoder"):
                    seen = tokenizer.decode_head(tokens)
                with watch.stage("pixel decoder"):
                    images = tokenizer.decode_pixels(seen)
            with watch.stage("to 8 bits"):
                return to_uint8(images, rounding)

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

    def stats(self) -> dict[str, dict[str, Any]]:
        """Of the latest call: `"seconds"` by stage, and `"backends"`, which implementation ran each op last.

        With CUDA graphs the one stage is "generate"; on a GPU this waits for the call to end.
        """
        return {"seconds": self._stages.seconds(), "backends": last_backends()}
