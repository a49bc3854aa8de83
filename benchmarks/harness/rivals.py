"""The models that titok is compared with, as sides: DiT-XL/2, models of a few steps, and MaskGIT."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.baselines import dit, few_steps
from benchmarks.baselines.quality import PUBLISHED
from benchmarks.harness import few_step_flops, flops
from benchmarks.harness.checks import Checked
from benchmarks.harness.sides import PAPER, Part, Run, Side, build, class_labels, count_parameters
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, engine, sample_tokens
from titok.config import SamplingConfig
from titok.data.images import to_uint8

# Of DiT without torch.compile on a GPU. At 8 images its products are large already; many more than 32 do not fit.
EAGER_BATCHES = (8, 32)
# MaskGIT's steps by resolution, as published: Chang et al. 2022, table 1.
MASKGIT_STEPS = {256: 8, 512: 12}


def maskgit_side(name: str, resolution: int, dtype: torch.dtype, device: str, *, published: bool = False) -> Side:
    """MaskGIT over (resolution / 16)^2 tokens, then the MaskGIT-VQGAN's decoder, both in titok's code.

    Args:
        published: with the published number of steps and without guidance; otherwise sampled like TiTok-L-32.
    """
    width = resolution // 16
    vqgan: MaskGITVQGAN = build(MaskGITVQGAN, dtype, device)
    sampling = SamplingConfig(
        steps=MASKGIT_STEPS.get(resolution, 8),
        guidance_schedule="constant",
        guidance_scale=0.0,
        temperature=4.5,
        softmax_annealing=False,
        mask_schedule="cosine",
        confidence="maskgit",
    )
    config = GeneratorConfig(width * width, vqgan.config.codebook_size)
    if published:
        config = dataclasses.replace(config, sampling=sampling)
    generator: MaskGIT = build(lambda: MaskGIT(config), dtype, device)

    def sample(labels: list[int], seed: int) -> Tensor:
        return sample_tokens(generator, labels, seed=seed)

    @torch.no_grad()
    def pictures(tokens: Tensor) -> Tensor:
        return to_uint8(vqgan.decode(tokens.view(-1, width, width)))

    def plain(run: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with engine.plain():
                return run(*arguments)

        return call

    def tokens(batch: int) -> Checked:
        # A token that rounding in bfloat16 changes in an early step changes later ones: a third of them was seen.
        return Checked(sample, lambda seed: (class_labels(batch, seed=seed), seed), plain(sample), tolerance=0.6)

    def decode(batch: int) -> Checked:
        def codes(seed: int) -> tuple[Tensor]:
            random = torch.Generator().manual_seed(seed)
            shape = (batch, width * width)
            return (torch.randint(vqgan.config.codebook_size, shape, generator=random).to(device),)

        return Checked(pictures, codes, plain(pictures))

    generator_flops = flops.generate(config).flops
    return Side(
        name=name,
        family="maskgit",
        tokens=width * width,
        steps=config.sampling.steps,
        parameters=count_parameters(generator, vqgan.decoder),
        flops=generator_flops + flops.vqgan_decoder(vqgan.config, 1, width, width).flops,
        flops_without_pixels=generator_flops,
        parts={"tokens": Part(tokens, 1, 1), "pixels": Part(decode)},
        counted=[
            # Where every step is returned, no CUDA graph is replayed, which the counter could not see into.
            (partial(sample_tokens, generator, class_labels(1), trace=True), 1),
            (decode(1), 1),
        ],
        note="titok's code",
        paper=None if published else PAPER["maskgit", resolution],
        quality=PUBLISHED.get(f"MaskGIT {resolution}") if published else None,
        modules=[generator, vqgan.decoder],
        prepares_weights=True,
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
    solver: Literal["ddpm", "dpm"] = "ddpm",
    compiled_batches: tuple[int, ...] = (),
) -> Side:
    """DiT-XL/2 of diffusers.

    Args:
        compile_mode: of `torch.compile`; None runs it as it is.
        all_steps: run every step; otherwise one step is timed and multiplied.
        solver: of the steps, as `DiT` takes it.
        compiled_batches: the batch sizes of a compiled DiT, each of which is compiled anew; empty tries those of the
            command.
    """
    model = dit.DiT(resolution, dtype, device, steps=steps, solver=solver, compile_mode=compile_mode)
    denoise_flops = flops.dit_pass(2, resolution // 16).flops * steps

    def denoise(batch: int) -> Run:
        if all_steps:  # its results are not checked: that would take as long as the measurement
            return partial(model.sample, batch)
        return Checked(
            model.step,
            lambda seed: (model.noise(batch, seed), steps // 2, seed),
            partial(model.step, compiled=False),
            must_be_compiled=compile_mode is not None,
        )

    def decode(batch: int) -> Run:
        return Checked(
            model.decode,
            lambda seed: (model.noise(batch, seed),),
            partial(model.decode, compiled=False),
            must_be_compiled=compile_mode is not None,
        )

    calls = 1 if all_steps else steps
    probe = (lambda batch: (partial(model.first_step, model.noise(batch)), steps)) if all_steps else None
    published = steps == 250 and solver == "ddpm"
    return Side(
        name=name,
        family="dit",
        tokens=(resolution // 16) ** 2,
        steps=steps,
        parameters=model.parameters(),
        flops=denoise_flops + flops.vae_decoder(1, resolution // 8).flops,
        flops_without_pixels=denoise_flops,
        parts={"denoise": Part(denoise, calls, calls, probe), "pixels": Part(decode)},
        counted=[(partial(model.first_step, model.noise(1)), steps), (decode(1), 1)],
        note="" if all_steps else f"{steps} x one step",
        batches=compiled_batches if compile_mode is not None else EAGER_BATCHES if device == "cuda" else (),
        must_be_compiled=compile_mode is not None,
        paper=PAPER["dit", resolution] if published else None,
        quality=PUBLISHED.get(f"DiT {resolution}") if published else None,
        modules=[model.transformer, model.vae.decoder],
    )


def one_step_side(name: str, model: few_steps.OneStep, network_flops: int, pixel_flops: int, quality: str) -> Side:
    """One pass of a transformer, and of an autoencoder's decoder where it has one.

    Args:
        network_flops, pixel_flops: of one image in the transformer and in the decoder.
        quality: key of `PUBLISHED`.
    """
    in_pixels = model.autoencoder is None
    network = Part(
        lambda batch: Checked(model.step, partial(model.inputs, batch), model.step), 1, 0 if in_pixels else 1
    )
    parts = {"network": network}
    if not in_pixels:
        parts["pixels"] = Part(
            lambda batch: Checked(model.decode, lambda seed: model.inputs(batch, seed)[:1], model.decode)
        )
    size = model.config["sample_size"] // model.config["patch_size"]
    return Side(
        name=name,
        family="one step",
        tokens=size * size,
        steps=1,
        parameters=count_parameters(*model.modules),
        flops=network_flops + pixel_flops,
        flops_without_pixels=0 if in_pixels else network_flops,
        parts=parts,
        counted=[(part.prepare(1), 1) for part in parts.values()],
        quality=PUBLISHED.get(quality),
        modules=model.modules,
    )


def latent_step_side(name: str, resolution: int, dtype: torch.dtype, device: str, *, deep: bool) -> Side:
    """One pass of DiT-XL with `AutoencoderKL`, or if `deep` with `AutoencoderDC`."""
    model = few_steps.one_latent_step(resolution, dtype, device, deep=deep)
    if not deep:
        network, pixels = flops.dit_pass(1, resolution // 16), flops.vae_decoder(1, resolution // 8)
        return one_step_side(name, model, network.flops, pixels.flops, f"one latent step {resolution}")
    config, grid = few_steps.DC_AE, resolution // 32
    channels, layers = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
    attending = config["decoder_block_types"].count("EfficientViTBlock")
    network = flops.dit_pass(1, grid, patch=1, channels=config["latent_channels"])
    pixels = few_step_flops.dc_decoder(1, grid, channels, layers, config["latent_channels"], attending)
    return one_step_side(name, model, network.flops, pixels.flops, f"one deep latent step {resolution}")


def pixel_step_side(name: str, resolution: int, dtype: torch.dtype, device: str) -> Side:
    """One pass of a transformer over pixels."""
    model = few_steps.one_pixel_step(resolution, dtype, device)
    config = model.config
    network = flops.dit_pass(
        1,
        resolution // config["patch_size"],
        width=config["num_attention_heads"] * config["attention_head_dim"],
        layers=config["num_layers"],
        patch=config["patch_size"],
        channels=3,
        outputs=3,
    )
    return one_step_side(name, model, network.flops, 0, f"one pixel step {resolution}")


def amused_side(name: str, resolution: int, dtype: torch.dtype, device: str) -> Side:
    """aMUSEd: 12 guided steps of its U-ViT, then its VQ decoder."""
    model = few_steps.Amused(resolution, dtype, device)
    side, vq = model.side, few_steps.AMUSED_VQ
    channels = vq["block_out_channels"]
    sizes = {"hidden": "hidden_size", "layers": "num_hidden_layers", "mlp": "intermediate_size"}
    sizes |= {"channels": "block_out_channels", "embedding": "in_channels", "codes": "codebook_size"}
    sizes |= {"text_width": "encoder_hidden_size", "blocks": "num_res_blocks", "halved": "downsample"}
    about = model.transformer.config
    options = {name: about[key] for name, key in sizes.items()}
    condition = about["cond_embed_dim"] + about["micro_cond_embed_dim"]
    one_pass = few_step_flops.uvit2d_pass(2, side, few_steps.TEXT_TOKENS, condition=condition, **options)
    steps = few_steps.AMUSED_STEPS
    blocks = vq["layers_per_block"] + 1
    pixels = flops.vae_decoder(1, side, channels, vq["latent_channels"], blocks=blocks, attends=False)
    return Side(
        name=name,
        family="amused",
        tokens=side * side,
        steps=steps,
        parameters=count_parameters(*model.modules),
        flops=steps * one_pass.flops + pixels.flops,
        flops_without_pixels=steps * one_pass.flops,
        parts={
            "tokens": Part(lambda batch: Checked(model.sample, partial(model.inputs, batch), model.sample), 1, 1),
            "pixels": Part(
                lambda batch: Checked(model.decode, lambda seed: (model.codes(batch, seed),), model.decode)
            ),
        },
        counted=[
            (lambda: model.sample(*model.inputs(1, 0)), 1),
            (lambda: model.decode(model.codes(1, 0)), 1),
        ],
        note="without its text encoder",
        modules=model.modules,
    )
