"""How well a tokenizer reconstructs pictures: rFID, class score, PSNR, SSIM, LPIPS, and the use of its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titok.data.folders import Images, read_batches
from titok.data.images import psnr, to_uint8
from titok.evaluation.features import FeatureExtractor, FigureNames
from titok.evaluation.shares import own_batches, progress_bar
from titok.evaluation.similarity import check_ssim, ssim
from titok.evaluation.statistics import ClassScore, CodeUsage, FeatureMoments, PictureMeans, frechet_distance
from titok.models.tokenizer import TiTok
from titok.processes import wait_for_all

USUAL_PICTURES = 50_000  # of a published FID


class Evaluation(NamedTuple):
    """The outcome of an evaluation, the same in every process.

    Attributes:
        figures: by name.
        counts: numbers of pictures and the like, by name.
        warnings: what makes the figures differ from published ones, one sentence each.
    """

    figures: dict[str, float]
    counts: dict[str, int]
    warnings: list[str]


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: TiTok,
    images: Images | Tensor,
    *,
    extractor: FeatureExtractor | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    with_ssim: bool = False,
    batch_size: int = 32,
    progress: bool | None = None,
) -> Evaluation:
    """Measures the reconstructions of pictures, as the official evaluator of TiTok does.

    Where `torch.distributed` is initialised, every process of the group must call this with the same arguments. Each
    reads and reconstructs a share of the pictures, by batches, and all return the same figures. The memory does not
    depend on the number of pictures. The tokenizer is used as it is: for the averaged weights of a training run, pass
    a tokenizer that has them.

        held_out = ImageFolder("photos/held-out", model.config.image_size, model.config.channels)
        figures = evaluate_reconstruction(model, held_out).figures
        print(figures["psnr"], figures["codebook_usage"])

    Reconstructions are clamped and rounded to 8 bits before they are compared with the originals, which have 8 bits.

    Args:
        tokenizer: on the device on which it computes.
        images: of the tokenizer's size and channels, float (C, H, W) in [0, 1] by index.
        extractor: gives the Frechet distance and the class score; None leaves both out.
        perceptual: a distance of images (B, 3, H, W) in [0, 1], averaged over the images, to a tensor of shape ().
            It gives "lpips"; None leaves that out.
        with_ssim: whether to compute "ssim", which needs torchmetrics.
        batch_size: pictures at a time in a process.
        progress: True shows a bar in the first process, None does so where stderr is a terminal, False never.

    Returns:
        the figures "psnr" (mean over pictures, dB; infinite where one is equal to its original), and, where they were
        asked for or apply, "ssim", "lpips", "codebook_usage" (share of codes), "entropy_bits", "rfid" and
        "inception_score" (one split). Another extractor than Inception gives the last two other names.

    Raises:
        ValueError: there is no picture, or only one for a Frechet distance.
        ModuleNotFoundError: torchmetrics is not installed.
        ConnectionError: another process of the group has ended.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one, got none")
    if with_ssim:
        check_ssim()
    if extractor is not None and len(images) < 2:
        raise ValueError(f"images: expected at least 2 for a Frechet distance, got {len(images)}")
    means = PictureMeans()
    codes = CodeUsage(tokenizer.config.codebook_size) if tokenizer.config.bottleneck == "vq" else None
    distance = None if extractor is None else _Distance(extractor, len(images), tokenizer.config.image_size)
    batches = own_batches(len(images), batch_size)
    with progress_bar(sum(map(len, batches)), progress) as bar:
        for numbers, originals in zip(batches, read_batches(images, batches), strict=True):
            tokens = tokenizer.encode(originals.to(tokenizer.device))
            reconstructions = to_uint8(tokenizer.decode(tokens))
            pictures = to_uint8(originals.to(tokenizer.device))
            if codes is not None:
                codes.update(tokens)
            means.update("psnr", psnr(reconstructions, pictures))
            if with_ssim:
                means.update("ssim", ssim(reconstructions, pictures))
            if perceptual is not None:
                pair = (_as_rgb(p).permute(0, 3, 1, 2).float() / 255 for p in (reconstructions, pictures))
                means.update("lpips", perceptual(*pair).expand(len(numbers)))
            if distance is not None:
                distance.update(_as_rgb(pictures), _as_rgb(reconstructions), numbers)
            bar.update(len(numbers))
    wait_for_all()
    names = ["psnr", *(["ssim"] if with_ssim else []), *(["lpips"] if perceptual is not None else [])]
    means.reduce(names)
    figures = {name: means.mean(name) for name in names}
    if codes is not None:
        codes.reduce()
        figures |= {"codebook_usage": codes.usage(), "entropy_bits": codes.entropy()}
    if distance is not None:
        figures |= distance.figures()
    counts = {"pictures": len(images), "tokens_per_picture": tokenizer.config.num_latent_tokens}
    if codes is not None:
        counts |= {"codebook_size": len(codes.counts), "codes_seen": int((codes.counts > 0).sum())}
    found = []
    if distance is not None:
        found += set_warnings("pictures", len(images), distance.dimension)
    if tokenizer.config.channels == 1:
        found.append("the pictures are grey: the networks that judge them were trained on colours")
    return Evaluation(figures, counts, found)


