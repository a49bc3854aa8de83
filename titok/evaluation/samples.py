"""How close generated pictures are to real ones: FID, sFID, Inception Score, precision and recall as in ADM.

The definitions are those of the evaluator that Dhariwal & Nichol (2021) published with ADM.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from titok.evaluation.features import INCEPTION, FeatureExtractor, FigureNames
from titok.evaluation.manifolds import PrecisionRecall, precision_and_recall
from titok.evaluation.picture_sets import PictureSet
from titok.evaluation.reconstruction import Evaluation, feature_sizes, set_warnings
from titok.evaluation.shares import own_batches, progress_bar
from titok.evaluation.statistics import ClassScore, FeatureMoments, frechet_distance
from titok.processes import in_first_process, rows_in_first_process, sum_of_all, wait_for_all

SPLIT_SIZE = 5000  # pictures of a split of the Inception Score
NEIGHBOURS = 3  # of precision and recall


@torch.no_grad()
def evaluate_samples(
    samples: PictureSet,
    reference: PictureSet,
    extractor: FeatureExtractor,
    *,
    with_precision: bool = True,
    batch_size: int = 64,
    progress: bool | None = None,
) -> Evaluation:
    """Compares generated pictures with a reference, as ADM's evaluator does.

    Where `torch.distributed` is initialised, every process of the group must call this with the same arguments. Each
    reads a share of the pictures, and all return the same figures. Sums do not grow with the number of pictures.
    Precision and recall need the features of all pictures, 8 kB for each with Inception, in the first process.

    Args:
        samples: the generated pictures.
        reference: the real ones. Where it has an attribute `statistics` with `mu`, `sigma`, `mu_s` and `sigma_s`, and
            the extractor is Inception, these take the place of the statistics of its pictures, which then serve
            precision and recall alone.
        extractor: see `titok.evaluation.features`.
        with_precision: whether to compute precision and recall.
        batch_size: pictures at a time in a process.
        progress: True shows a bar in the first process, None does so where stderr is a terminal, False never.

    Returns:
        the figures "fid", "sfid", "inception_score" (mean over splits of 5,000), "precision" and "recall" (k = 3). An
        extractor without "spatial" features or "logits" gives no spatial distance or score. Another extractor than
        Inception gives figures with its name in theirs.

    Raises:
        ValueError: too few pictures for a figure, or statistics of other shapes.
        ConnectionError: another process of the group has ended.
    """
    names = FigureNames(extractor)
    sizes = feature_sizes(extractor, samples.size)
    given: Mapping[str, np.ndarray] = getattr(reference, "statistics", {}) if extractor.name == INCEPTION else {}
    found = _warnings(samples, reference, sizes["pool"], given=bool(given))
    generated = _Features(sizes, len(samples), keep=with_precision)
    generated.read(samples, extractor, batch_size, progress)
    real = _Features(
        {name: size for name, size in sizes.items() if name != "logits"}, len(reference), with_precision
    )
    # Without precision and recall, the pictures of a reference with statistics are not needed.
    if with_precision or not given:
        real.read(reference, extractor, batch_size, progress)
    figures = {names.distance: _distance(generated, real, "pool", given.get("mu"), given.get("sigma"))}
    if "spatial" in sizes:
        figures[names.spatial_distance] = _distance(
            generated, real, "spatial", given.get("mu_s"), given.get("sigma_s")
        )
    else:
        found.append(f"{extractor.name} has no spatial features, so there is no spatial distance")
    if generated.score is not None:
        figures[names.score] = float(generated.score.scores().mean())
    if with_precision:
        device = getattr(extractor, "device", torch.device("cpu"))
        figures[names.precision], figures[names.recall] = _precision_and_recall(real, generated, device)
    counts = {"samples": len(samples), "reference": len(reference)}
    if generated.grey == len(samples):
        found.append("all samples are grey: Inception was trained on colours")
    return Evaluation(figures, counts, found)


class _Features:
    """What is collected of the features of a set.

    Args:
        sizes: the number of values of each kind of feature.
        count: pictures in all.
        keep: whether the "pool" features of all pictures are kept.
    """

    def __init__(self, sizes: Mapping[str, int], count: int, keep: bool) -> None:
        self.moments = {name: FeatureMoments(sizes[name]) for name in ("pool", "spatial") if name in sizes}
        self.score = ClassScore(sizes["logits"], count, SPLIT_SIZE) if "logits" in sizes else None
        self.grey = 0
        self._kept = [torch.empty(0, sizes["pool"])] if keep else None

    def read(
        self, pictures: PictureSet, extractor: FeatureExtractor, batch_size: int, progress: bool | None
    ) -> None:
        """Reads the share of this process, and adds the sums of all processes."""
        ranges = own_batches(len(pictures), batch_size)
        with progress_bar(sum(map(len, ranges)), progress) as bar:
            for numbers, batch in zip(ranges, pictures.batches(ranges), strict=True):
                features = extractor(batch)
                for name, moments in self.moments.items():
                    moments.update(features[name])
                if self.score is not None:
                    self.score.update(features["logits"], numbers)
                if self._kept is not None:
                    self._kept.append(features["pool"].float().cpu())
                self.grey += int((batch == batch[..., :1]).flatten(1).all(dim=1).sum())
                bar.update(len(numbers))
        wait_for_all()
        for moments in self.moments.values():
            moments.reduce()
        if self.score is not None:
            self.score.reduce()
        self.grey = int(sum_of_all(torch.tensor([self.grey])))

    def rows(self) -> Tensor | None:
        """The "pool" features of all pictures, float32 (N, D), in the first process; None in the others."""
        assert self._kept is not None  # precision and recall were asked for
        return rows_in_first_process(torch.cat(self._kept))


def _precision_and_recall(real: _Features, generated: _Features, device: torch.device) -> PrecisionRecall:
    """Precision and recall, which the first process computes on `device`."""
    rows, others = real.rows(), generated.rows()

    def compute() -> PrecisionRecall:
        if rows is None or others is None:
            raise RuntimeError("called in another process than the first")
        return precision_and_recall(rows.to(device), others.to(device), neighbours=NEIGHBOURS)

    return in_first_process(compute)


def _distance(
    generated: _Features, real: _Features, name: str, mean: np.ndarray | None, covariance: np.ndarray | None
) -> float:
    """The Frechet distance by a kind of features. Statistics of the reference that are given take precedence."""
    own = generated.moments[name]
    if mean is None or covariance is None:
        other = real.moments[name]
        return frechet_distance(own.mean(), own.covariance(), other.mean(), other.covariance())
    return frechet_distance(
        own.mean(), own.covariance(), torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
    )


def _warnings(samples: PictureSet, reference: PictureSet, dimension: int, *, given: bool) -> list[str]:
    found = [*set_warnings("samples", len(samples), dimension), *samples.warnings(), *reference.warnings()]
    if not given:
        found += set_warnings("reference pictures", len(reference), dimension)
    if samples.size != reference.size:
        (height, width), (other_height, other_width) = samples.size, reference.size
        found.append(
            f"samples of {width} x {height} pixels, reference of {other_width} x {other_height}: resizing to "
            "Inception's 299 pixels treats them differently"
        )
    return found
