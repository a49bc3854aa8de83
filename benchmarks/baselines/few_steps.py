"""Models of one step or a few, as diffusers builds them, with random weights: what TiTok competes with today.

diffusers runs unmodified. Configurations are the published ones: `mit-han-lab/dc-ae-f32c32-in-1.0`, `amused/amused-256`
and `amused/amused-512`. `one_latent_step` and `one_pixel_step` do the work of one-step models, whose own code is in no
public package: they have the tokens, width and depth of the published models, and DiT's blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import dit

DC_AE: dict[str, Any] = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
}
PIXEL_STEP: dict[str, Any] = {
    **dit.TRANSFORMER,
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 32,
    "patch_size": 32,
    "sample_size": 512,
}
UVIT: dict[str, Any] = {}  # diffusers' defaults are those of aMUSEd
AMUSED_VQ: dict[str, Any] = {
    "block_out_channels": [128, 256, 256, 512, 768],
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "latent_channels": 64,
    "layers_per_block": 2,
    "lookup_from_codebook": True,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 8192,
}
AMUSED_STEPS, AMUSED_GUIDANCE = 12, 10.0
TEXT_TOKENS = 77  # of CLIP


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


class OneStep:
    """One pass of a transformer over noise; with an autoencoder, whose decoder makes the picture of its result.

    Args:
        config: of `DiTTransformer2DModel`.
        autoencoder: `AutoencoderKL`, `AutoencoderDC`, or None for a transformer over pixels.
    """

    def __init__(self, config: dict[str, Any], autoencoder: Any, dtype: torch.dtype, device: str) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.transformer = dit.transformer(config).to(device, dtype)
        self.autoencoder = None if autoencoder is None else autoencoder.eval().to(device, dtype)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What generation uses."""
        if self.autoencoder is None:
            return [self.transformer]
        extra = getattr(self.autoencoder, "post_quant_conv", None)
        return [self.transformer, self.autoencoder.decoder, *([] if extra is None else [extra])]

    def inputs(self, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Noise (batch, channels, side, side) and labels (batch,)."""
        side = self.config["sample_size"]
        start = noise((batch, self.config["in_channels"], side, side), self.dtype, self.device, seed)
        return start, torch.full((batch,), (207 + seed) % dit.NO_CLASS, device=self.device)

    @torch.no_grad()
    def step(self, start: Tensor, labels: Tensor) -> Tensor:
        """What the model makes of noise in one step: the noise minus the predicted direction."""
        times = torch.full((len(start),), 999, device=self.device)
        predicted = self.transformer(start, timestep=times, class_labels=labels).sample
        return start - predicted[:, : start.shape[1]]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) of latents."""
        assert self.autoencoder is not None
        result: Tensor = self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).sample
        return result


def one_latent_step(resolution: int, dtype: torch.dtype, device: str, *, deep: bool) -> OneStep:
    """DiT-XL over the latents of Stable Diffusion's `AutoencoderKL`, or of the `AutoencoderDC` if `deep`.

    `AutoencoderDC` has a quarter of the latent positions a side, so that patches of one position make a quarter of the
    tokens.
    """
    from diffusers import AutoencoderDC

    if not deep:
        return OneStep({**dit.TRANSFORMER, "sample_size": resolution // 8}, dit.vae(), dtype, device)
    latents = {
        "in_channels": DC_AE["latent_channels"],
        "out_channels": 2 * DC_AE["latent_channels"],
        "patch_size": 1,
        "sample_size": resolution // 32,
    }
    return OneStep({**dit.TRANSFORMER, **latents}, AutoencoderDC.from_config(DC_AE), dtype, device)


def one_pixel_step(resolution: int, dtype: torch.dtype, device: str) -> OneStep:
    """A transformer over 16 x 16 patches of pixels, with the work of pMF-L/32 at 512 and pMF-L/16 at 256 pixels."""
    config = {**PIXEL_STEP, "sample_size": resolution, "patch_size": PIXEL_STEP["patch_size"] * resolution // 512}
    return OneStep(config, None, dtype, device)


class Amused:
    """aMUSEd's U-ViT, scheduler and VQ decoder. Noise replaces the result of the text encoder, which runs once."""

    def __init__(self, resolution: int, dtype: torch.dtype, device: str) -> None:
        from diffusers import UVit2DModel, VQModel
        from diffusers.schedulers import AmusedScheduler

        self.resolution, self.dtype, self.device = resolution, dtype, device
        self.side = resolution // 2 ** (len(AMUSED_VQ["block_out_channels"]) - 1)
        halved = resolution > 256
        size = {"sample_size": self.side, "downsample": halved, "upsample": halved}
        self.transformer = UVit2DModel.from_config({**UVIT, **size}).eval().to(device, dtype)
        self.vq = VQModel.from_config(AMUSED_VQ).eval().to(device, dtype)
        self.mask = self.transformer.config.vocab_size - 1
        self.scheduler = AmusedScheduler(mask_token_id=self.mask)
        self.scheduler.set_timesteps(AMUSED_STEPS, device=device)

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [self.transformer, self.vq.decoder, self.vq.post_quant_conv]

    def inputs(self, batch: int, seed: int) -> tuple[Tensor, Tensor, int]:
        """Embeddings of prompts and of empty prompts, per token and pooled, and the seed of the scheduler's noise."""
        width = self.transformer.config.encoder_hidden_size
        tokens = noise((2 * batch, TEXT_TOKENS, width), self.dtype, self.device, seed)
        pooled = noise((2 * batch, self.transformer.config.cond_embed_dim), self.dtype, self.device, seed + 1)
        return tokens, pooled, seed

    def masked(self, batch: int) -> Tensor:
        return torch.full((batch, self.side, self.side), self.mask, device=self.device)

    @torch.no_grad()
    def step(self, text: Tensor, pooled: Tensor, codes: Tensor, time: Tensor, random: torch.Generator) -> Tensor:
        """One guided step: both passes in one batch of twice the size, and the scheduler's update."""
        about = torch.tensor([self.resolution, self.resolution, 0, 0, 6], device=self.device, dtype=self.dtype)
        logits = self.transformer(
            torch.cat([codes, codes]),
            micro_conds=about.expand(2 * len(codes), -1),
            pooled_text_emb=pooled,
            encoder_hidden_states=text,
        )
        uncond, cond = logits.chunk(2)
        guided = uncond + AMUSED_GUIDANCE * (cond - uncond)
        result: Tensor = self.scheduler.step(guided, time, codes, generator=random).prev_sample
        return result

    def sample(self, text: Tensor, pooled: Tensor, seed: int) -> Tensor:
        """Codes (batch, side, side) after all steps."""
        random, codes = torch.Generator(self.device).manual_seed(seed), self.masked(len(text) // 2)
        for time in self.scheduler.timesteps:
            codes = self.step(text, pooled, codes, time, random)
        return codes

    def codes(self, batch: int, seed: int) -> Tensor:
        """Random codes (batch, side, side)."""
        random = torch.Generator().manual_seed(seed)
        return torch.randint(AMUSED_VQ["num_vq_embeddings"], (batch, self.side, self.side), generator=random).to(
            self.device
        )

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) of codes."""
        shape = (*codes.shape, self.vq.config.latent_channels)
        pictures: Tensor = self.vq.decode(codes, force_not_quantize=True, shape=shape).sample
        return pictures.clamp(0, 1)
