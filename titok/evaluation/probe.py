"""Linear probe: how well a linear classifier reads the classes of pictures from frozen features of a tokenizer.

The classifier is trained as that of MAE (He et al. 2022, table 10): batch normalisation without affine parameters, a
linear layer, LARS without weight decay, 90 epochs in batches of 16,384, of which 10 warm up, and a cosine to 0. The
learning rate is 0.1 * batch / 256.

One thing differs. MAE crops every training picture at random in every epoch. Here a picture is cropped at the centre,
and encoded twice, as it is and mirrored. Each epoch takes one of the two at random. The encoder then runs twice for
each picture, instead of 90 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checks import FLOAT_DTYPES, INTEGER_DTYPES, check_tensor
from titok.data.folders import Images, read_batches
from titok.evaluation.shares import own_batches, progress_bar
from titok.models.tokenizer import TiTok
from titok.processes import rows_in_first_process, wait_for_all

# Candidates for the features of the paper, which does not tell. By name, what each is.
FEATURES = {
    "latents": "the latents of all tokens before quantisation, flattened: K x C values",
    "last_block": "the normed output of the encoder's last block, averaged over the latent tokens: D values",
    "last_block_tokens": "the normed output of the encoder's last block for all latent tokens, flattened: K x D values",
}
USUAL_FEATURES = ("latents", "last_block")  # the third takes K times the memory of the second


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe, by default those of MAE.

    Attributes:
        epochs: over the training pictures.
        warmup_epochs: in which the learning rate rises linearly.
        batch_size: pictures in a step; all of them where there are fewer.
        base_rate: the highest learning rate for a batch of 256. It grows in proportion to the batch.
        momentum: of LARS.
        trust: of LARS: the step of the weights is this part of their norm, times the learning rate.
        seed: of the first weights and of the order of the pictures.
    """

    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    base_rate: float = 0.1
    momentum: float = 0.9
    trust: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs: expected [0, {self.epochs}), got {self.warmup_epochs}")
        if not 0 < self.base_rate < math.inf:
            raise ValueError(f"base_rate: expected a finite number above 0, got {self.base_rate}")


class ProbeData(NamedTuple):
    """Features of pictures, and their classes.

    Attributes:
        features: float32 (N, D).
        mirrored: float32 (N, D), those of the mirrored pictures, or None.
        labels: int64 (N,).
    """

    features: Tensor
    mirrored: Tensor | None
    labels: Tensor


class ProbeResult(NamedTuple):
    """Shares in [0, 1] of held-out pictures whose class is the first, or among the first five, of the classifier."""

    top1: float
    top5: float


