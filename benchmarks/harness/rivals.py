"""The models that titok is compared with, as sides: DiT-XL/2 and MaskGIT with its 2D tokenizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import dit
from benchmarks.harness import flops
from benchmarks.harness.sides import PAPER, Part, Run, Side, build, class_labels, count_parameters
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, sample_tokens
from titok.data.images import to_uint8

# Of DiT without torch.compile on a GPU. At 8 images its products are large already; many more than 32 do not fit.
EAGER_BATCHES = (8, 32)


def maskgit_side(resolution: int, dtype: torch.dtype, device: str) -> Side:
    """MaskGIT over (resolution / 16)^2 tokens, then the MaskGIT-VQGAN's decoder, both in titok's code."""
    width = resolution // 16
    vqgan: MaskGITVQGAN = build(MaskGITVQGAN, dtype, device)
    config = GeneratorConfig(width * width, vqgan.config.codebook_size)
    generator: MaskGIT = build(lambda: MaskGIT(config), dtype, device)

    @torch.no_grad()
    def pictures(tokens: Tensor) -> Any:
        return to_uint8(vqgan.decode(tokens.view(-1, width, width)))

    def decode(batch: int) -> Run:
        return partial(pictures, torch.zeros(batch, width * width, dtype=torch.int64, device=device))

    generator_flops = flops.generate(config).flops
    return Side(
        name="MaskGIT + MaskGIT-VQGAN",
        family="maskgit",
        tokens=width * width,
        steps=config.sampling.steps,
        parameters=count_parameters(generator, vqgan.decoder),
        flops=generator_flops + flops.vqgan_decoder(vqgan.config, 1, width, width).flops,
        flops_without_pixels=generator_flops,
        parts={
            "tokens": Part(lambda batch: partial(sample_tokens, generator, class_labels(batch)), 1, 1),
            "pixels": Part(decode),
        },
        counted=[
            # Where every step is returned, no CUDA graph is replayed, which the counter could not see into.
            (partial(sample_tokens, generator, class_labels(1), trace=True), 1),
            (decode(1), 1),
        ],
        note="titok's code",
        paper=PAPER["maskgit", resolution],
        modules=[generator, vqgan.decoder],
    )


def dit_side(
    name: str,
    resolution: int,
    dtype: torch.dtype,
    device: str,
    *,
    steps: int,
    compile_mode: str | None,
    all_steps: bool,
    compiled_batches: tuple[int, ...] = (),
) -> Side:
    """DiT-XL/2 of diffusers.

    Args:
        compile_mode: of `torch.compile`; None runs it as it is.
        all_steps: run every step; otherwise one step is timed and multiplied.
        compiled_batches: the batch sizes of a compiled DiT, each of which is compiled anew; empty tries those of the
            command.
    """
    model = dit.DiT(resolution, dtype, device, steps=steps, compile_mode=compile_mode)
    denoise_flops = flops.dit_pass(2, resolution // 16).flops * steps

    def denoise(batch: int) -> Run:
        if all_steps:
            return partial(model.sample, batch)
        return partial(model.step, model.noise(batch), steps // 2)

    calls = 1 if all_steps else steps
    return Side(
        name=name,
        family="dit",
        tokens=(resolution // 16) ** 2,
        steps=steps,
        parameters=model.parameters(),
        flops=denoise_flops + flops.vae_decoder(1, resolution // 8).flops,
        flops_without_pixels=denoise_flops,
        parts={
            "denoise": Part(denoise, calls, calls),
            "pixels": Part(lambda batch: partial(model.decode, model.noise(batch))),
        },
        counted=[(partial(model.step, model.noise(1), 0), steps), (partial(model.decode, model.noise(1)), 1)],
        note="" if all_steps else f"{steps} x one step",
        batches=compiled_batches if compile_mode is not None else EAGER_BATCHES if device == "cuda" else (),
        must_be_compiled=compile_mode is not None,
        paper=PAPER["dit", resolution] if steps == 250 else None,
        modules=[model.transformer, model.vae.decoder],
    )
