"""Training of a MaskGIT-VQGAN: the 2D tokenizer whose codes TiTok predicts in its first stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from titok.data.folders import Images
from titok.models.vqgan import MaskGITVQGAN
from titok.ops import quantize
from titok.training.config import VQGANTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.metrics import Tracker
from titok.training.objective import data_of, drawing_weights, load_initial
from titok.training.reconstruction import Perceptual, ReconstructionObjective, augment, make_adversary
from titok.training.run import train_on_images


def train_vqgan(
    images: Images | Tensor,
    config: VQGANTraining,
    out_dir: PathLike | RunFolder,
    *,
    initial: MaskGITVQGAN | None = None,
    perceptual: Perceptual | None = None,
    held_out: Images | Tensor | None = None,
    resume: bool = False,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
    device: str | torch.device = "cpu",
) -> MaskGITVQGAN:
    """Trains a 2D tokenizer, and saves it in `out_dir` with `MaskGITVQGAN.save_pretrained`.

    Args:
        images, config, out_dir, initial, perceptual, held_out, resume, progress, trackers, device: as `train_tokenizer`
            takes them.

    Returns:
        the model, in eval mode.

    Raises:
        FileExistsError, ValueError, FloatingPointError: as `train_tokenizer`.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    with open_folder(out_dir, resume=resume) as folder:
        with drawing_weights(config.seed):
            model = MaskGITVQGAN(config.model)
            adversary = make_adversary(config, config.model.channels, device)
        data = {**data_of(images), **load_initial(model, initial)}
        model.to(device=device, dtype=torch.float32)
        objective = VQGANObjective(model, config, perceptual=perceptual, adversary=adversary, held_out=held_out)
        return train_on_images(
            objective, config, folder, images, name="vqgan", data=data, adversary=adversary,
            progress=progress, trackers=trackers,
        )  # fmt: skip


class VQGANObjective(ReconstructionObjective[MaskGITVQGAN]):
    """The loss of a 2D tokenizer, and the replacement of codes that no feature uses."""

    def __init__(self, model: MaskGITVQGAN, config: VQGANTraining, **options: Any) -> None:
        super().__init__(model, config, **options)
        self._commitment_cost = config.commitment_cost
        self.restart_codes(model, config, l2_normalize=False)

    def _features(self, images: Tensor) -> Tensor:
        """(B, h, w, code_dim)."""
        return rearrange(self.model.encoder(images), "b c h w -> b h w c")

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `ReconstructionObjective.reconstruct`."""
        features = self._features(images)
        quantized = quantize(features, self.model.codebook, normalize=False, commitment_cost=self._commitment_cost)
        if self.restarts is not None and self.training:
            self.restarts.observe(features, quantized.counts, step)
        codes = rearrange(quantized.quantized, "b h w c -> b c h w").to(features.dtype)
        return self.model.decoder(codes), quantized.loss

    def latents(self, batch: Tensor) -> Tensor:
        """See `Objective.latents`."""
        return self._features(augment(batch.to(self.device), self.config))