class _Distance:
    """The Frechet distance of originals and reconstructions, and the class score of the latter."""

    def __init__(self, extractor: FeatureExtractor, pictures: int, size: tuple[int, int]) -> None:
        self.extractor = extractor
        sizes = feature_sizes(extractor, size)
        self.dimension = sizes["pool"]
        self._originals, self._reconstructions = FeatureMoments(self.dimension), FeatureMoments(self.dimension)
        self._score = ClassScore(sizes["logits"], pictures) if "logits" in sizes else None

    def update(self, pictures: Tensor, reconstructions: Tensor, numbers: Tensor) -> None:
        """Adds a batch of uint8 (B, H, W, 3)."""
        self._originals.update(self.extractor(pictures)["pool"])
        features = self.extractor(reconstructions)
        self._reconstructions.update(features["pool"])
        if self._score is not None:
            self._score.update(features["logits"], numbers)

    def figures(self) -> dict[str, float]:
        """Adds the sums of all processes, and returns the figures."""
        names = FigureNames(self.extractor, reconstruction=True)
        one, other = self._originals, self._reconstructions
        one.reduce()
        other.reduce()
        distance = frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
        figures = {names.distance: distance}
        if self._score is not None:
            self._score.reduce()
            figures[names.score] = float(self._score.scores().mean())
        return figures


def feature_sizes(extractor: FeatureExtractor, size: tuple[int, int]) -> dict[str, int]:
    """The number of values of each kind of feature, from a black picture of (height, width).

    Raises:
        ValueError: the extractor does not return "pool", or features are not (B, D).
    """
    features: Any = extractor(torch.zeros(1, *size, 3, dtype=torch.uint8))
    if "pool" not in features:
        raise ValueError(f"extractor: expected features named 'pool', got {', '.join(features)}")
    for name, tensor in features.items():
        if tensor.ndim != 2 or len(tensor) != 1:
            raise ValueError(f"extractor: {name}: expected shape (1, D), got {tuple(tensor.shape)}")
    return {name: tensor.shape[1] for name, tensor in features.items()}


def set_warnings(name: str, count: int, dimension: int) -> list[str]:
    """Why a Frechet distance of so many pictures does not compare with published ones."""
    found = []
    if count < USUAL_PICTURES:
        found.append(
            f"{count} {name}: published distances use {USUAL_PICTURES}, and fewer make the distance larger"
        )
    if count <= dimension:
        found.append(f"{count} {name} for {dimension} features: their covariance is singular")
    return found


def _as_rgb(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, -1, -1, 3)
