"""Masked-token training of a generator (MaskGIT, Chang et al. 2022), on tokens that a tokenizer made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titok.checks import check_labels, check_tokens
from titok.config import as_integer
from titok.data.augment import shift_images
from titok.data.folders import Images, read_batches
from titok.models.generator import MaskGIT
from titok.models.tokenizer import TiTok
from titok.models.vqgan import MaskGITVQGAN
from titok.training import fingerprint
from titok.training.config import GeneratorTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.losses.precision import float32_or_wider
from titok.training.masking import drop_classes, masked_token_loss, random_mask
from titok.training.metrics import Tracker
from titok.training.objective import Losses, Objective, drawing_weights, load_initial
from titok.training.pictures import rows_of_images
from titok.training.run import Run


@torch.no_grad()
def tokenize_images(
    tokenizer: TiTok | MaskGITVQGAN,
    images: Images | Tensor,
    *,
    batch_size: int = 64,
    flip: bool = False,
    shifts: Sequence[tuple[int, int]] = ((0, 0),),
) -> Tensor:
    """The tokens of all images and of augmented copies of them, (n, copies, K) int64 on the CPU.

    Args:
        tokenizer: with a vector quantizer. The codes of a MaskGIT-VQGAN become a sequence row by row.
        images: as `train_tokenizer` takes them.
        batch_size: images that are read and encoded at a time.
        flip: True adds copies that are mirrored left to right.
        shifts: one copy for each (down, right), in pixels.

    Raises:
        ValueError: the tokenizer is a VAE, there are no images, or `batch_size` is not an integer >= 1.
    """
    size = as_integer(batch_size)
    if size is None or size < 1:
        raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
    if isinstance(tokenizer, TiTok) and tokenizer.quantizer is None:
        raise ValueError("tokenizer: expected a vector-quantised one, got a VAE: MaskGIT generates codes")
    rows = []
    for batch in read_batches(images, torch.arange(len(images), device="cpu").split(size)):
        batch = batch.to(next(tokenizer.parameters()).device)
        copies = []
        for mirrored in (batch, batch.flip(-1)) if flip else (batch,):
            for down, right in shifts:
                offsets = (torch.full((len(batch),), pixels, device=batch.device) for pixels in (down, right))
                moved = shift_images(mirrored, *offsets)
                copies.append(tokenizer.encode(moved).flatten(1).cpu())
        rows.append(torch.stack(copies, dim=1))
    if not rows:
        raise ValueError("images: expected at least one, got none")
    return torch.cat(rows)


def train_generator(
    tokens: Tensor,
    labels: Tensor,
    config: GeneratorTraining,
    out_dir: PathLike | RunFolder,
    *,
    initial: MaskGIT | None = None,
    samples: Callable[[MaskGIT], Tensor] | None = None,
    resume: bool = False,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
    device: str | torch.device = "cpu",
) -> MaskGIT:
    """Trains a generator, and saves it in `out_dir` with `MaskGIT.save_pretrained`.

    Args:
        tokens: (n, K) of any integer dtype, or (n, copies, K). A copy counts as a sample of its own. Those of a
            `titok.data.token_sets.TokenSet` may be mapped from a file: they are never in memory as a whole.
        labels: (n,) classes, of any integer dtype.
        config: settings of the model and of the run.
        out_dir, initial, resume, trackers, device: as `train_tokenizer` takes them.
        samples: generates images (rows, columns, C, H, W) in [0, 1] with the model, of which pictures are made every
            `picture_every` steps; None makes none.
        progress: True shows, on a terminal, a progress bar with the loss and the share of masked tokens that are
            predicted correctly.

    Returns:
        the model, in eval mode.

    Raises:
        FileExistsError, FloatingPointError: as `train_tokenizer`.
        TypeError, ValueError: tokens or labels do not fit the model or each other, or `out_dir` holds another run.
    """
    flat = tokens.flatten(0, 1) if isinstance(tokens, Tensor) and tokens.ndim == 3 else tokens
    _check_rows(flat, config.model.num_latent_tokens, config.model.codebook_size)
    labels = check_labels(labels, config.model.num_classes)
    if not len(tokens) == len(labels) > 0:
        raise ValueError(
            f"labels: expected one for each of {len(tokens)} samples, at least one, got {len(labels)}"
        )
    with open_folder(out_dir, resume=resume) as folder:
        data = {"tokens": fingerprint.of_integers(flat), "labels": fingerprint.of_tensor(labels)}
        with drawing_weights(config.seed):
            model = MaskGIT(config.model)
        data |= load_initial(model, initial)
        model.to(device=device, dtype=torch.float32)
        objective = GeneratorObjective(model, config, flat, labels, samples=samples)
        run = Run(objective, config, folder, data={"samples": len(flat), **data})
        return run.train(run.batches(len(flat)), name="generator", progress=progress, trackers=trackers)


def _check_rows(tokens: Tensor, length: int, codes: int) -> None:
    """`check_tokens` without a copy of all tokens, of which there may be more than fit into the memory."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        check_tokens(tokens, length, codes)
    for rows in tokens.split(fingerprint.ROWS_AT_A_TIME):
        check_tokens(rows, length, codes)


class GeneratorObjective(Objective[MaskGIT]):
    """The masked-token loss of a batch, which is given by the indices of its samples.

    Args:
        tokens: (n * copies, K) of any integer dtype. Each batch is moved to the device of the model.
        labels: (n,) int64, one for all copies of a sample.
        samples: as `train_generator` takes it.
    """

    def __init__(
        self,
        model: MaskGIT,
        config: GeneratorTraining,
        tokens: Tensor,
        labels: Tensor,
        *,
        samples: Callable[[MaskGIT], Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        self.config, self.tokens, self.labels, self._samples = config, tokens, labels, samples
        self._copies = len(tokens) // len(labels)

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The loss of the samples with the indices `batch` (B,) int64; the figure is the "accuracy"."""
        config, device = self.config, self.model.device
        length = self.tokens.shape[1]
        uniform = torch.rand(len(batch), length + 2, dtype=torch.float32, device="cpu").to(device)
        targets = self.tokens[batch.to(self.tokens.device)].long().to(device)
        classes = self.labels[batch.to(self.labels.device) // self._copies].to(device)
        classes = drop_classes(classes, self.model.no_class, uniform[:, 0], config.class_dropout)
        mask = random_mask(uniform[:, 1], uniform[:, 2:])
        logits = self.model(targets.masked_fill(mask, self.model.mask_token), classes)
        loss, accuracy = masked_token_loss(
            float32_or_wider(logits),
            targets,
            mask,
            label_smoothing=config.label_smoothing,
            unmasked_weight=config.unmasked_weight,
        )
        return Losses(loss, {"accuracy": accuracy})

    def picture(self) -> Tensor | None:
        """Samples of the model, in rows."""
        return None if self._samples is None else rows_of_images(*self._samples(self.model))
