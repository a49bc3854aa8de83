"""The tokenizer's single-stage loop: reconstruct pixels, keep the codebook alive."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.data.folders import Images, read_batches, shifted
from titok.models.tokenizer import TiTok
from titok.training.config import TokenizerTraining
from titok.training.run import Run, seed_of, shuffled_batches


def train_tokenizer(
    images: Images | Tensor,
    config: TokenizerTraining,
    out_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> TiTok:
    """Trains a tokenizer from scratch and leaves it in `out_dir` as `TiTok.save_pretrained` does.

    Args:
        images: a tensor (n, C, H, W) with values in [0, 1], or anything with a length that gives (C, H, W) by index,
            such as `titok.data.folders.ImageFolder`.
        config: the model and the schedule.
        out_dir: also takes `training.safetensors`, from which `resume` continues; without one, `resume` starts.
        progress: show a progress bar: loss, PSNR of the batch in dB, and how many codes are in use.

    Returns:
        the model, in eval mode.

    Raises:
        FileExistsError: `out_dir` holds a run, and `resume` is False.
        ValueError: no images, images that do not fit the model, or a run in `out_dir` that was another one.
        FloatingPointError: the loss is not finite any more.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed_of(config.seed))
        model = TiTok(config.model)
        if config.position_std is not None:
            for name, parameter in model.named_parameters():
                if name.endswith(("_positions", "_token", "_tokens")):
                    torch.nn.init.normal_(parameter, std=config.position_std)
        model.to(device)
    run = Run(model, config, out_dir, resume=resume, data={"images": len(images)})
    loop = _Loop(run, config)
    batches = read_batches(images, shuffled_batches(len(images), config.batch_size, config.seed, run.step))
    after = loop.restart_codes if model.quantizer is not None else None
    return run.train(batches, loop.losses, name="tokenizer", progress=progress, after_step=after)


class _Loop:
    """Losses of a batch, and the restart of codes that no latent chooses.

    Codes start as latents of the first batch; later, those unused for a while become random latents of the batch.
    Without both, nearly all latents end at a few codes for good: gradients reach only codes that are chosen.
    """

    def __init__(self, run: Run[TiTok], config: TokenizerTraining) -> None:
        self.run, self.config, self.model = run, config, run.model
        self.latents = torch.empty(0)
        size = config.model.codebook_size
        self.used = run.extra.setdefault("used", torch.zeros(size, dtype=torch.bool, device=self.model.device))

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        config, model = self.config, self.model
        images = augmented(images.to(model.device), config)
        figures = {}
        if model.quantizer is None:
            reconstruction, posterior = model(images)
            bottleneck = config.kl_weight * posterior.kl().mean()
        else:
            latents = model.encode_latents(images)
            self.latents = latents.detach().float().flatten(0, 1)
            if self.run.step == 0:
                self._replace(torch.ones_like(self.used))
            quantized = model.quantizer(latents)
            self.used |= quantized.counts > 0
            reconstruction, bottleneck = model.decode_latents(quantized.quantized), quantized.loss
            figures["codes"] = self.used.sum()
        error = F.mse_loss(reconstruction.float(), images.float())
        psnr = -10 * error.detach().log10()
        return {"loss": config.reconstruction_weight * error + bottleneck, "psnr": psnr, **figures}

    def restart_codes(self) -> None:
        step, config = self.run.step, self.config
        if (step + 1) % config.restart_every:
            return
        if step + 1 <= config.restart_until * config.steps:
            self._replace(~self.used)
        self.used.zero_()

    @torch.no_grad()
    def _replace(self, codes: Tensor) -> None:
        """Puts random latents of the batch in place of the marked codes (V,), different ones as far as they reach."""
        assert self.model.quantizer is not None
        order = torch.randperm(len(self.latents)).to(codes.device)
        which = codes.nonzero()[:, 0]
        rows = self.latents[order[torch.arange(len(which), device=codes.device) % len(order)]]
        rows = F.normalize(rows, dim=-1) if self.model.quantizer.l2_normalize else rows
        self.model.quantizer.codebook[which] = rows.to(self.model.quantizer.codebook.dtype)


def augmented(images: Tensor, config: TokenizerTraining) -> Tensor:
    """images (B, C, H, W), moved and mirrored at random as the configuration says."""
    if config.random_flip:
        images = torch.where(torch.rand(len(images), 1, 1, 1).to(images.device) < 0.5, images.flip(-1), images)
    if config.random_shift:
        pixels = config.random_shift
        down, right = torch.randint(-pixels, pixels + 1, (2, len(images))).to(images.device)
        images = shifted(images, down, right)
    return images
