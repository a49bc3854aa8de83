"""DiT-XL/2 (Peebles and Xie 2023) as diffusers builds it from the published configurations, with random weights.

The configurations are those of `facebook/DiT-XL-2-256` and `facebook/DiT-XL-2-512`, and of the Stable Diffusion
VAE that decodes their latents. diffusers runs unmodified.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,  # side of the latents: 32 for 256 pixels, 64 for 512 pixels
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}
GUIDANCE, NO_CLASS = 4.0, 1000


def why_not() -> str | None:
    """Why DiT cannot run here, or None if it can."""
    return None if importlib.util.find_spec("diffusers") else "diffusers is not installed"


def transformer(config: dict[str, Any] | None = None) -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_config(config or TRANSFORMER).eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(VAE).eval()


class DiT:
    """Guided sampling. All steps do the same work, so that one step can be timed for all of them.

    Args:
        resolution: 256 or 512 pixels.
        steps: number of steps of the sampler.
        solver: "ddpm", as published, or "dpm": DPM-Solver++ of second order (Lu et al. 2022).
        compile_mode: the mode for `torch.compile`, which compiles for each batch size anew; None runs eagerly.
    """

    def __init__(
        self,
        resolution: int,
        dtype: torch.dtype,
        device: str,
        *,
        steps: int = 250,
        solver: Literal["ddpm", "dpm"] = "ddpm",
        compile_mode: str | None = None,
    ) -> None:
        from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
        from diffusers.utils import logging

        logging.set_verbosity_error()  # diffusers warns of every conversion to bfloat16
        self.side, self.dtype, self.device, self.steps = resolution // 8, dtype, device, steps
        self.transformer = transformer({**TRANSFORMER, "sample_size": self.side}).to(device, dtype)
        self.vae = vae().to(device, dtype)
        self.scheduler = DDPMScheduler() if solver == "ddpm" else DPMSolverMultistepScheduler()
        self.scheduler.set_timesteps(steps)
        self.predict = self.transformer
        self.decode_latents = self.vae.decode
        if compile_mode is not None:
            self.predict = torch.compile(self.transformer, mode=compile_mode, dynamic=False)
            self.decode_latents = torch.compile(self.vae.decode, mode=compile_mode, dynamic=False)

    def parameters(self) -> int:
        """Number of weights of the transformer and the VAE's decoder."""
        used = (self.transformer, self.vae.decoder, self.vae.post_quant_conv)
        return sum(p.numel() for module in used for p in module.parameters())

    def noise(self, batch: int, seed: int = 0) -> Tensor:
        """Latents to start from: (batch, 4, side, side)."""
        random = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 4, self.side, self.side, generator=random).to(self.device, self.dtype)

    @torch.no_grad()
    def step(self, latents: Tensor, index: int, seed: int | None = None, *, compiled: bool = True) -> Tensor:
        """One guided step: both passes in one batch of twice the size, guidance, and the sampler's update.

        Args:
            seed: of the noise that the sampler adds; None goes on with PyTorch's global generator.
            compiled: False runs the model as it is, also where `compile_mode` was given.
        """
        if seed is not None:
            torch.manual_seed(seed)
        batch, t = len(latents), self.scheduler.timesteps[index]
        labels = torch.tensor([207] * batch + [NO_CLASS] * batch, device=self.device)
        times = t.expand(2 * batch).to(self.device)
        predict = self.predict if compiled else self.transformer
        both = predict(torch.cat([latents, latents]), timestep=times, class_labels=labels).sample
        cond, uncond = both[:, : latents.shape[1]].chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        return self.scheduler.step(guided, t, latents).prev_sample

    def first_step(self, latents: Tensor) -> Tensor:
        """The first step of a sample, also for a solver that remembers earlier steps."""
        self.scheduler.set_timesteps(self.steps)
        return self.step(latents, 0)

    @torch.no_grad()
    def sample(self, batch: int) -> Tensor:
        """Latents after all steps."""
        self.scheduler.set_timesteps(self.steps)
        latents = self.noise(batch)
        for index in range(self.steps):
            latents = self.step(latents, index)
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor, *, compiled: bool = True) -> Tensor:
        """latents (B, 4, side, side) -> images (B, 3, 8 side, 8 side)."""
        decode = self.decode_latents if compiled else self.vae.decode
        return decode(latents / self.vae.config.scaling_factor).sample
