"""Single-stage training of a tokenizer: it learns to reconstruct images, by a vector quantizer or as a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titok.data.folders import Images
from titok.models.tokenizer import TiTok
from titok.training.config import TokenizerTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.losses import kl_loss
from titok.training.metrics import Tracker
from titok.training.objective import data_of, drawing_weights, load_initial
from titok.training.reconstruction import Measure, Perceptual, ReconstructionObjective, augment, make_adversary
from titok.training.run import train_on_images
from titok.training.starting import quantize_latents, start_tokenizer


def train_tokenizer(
    images: Images | Tensor,
    config: TokenizerTraining,
    out_dir: PathLike | RunFolder,
    *,
    initial: TiTok | None = None,
    perceptual: Perceptual | None = None,
    held_out: Images | Tensor | None = None,
    measure: Measure | None = None,
    resume: bool = False,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
    device: str | torch.device = "cpu",
) -> TiTok:
    """Trains a tokenizer, and saves it in `out_dir` with `TiTok.save_pretrained`.

    Within a group of processes (`titok.processes.process_group`) all of them call this, and share the micro-batches of
    each step.

    Args:
        images: with values in [0, 1]: a tensor (n, C, H, W), or an object that has a length and returns images
            (C, H, W) by index, such as `titok.data.folders.ImageFolder`.
        config: settings of the model and of the run.
        out_dir: of the model, of `training.safetensors`, the checkpoint of the run, and of `metrics.jsonl`. It is
            locked meanwhile. A `RunFolder` is locked already, so that what is done before the training belongs to the
            run as well.
        initial: whose weights the training starts from; None starts from random ones.
        perceptual: a distance (images, images) -> () in place of the one that the configuration names.
        held_out: images that are not trained on, of which pictures are made every `picture_every` steps.
        measure: called with the model and the held-out images every `evaluate_every` steps, in every process. It
            returns figures, such as those of `titok.evaluation.reconstruction.evaluate_reconstruction`, which must be
            the same in all processes; `metrics.jsonl` has them as "held_out_<name>".
        resume: True continues from the checkpoint in `out_dir`, or starts where there is none. A `RunFolder` has been
            asked for this already.
        progress: True shows, on a terminal, a progress bar with the figures of the run.
        trackers: receive the figures and pictures.
        device: of the training.

    Returns:
        the model, in eval mode; with averaged weights if `config.ema_decay` is not 0.

    Raises:
        FileExistsError: `out_dir` holds a run, and `resume` is False.
        ValueError: there are no images, they do not fit the model, or `out_dir` holds another run, a run with other
            pictures, or a run that is at work; or the number of processes does not divide the micro-batches.
        FloatingPointError: the loss is no longer finite.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    with open_folder(out_dir, resume=resume) as folder:
        with drawing_weights(config.seed):
            model = TiTok(config.model)
            start_tokenizer(model, config)
            adversary = make_adversary(config, config.model.channels, device)
        started = load_initial(model, initial)
        model.to(device=device, dtype=torch.float32)
        objective = TokenizerObjective(
            model, config, perceptual=perceptual, adversary=adversary, held_out=held_out, measure=measure
        )
        data = {**data_of(images), **started}
        return train_on_images(
            objective, config, folder, images, name="tokenizer", data=data, adversary=adversary,
            progress=progress, trackers=trackers,
        )  # fmt: skip


class TokenizerObjective(ReconstructionObjective[TiTok]):
    """The loss of a tokenizer, and of a vector-quantised one the replacement of codes that no latent uses."""

    def __init__(self, model: TiTok, config: TokenizerTraining, **options: Any) -> None:
        super().__init__(model, config, **options)
        self.kl_weight, self._quantize_from = config.kl_weight, config.quantize_from
        if model.quantizer is not None:
            self.restart_codes(model.quantizer, config, l2_normalize=config.model.l2_normalize)

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `ReconstructionObjective.reconstruct`."""
        model = self.model
        if model.quantizer is None:
            reconstruction, posterior = model(images)
            return reconstruction, self.kl_weight * kl_loss(posterior)
        latents = model.encode_latents(images)
        vectors, quantized = quantize_latents(
            model.quantizer, latents, step=step, quantize_from=self._quantize_from
        )
        if self.restarts is not None and self.training:
            self.restarts.observe(latents, quantized.counts, step)
        return model.decode_latents(vectors), quantized.loss

    def latents(self, batch: Tensor) -> Tensor:
        """See `Objective.latents`."""
        return self.model.encode_latents(augment(batch.to(self.device), self.config))