def train_probe(
    training: ProbeData,
    held_out: ProbeData,
    settings: ProbeSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> ProbeResult:
    """Trains a linear classifier on frozen features, and tests it on others.

    Args:
        training: features to learn from.
        held_out: features to be tested on; `mirrored` is not used.
        settings: None takes those of MAE.
        device: of the computation.
        progress: True shows a bar in the first process, None does so where stderr is a terminal, False never.

    Raises:
        TypeError, ValueError: features or labels of other dtypes or shapes, or no picture.
    """
    settings = settings or ProbeSettings()
    for name, data in (("training", training), ("held_out", held_out)):
        check_tensor(
            f"{name}.features", data.features, shape=("N", training.features.shape[1]), dtypes=FLOAT_DTYPES
        )
        check_tensor(f"{name}.labels", data.labels, shape=(len(data.features),), dtypes=INTEGER_DTYPES)
        if not len(data.features):
            raise ValueError(f"{name}: expected at least one picture, got none")
    classes = int(max(training.labels.max(), held_out.labels.max())) + 1
    generator = torch.Generator().manual_seed(settings.seed)
    dimension = training.features.shape[1]
    norm = nn.BatchNorm1d(dimension, eps=1e-6, affine=False, device=device)
    weight = torch.empty(classes, dimension).normal_(std=0.01, generator=generator).to(device).requires_grad_()
    bias = torch.zeros(classes, device=device, requires_grad=True)
    optimizer = LARS([weight, bias], settings.momentum, settings.trust)
    batch_size = min(settings.batch_size, len(training.features))
    steps_per_epoch = len(training.features) // batch_size
    highest = settings.base_rate * batch_size / 256
    with progress_bar(settings.epochs * steps_per_epoch, progress, unit="step") as bar:
        for step, (features, labels) in enumerate(_batches(training, batch_size, settings.epochs, generator)):
            logits = F.linear(norm(features.to(device)), weight, bias)
            gradients = torch.autograd.grad(F.cross_entropy(logits, labels.to(device)), [weight, bias])
            optimizer.step(gradients, highest * _rate(step / steps_per_epoch, settings))
            bar.update()
    norm.eval()
    return _test(held_out, norm, weight, bias)


class LARS:
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum, as MAE uses it for its probe.

    The gradient of a matrix is scaled to `trust` times the norm of the matrix. Biases take their gradient as it is.
    """

    parameters: list[Tensor]
    momentum: float
    trust: float

    def __init__(self, parameters: list[Tensor], momentum: float, trust: float) -> None:
        self.parameters, self.momentum, self.trust = parameters, momentum, trust
        self._velocities = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """Changes the parameters, in place, by one step with learning rate `rate`."""
        for parameter, velocity, gradient in zip(self.parameters, self._velocities, gradients, strict=True):
            if parameter.ndim > 1:
                norm, gradient_norm = parameter.norm(), gradient.norm()
                scaled = self.trust * norm / gradient_norm
                gradient = gradient * torch.where((norm > 0) & (gradient_norm > 0), scaled, 1.0)
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(rate * velocity)


def _rate(epoch: float, settings: ProbeSettings) -> float:
    """The learning rate as a share of the highest one, at an epoch with its fraction."""
    if epoch < settings.warmup_epochs:
        return epoch / settings.warmup_epochs
    done = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * done))


def _batches(
    data: ProbeData, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels in another order for each epoch. The pictures beyond the last whole batch are left out."""
    count = len(data.features)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for numbers in order[: count // batch_size * batch_size].split(batch_size):
            features = data.features[numbers]
            if data.mirrored is not None:
                mirror = torch.rand(len(numbers), 1, generator=generator) < 0.5
                features = torch.where(mirror, data.mirrored[numbers], features)
            yield features.float(), data.labels[numbers].long()


@torch.no_grad()
def _test(data: ProbeData, norm: nn.BatchNorm1d, weight: Tensor, bias: Tensor) -> ProbeResult:
    top1 = top5 = 0
    for features, labels in zip(data.features.split(4096), data.labels.split(4096), strict=True):
        logits = F.linear(norm(features.float().to(weight.device)), weight, bias)
        best = logits.topk(min(5, len(weight)), dim=1).indices.cpu()
        right = best == labels.long()[:, None]
        top1 += int(right[:, 0].sum())
        top5 += int(right.any(dim=1).sum())
    return ProbeResult(top1 / len(data.labels), top5 / len(data.labels))


@torch.no_grad()
def encode_for_probe(
    tokenizer: TiTok,
    images: Images | Tensor,
    labels: Tensor,
    *,
    features: Sequence[str] = USUAL_FEATURES,
    flip: bool = True,
    batch_size: int = 64,
    progress: bool | None = None,
) -> dict[str, ProbeData] | None:
    """The features of pictures for probes, by their names in `FEATURES`.

    Where `torch.distributed` is initialised, every process of the group must call this with the same arguments. Each
    encodes a share. The first process gets the features of all pictures, and the others get None. It needs 4 bytes
    for each value: with `flip`, 3.6 GB for a million pictures of 32 x 12 latents and 512 values of the last block.

    Args:
        tokenizer: on the device on which it computes.
        images: of the tokenizer's size and channels, float (C, H, W) in [0, 1] by index.
        labels: (N,), the class of each picture.
        features: names of `FEATURES`.
        flip: whether to encode the mirrored pictures, too.
        batch_size: pictures at a time in a process.
        progress: True shows a bar in the first process, None does so where stderr is a terminal, False never.

    Raises:
        ValueError: an unknown name of features, or not as many labels as pictures.
    """
    for name in features:
        if name not in FEATURES:
            raise ValueError(f"features: expected names of {', '.join(FEATURES)}, got {name!r}")
    check_tensor("labels", labels, shape=(len(images),), dtypes=INTEGER_DTYPES)
    batches = own_batches(len(images), batch_size)
    kinds = [(name, mirrored) for name in features for mirrored in ((False, True) if flip else (False,))]
    rows: dict[tuple[str, bool], list[Tensor]] = {kind: [] for kind in kinds}
    with progress_bar(sum(map(len, batches)), progress) as bar:
        for numbers, batch in zip(batches, read_batches(images, batches), strict=True):
            for mirrored in (False, True) if flip else (False,):
                pictures = batch.to(tokenizer.device)
                for name, values in _encoded(tokenizer, pictures.flip(-1) if mirrored else pictures).items():
                    if name in features:
                        rows[name, mirrored].append(values.float().cpu())
            bar.update(len(numbers))
    wait_for_all()
    sizes = {name: values.shape[1] for name, values in _encoded(tokenizer, _black(tokenizer)).items()}
    order = rows_in_first_process(torch.cat([torch.empty(0, dtype=torch.int64), *batches]))
    gathered: dict[tuple[str, bool], Tensor] = {}
    for kind in kinds:  # the empty tensor is for a process without pictures
        collected = rows_in_first_process(torch.cat([torch.empty(0, sizes[kind[0]]), *rows.pop(kind)]))
        if collected is not None and order is not None:
            gathered[kind] = collected[order.argsort()]
    if order is None:
        return None
    classes = labels.cpu().long()
    return {name: ProbeData(gathered[name, False], gathered.get((name, True)), classes) for name in features}


def _encoded(tokenizer: TiTok, pictures: Tensor) -> dict[str, Tensor]:
    """Each of `FEATURES` of pictures (B, channels, H, W), as (B, values)."""
    last_block = tokenizer.encode_features(pictures)
    return {
        "latents": tokenizer.encode_latents(pictures).flatten(1),
        "last_block": last_block.mean(dim=1),
        "last_block_tokens": last_block.flatten(1),
    }


def _black(tokenizer: TiTok) -> Tensor:
    """A black picture as the tokenizer reads it, (1, channels, H, W)."""
    return torch.zeros(1, tokenizer.config.channels, *tokenizer.config.image_size, device=tokenizer.device)
