"""Stage 2 of TiTok: decoder and pixel decoder learn to reconstruct images; encoder and codes stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titok.config import TokenizerConfig
from titok.data.folders import Images
from titok.models.tokenizer import TiTok
from titok.models.vqgan import MaskGITVQGAN
from titok.training import fingerprint
from titok.training.config import DecoderTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.metrics import Tracker
from titok.training.objective import data_of, drawing_weights
from titok.training.proxy import check_proxy
from titok.training.reconstruction import Measure, Perceptual, ReconstructionObjective, make_adversary
from titok.training.run import train_on_images


def join_stages(first: TiTok, proxy: MaskGITVQGAN, config: TokenizerConfig) -> TiTok:
    """The tokenizer that stage 2 starts from: that of stage 1, with the decoder and the codes of the MaskGIT-VQGAN.

    Args:
        first: of `train_proxy`, or a whole tokenizer with the configuration `config`, of which a copy is returned.
        proxy: whose codes `first` predicts. It is not read where `first` is a whole tokenizer.
        config: of the whole tokenizer.

    Raises:
        ValueError: the configurations differ in more than the pixel decoder.
    """
    whole = TiTok(config)
    if first.config == config:
        whole.load_state_dict(first.state_dict())
        return whole
    ours, theirs = config.to_dict(), first.config.to_dict()
    differing = sorted(key for key in ours if key != "pixel_decoder" and ours[key] != theirs[key])
    if differing:
        raise ValueError(
            f"initial: expected the configuration that is trained, got one that differs in {differing}"
        )
    check_proxy(proxy, config.proxy)
    weights = {f"pixel_decoder.{name}": value for name, value in proxy.decoder.state_dict().items()}
    whole.load_state_dict({**first.state_dict(), **weights, "pixel_codebook": proxy.codebook.detach()})
    return whole


def train_decoder(
    images: Images | Tensor,
    first: TiTok,
    proxy: MaskGITVQGAN,
    config: DecoderTraining,
    out_dir: PathLike | RunFolder,
    *,
    perceptual: Perceptual | None = None,
    held_out: Images | Tensor | None = None,
    measure: Measure | None = None,
    resume: bool = False,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
    device: str | torch.device = "cpu",
) -> TiTok:
    """Trains the second stage of a tokenizer, and saves it in `out_dir` with `TiTok.save_pretrained`.

    Args:
        images, config, out_dir, perceptual, held_out, measure, resume, progress, trackers, device: as
            `train_tokenizer` takes them.
        first, proxy: of which `join_stages` makes the model that the training starts from.

    Returns:
        the model, in eval mode. Encoder, latent tokens and codebook are those of `first`, bit for bit.

    Raises:
        FileExistsError, FloatingPointError: as `train_tokenizer`.
        ValueError: as `train_tokenizer` and `join_stages`.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    with open_folder(out_dir, resume=resume) as folder:
        with drawing_weights(config.seed):
            model = join_stages(first, proxy, config.model)
            adversary = make_adversary(config, config.model.channels, device)
        data = data_of(images)
        data["initial"] = fingerprint.of_weights(model.state_dict())
        model.to(device=device, dtype=torch.float32)
        objective = DecoderObjective(
            model, config, perceptual=perceptual, adversary=adversary, held_out=held_out, measure=measure
        )
        return train_on_images(
            objective, config, folder, images, name="stage 2", data=data, adversary=adversary,
            progress=progress, trackers=trackers,
        )  # fmt: skip


class DecoderObjective(ReconstructionObjective[TiTok]):
    """The loss of stage 2. Encoder and quantizer of the model are frozen, and stay in eval mode."""

    def __init__(self, model: TiTok, config: DecoderTraining, **options: Any) -> None:
        super().__init__(model, config, **options)
        model.encoder.requires_grad_(False)
        assert model.quantizer is not None  # a tokenizer with the head "proxy" is vector-quantised
        model.quantizer.requires_grad_(False)

    def train(self, mode: bool = True) -> DecoderObjective:
        """As `nn.Module.train`, except for the frozen parts."""
        super().train(mode)
        self.model.encoder.eval()
        return self

    def reconstruct(self, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `ReconstructionObjective.reconstruct`. The bottleneck is not trained."""
        model = self.model
        assert model.quantizer is not None
        with torch.no_grad():
            tokens = model.quantizer.indices(model.encode_latents(images))
            latents = model.quantizer.lookup(tokens)
        return model.decode_latents(latents), None
