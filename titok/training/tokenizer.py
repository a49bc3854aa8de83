"""Single-stage training of a tokenizer: it learns to reconstruct pixels, and unused codes are replaced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.data.augment import shift_images
from titok.data.folders import Images, read_batches
from titok.models.tokenizer import TiTok
from titok.training import fingerprint
from titok.training.config import TokenizerTraining
from titok.training.run import PathLike, Run, RunFolder, open_folder, seed_of, shuffled_batches


def train_tokenizer(
    images: Images | Tensor,
    config: TokenizerTraining,
    out_dir: PathLike | RunFolder,
    *,
    resume: bool = False,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> TiTok:
    """Trains a tokenizer from scratch, and saves it in `out_dir` with `TiTok.save_pretrained`.

    Args:
        images: with values in [0, 1]: a tensor (n, C, H, W), or an object that has a length and returns images
            (C, H, W) by index, such as `titok.data.folders.ImageFolder`.
        config: settings of the model and of the run.
        out_dir: of the model and of `training.safetensors`, the checkpoint of the run. It is locked meanwhile. A
            `RunFolder` is locked already, so that what is done before the training belongs to the run as well.
        resume: True continues from the checkpoint in `out_dir`, or starts where there is none. A `RunFolder` has been
            asked for this already.
        progress: True shows, on a terminal, a progress bar with the loss, the PSNR of the batch in dB and the number
            of codes in use.
        device: of the training.

    Returns:
        the model, in eval mode.

    Raises:
        FileExistsError: `out_dir` holds a run, and `resume` is False.
        ValueError: there are no images, they do not fit the model, or `out_dir` holds another run, a run with other
            pictures, or a run that is at work.
        FloatingPointError: the loss is no longer finite.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    with open_folder(out_dir, resume=resume) as folder:
        # Random numbers are drawn on the CPU, whatever default device the host has set.
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.manual_seed(seed_of(config.seed))
            model = TiTok(config.model)
            if config.position_std is not None:
                for name, parameter in model.named_parameters():
                    if name.endswith(("_positions", "_token", "_tokens")):
                        torch.nn.init.normal_(parameter, std=config.position_std)
            model.to(device=device, dtype=torch.float32)
        data = {"images": len(images), **fingerprint.of_images(images)}
        run = Run(model, config, folder, data=data)
        loop = TokenizerLoop(run, config)
        batches = read_batches(images, shuffled_batches(len(images), config.batch_size, config.seed, run.step))
        after = loop.restart_codes if model.quantizer is not None else None
        return run.train(batches, loop.losses, name="tokenizer", progress=progress, after_step=after)


class TokenizerLoop:
    """The losses of a batch, and the replacement of codes that no latent uses.

    Codes start as latents of the first batch. Later, codes that were not used for `restart_every` steps become
    random latents of the batch. Otherwise almost all latents would use the same few codes until the end, because
    gradients reach only codes that are used.

    Attributes:
        latents: (n, code_dim) float32, those of the latest batch.
        used: (V,) bool, codes that some latent used since the last replacement.
    """

    def __init__(self, run: Run[TiTok], config: TokenizerTraining) -> None:
        self.run, self.config, self.model = run, config, run.model
        self.latents = torch.empty(0, device="cpu")
        unused = torch.zeros(config.model.codebook_size, dtype=torch.bool, device=self.model.device)
        self.used = run.extra.setdefault("used", unused)
        if self.used.shape != unused.shape or self.used.dtype != unused.dtype:
            raise ValueError(
                f"{run.folder}: not a readable training checkpoint: its codes in use are no {unused.dtype}"
            )

    def losses(self, images: Tensor) -> dict[str, Tensor]:
        """The figures of a batch of images (B, C, H, W) in [0, 1]: "loss", "psnr" in dB, and "codes" in use."""
        config, model = self.config, self.model
        images = augment(images.to(model.device), config)
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
        """Replaces unused codes every `restart_every` steps.

        It is called after an optimizer step, before `run.step` counts that step.
        """
        steps_done, config = self.run.step + 1, self.config
        if steps_done % config.restart_every:
            return
        if steps_done <= config.restart_until * config.steps:
            self._replace(~self.used)
        self.used.zero_()

    @torch.no_grad()
    def _replace(self, codes: Tensor) -> None:
        """Replaces the codes that are true in `codes` (V,) by random latents of the batch.

        No latent is taken twice unless there are fewer latents than codes to replace.
        """
        quantizer = self.model.quantizer
        assert quantizer is not None
        order = torch.randperm(len(self.latents), device="cpu").to(codes.device)
        replaced = codes.nonzero()[:, 0]
        latents = self.latents[order[torch.arange(len(replaced), device=codes.device) % len(order)]]
        if quantizer.l2_normalize:
            latents = F.normalize(latents, dim=-1)
        quantizer.codebook[replaced] = latents.to(quantizer.codebook.dtype)


def augment(images: Tensor, config: TokenizerTraining) -> Tensor:
    """Images (B, C, H, W), mirrored and shifted at random where the configuration says so."""
    if config.random_flip:
        mirrored = torch.rand(len(images), 1, 1, 1, dtype=torch.float32, device="cpu").to(images.device) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    if config.random_shift:
        pixels = config.random_shift
        down, right = torch.randint(-pixels, pixels + 1, (2, len(images)), device="cpu").to(images.device)
        images = shift_images(images, down, right)
    return images
