"""Stage 1 of TiTok: the decoder learns to predict the codes that a MaskGIT-VQGAN gives to an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titok.data.folders import Images
from titok.models.tokenizer import TiTok
from titok.models.vqgan import MaskGITVQGAN
from titok.training import fingerprint
from titok.training.config import ProxyTraining
from titok.training.folder import PathLike, RunFolder, open_folder
from titok.training.losses import proxy_code_loss
from titok.training.losses.precision import float32_or_wider
from titok.training.metrics import Tracker
from titok.training.objective import Losses, Objective, data_of, drawing_weights, load_initial
from titok.training.reconstruction import augment, compared, first_images
from titok.training.run import train_on_images
from titok.training.starting import quantize_latents, start_tokenizer

_PIXEL_DECODER = ("pixel_decoder.", "pixel_codebook")  # the weights of a tokenizer that only stage 2 adds


def train_proxy(
    images: Images | Tensor,
    proxy: MaskGITVQGAN,
    config: ProxyTraining,
    out_dir: PathLike | RunFolder,
    *,
    initial: TiTok | None = None,
    held_out: Images | Tensor | None = None,
    resume: bool = False,
    progress: bool = True,
    trackers: Sequence[Tracker] = (),
    device: str | torch.device = "cpu",
) -> TiTok:
    """Trains the first stage of a tokenizer, and saves it in `out_dir` with `TiTok.save_pretrained`.

    Args:
        images, config, out_dir, held_out, resume, progress, trackers, device: as `train_tokenizer` takes them.
        proxy: whose codes are predicted. It is moved to the device and put in eval mode.
        initial: whose weights the training starts from, such as a published tokenizer, of which the pixel decoder is
            left out; None starts from random ones.

    Returns:
        the model, in eval mode, which ends at logits of the codes. `train_decoder` trains the second stage.

    Raises:
        FileExistsError, FloatingPointError: as `train_tokenizer`.
        ValueError: as `train_tokenizer`, or `proxy` has another configuration than `config.model.proxy`.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    check_proxy(proxy, config.model.proxy)
    with open_folder(out_dir, resume=resume) as folder:
        with drawing_weights(config.seed):
            model = TiTok(config.model)
            start_tokenizer(model, config)
        data = {**data_of(images), **load_initial(model, initial, without=_PIXEL_DECODER)}
        data["proxy"] = fingerprint.of_weights(proxy.state_dict())
        model.to(device=device, dtype=torch.float32)
        proxy.to(device).eval()
        return train_on_images(
            ProxyObjective(model, proxy, config, held_out=held_out), config, folder, images, name="stage 1", data=data,
            progress=progress, trackers=trackers,
        )  # fmt: skip


def check_proxy(proxy: MaskGITVQGAN, config: object) -> None:
    """Raises `ValueError` where a MaskGIT-VQGAN has another configuration than a tokenizer expects of it."""
    if proxy.config != config:
        raise ValueError(f"proxy: expected the configuration {config}, got {proxy.config}")


class ProxyObjective(Objective[TiTok]):
    """The cross-entropy of the codes, plus the loss of TiTok's own quantizer with weight 1.

    Args:
        proxy: on the device of the model, in eval mode.
        held_out: images of which pictures are made.
    """

    def __init__(
        self,
        model: TiTok,
        proxy: MaskGITVQGAN,
        config: ProxyTraining,
        *,
        held_out: Images | Tensor | None = None,
    ) -> None:
        super().__init__(model)
        assert model.quantizer is not None  # a tokenizer with the head "proxy" is vector-quantised
        self.config, self.quantizer = config, (model.quantizer,)
        self._proxy = (proxy,)  # in a tuple, so that its parameters are not those of this module
        self._held_out = first_images(held_out, model.device)
        self.restart_codes(model.quantizer, config, l2_normalize=config.model.l2_normalize)

    def forward(self, batch: Tensor, step: int) -> Losses:
        """The loss of images (B, C, H, W) in [0, 1].

        The figures are its terms, "codes_loss" and "bottleneck", and the "accuracy", the share of codes that are the
        most likely ones.
        """
        model, (proxy,), (quantizer,) = self.model, self._proxy, self.quantizer
        images = augment(batch.to(model.device), self.config)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = proxy.encode(images)
        latents = model.encode_latents(images)
        vectors, quantized = quantize_latents(
            quantizer, latents, step=step, quantize_from=self.config.quantize_from
        )
        assert self.restarts is not None
        self.restarts.observe(latents, quantized.counts, step)
        logits = float32_or_wider(model.decoder(vectors.to(model.dtype)))
        error = proxy_code_loss(logits, codes)
        figures = {
            "codes_loss": error.detach(),
            "bottleneck": quantized.loss.detach(),
            "accuracy": (logits.detach().argmax(dim=-1) == codes).float().mean(),
        }
        return Losses(error + quantized.loss, figures)

    def latents(self, batch: Tensor) -> Tensor:
        """See `Objective.latents`."""
        return self.model.encode_latents(augment(batch.to(self.model.device), self.config))

    def picture(self) -> Tensor | None:
        """Held-out images, what the MaskGIT-VQGAN makes of the most likely codes, and the differences."""
        images, (proxy,) = self._held_out, self._proxy
        if images is None:
            return None
        logits = self.model.decode_logits(self.model.encode(images))
        return compared(images, proxy.decode(logits.argmax(dim=1)))
