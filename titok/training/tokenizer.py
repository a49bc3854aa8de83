"""Single-stage training of a tokenizer: it learns to reconstruct pixels, and unused codes are replaced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titok.data.augment import shift_images
from titok.data.folders import Images, read_batches
from titok.models.tokenizer import TiTok
from titok.training import fingerprint
from titok.training.code_restarts import CodeRestarts
from titok.training.config import TokenizerTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.objective import Losses, Objective
from titok.training.order import seed_of
from titok.training.run import Run


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
        run = Run(TokenizerObjective(model, config), config, folder, data=data)
        return run.train(read_batches(images, run.batches(len(images))), name="tokenizer", progress=progress)


class TokenizerObjective(Objective[TiTok]):
    """The losses of a batch of images, and the replacement of codes that no latent uses.

    Attributes:
        restarts: of the codes of a vector quantizer; None for a VAE.
    """

    def __init__(self, model: TiTok, config: TokenizerTraining) -> None:
        super().__init__(model)
        self.config = config
        self.restarts: CodeRestarts | None = None
        if model.quantizer is not None:
            self.restarts = CodeRestarts(
                model.quantizer,
                every=config.restart_every,
                until=config.restart_until * config.steps,
                seed=config.seed,
            )
            self.state["used"] = self.restarts.used

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The losses of images (B, C, H, W) in [0, 1]; the figures are "psnr" in dB and "codes" in use."""
        config, model = self.config, self.model
        images = augment(batch.to(model.device), config)
        figures = {}
        if model.quantizer is None:
            reconstruction, posterior = model(images)
            bottleneck = config.kl_weight * posterior.kl().mean()
        else:
            latents = model.encode_latents(images)
            quantized = model.quantizer(latents)
            assert self.restarts is not None
            self.restarts.observe(latents, quantized.counts, step)
            reconstruction, bottleneck = model.decode_latents(quantized.quantized), quantized.loss
            figures["codes"] = self.restarts.used.sum()
        error = F.mse_loss(reconstruction.float(), images.float())
        figures["psnr"] = -10 * error.detach().log10()
        return Losses(
            config.reconstruction_weight * error + bottleneck, figures, (images, reconstruction.detach())
        )

    @torch.no_grad()
    def start(self, batch: Tensor) -> None:
        """Makes the codes latents of the first micro-batch."""
        if self.restarts is not None:
            images = augment(batch.to(self.model.device), self.config)
            self.restarts.start(self.model.encode_latents(images))

    def after_step(self, steps_done: int) -> None:
        """Replaces codes that no latent uses, where it is time."""
        if self.restarts is not None:
            self.restarts.after_step(steps_done)

    def before_saving(self) -> None:
        """Makes the codes in use the same in every process."""
        if self.restarts is not None:
            self.restarts.merge()


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
