"""Frechet distance, Inception Score, precision and recall against torch-fidelity's functions, on the same features."""

from __future__ import annotations

from typing import Any

import evaluation_oracles as oracles
import pytest
import torch
from torch import Tensor

from titok.evaluation.manifolds import precision_and_recall
from titok.evaluation.statistics import ClassScore, FeatureMoments, frechet_distance


@pytest.fixture(scope="module")
def metrics() -> Any:
    oracles.allow_torchvision()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_prc

    return metric_fid, metric_isc, metric_prc


def features(count: int, size: int, seed: int, scale: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, size, generator=random) @ torch.randn(size, size, generator=random)
    return (scale * mixed + seed).abs()


@pytest.mark.parametrize("count", [300, 20])  # more and fewer pictures than dimensions
def test_frechet_distance(count: int, metrics: Any) -> None:
    fid, _, _ = metrics
    sets = features(count, 32, 1), features(count + 7, 32, 2, 1.3)
    expected = fid.fid_statistics_to_metric(*[fid.fid_features_to_statistics(one) for one in sets], verbose=False)
    moments = []
    for one in sets:
        of_set = FeatureMoments(32)
        for part in one.split(64):
            of_set.update(part)
        moments += [of_set.mean(), of_set.covariance()]
    assert frechet_distance(*moments) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


def test_inception_score(metrics: Any) -> None:
    """torch-fidelity shuffles the pictures itself; here they are in its order. Both cut them into ten parts."""
    _, isc, _ = metrics
    logits = features(500, 40, 3) / 10
    expected = isc.isc_features_to_metric(logits.double(), splits=10, shuffle=False)
    score = ClassScore(40, 500, split_size=50)
    for start in range(0, 500, 64):
        part = logits[start : start + 64]
        score.update(part, torch.arange(start, start + len(part)))
    found = score.scores()
    assert float(found.mean()) == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert float(found.std(correction=0)) == pytest.approx(expected["inception_score_std"], rel=1e-6)


def test_precision_and_recall(metrics: Any) -> None:
    """Its "sets 1 and 2" are the samples and the reference. Distances are far from ties in float32."""
    _, _, prc = metrics
    samples, reference = features(150, 6, 4), features(200, 6, 5, 0.9)
    expected = prc.prc_features_to_metric(
        samples, reference, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    found = precision_and_recall(reference, samples)
    assert 0.02 < found.precision < 0.98
    assert 0.02 < found.recall < 0.98
    assert found.precision == pytest.approx(expected["precision"], abs=1e-6)
    assert found.recall == pytest.approx(expected["recall"], abs=1e-6)
