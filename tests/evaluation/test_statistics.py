"""Sums of features, scores and codes against slow definitions."""

from __future__ import annotations

import math

import evaluation_oracles as oracles
import numpy as np
import pytest
import torch

from titok.evaluation.manifolds import precision_and_recall
from titok.evaluation.statistics import ClassScore, CodeUsage, FeatureMoments, PictureMeans, frechet_distance


def features(count: int, dimension: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Correlated features with a mean that is not 0."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(dimension, dimension))
    return rng.normal(size=(count, dimension)) @ mixing + 3 + shift


def moments(*batches: np.ndarray) -> FeatureMoments:
    found = FeatureMoments(batches[0].shape[1])
    for batch in batches:
        found.update(torch.from_numpy(batch))
    return found


def distance(one: np.ndarray, other: np.ndarray) -> float:
    a, b = moments(one), moments(other)
    return frechet_distance(a.mean(), a.covariance(), b.mean(), b.covariance())


def test_moments_by_batches_are_those_of_the_whole() -> None:
    values = features(50, 8)
    found = moments(values[:7], values[7:8], values[8:])
    assert found.count == 50
    np.testing.assert_allclose(found.mean(), values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(values, rowvar=False), rtol=1e-10, atol=1e-12)


def test_frechet_distance_is_that_of_the_matrix_square_root() -> None:
    one, other = features(60, 8), features(40, 8, shift=0.5, seed=1) * 1.2
    assert distance(one, other) == pytest.approx(oracles.frechet_distance(one, other), rel=1e-9)
    assert distance(one, other) == pytest.approx(distance(other, one), rel=1e-12)


@pytest.mark.parametrize("counts", [(5, 7), (5, 60), (2, 2)])
def test_frechet_distance_of_fewer_vectors_than_dimensions(counts: tuple[int, int]) -> None:
    one, other = features(counts[0], 16), features(counts[1], 16, shift=1.0, seed=1)
    assert distance(one, other) == pytest.approx(oracles.frechet_distance_of_singular(one, other), rel=1e-9)


@pytest.mark.parametrize("count", [5, 200])
def test_frechet_distance_of_equal_sets_is_0(count: int) -> None:
    values = features(count, 16)
    assert 0 <= distance(values, values) < 1e-10 * np.trace(np.cov(values, rowvar=False))


def test_frechet_distance_of_constant_features() -> None:
    assert distance(np.full((4, 3), 2.0), np.full((5, 3), 4.0)) == pytest.approx(12.0)


def test_too_few_vectors_and_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 vectors"):
        moments(features(1, 3)).covariance()
    with pytest.raises(ValueError, match="features: expected shape"):
        FeatureMoments(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="other_mean: expected shape"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="covariance: expected finite values"):
        frechet_distance(torch.zeros(3), torch.eye(3) * math.nan, torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("split_size", [10, 7, 30])
def test_class_score_is_that_of_the_definition(split_size: int) -> None:
    logits = np.random.default_rng(1).normal(size=(23, 6)) * 3
    found = ClassScore(6, 23, split_size)
    for numbers in torch.randperm(23).split(4):  # in any order
        found.update(torch.from_numpy(logits)[numbers], numbers)
    assert float(found.scores().mean()) == pytest.approx(oracles.class_score(logits, split_size), rel=1e-12)


def test_class_score_of_certain_and_of_uncertain_pictures() -> None:
    certain, uncertain = ClassScore(4, 8), ClassScore(4, 8)
    certain.update(1000 * torch.eye(4).repeat(2, 1), torch.arange(8))
    uncertain.update(torch.zeros(8, 4), torch.arange(8))
    assert float(certain.scores()) == pytest.approx(4.0)
    assert float(uncertain.scores()) == pytest.approx(1.0)


def test_usage_and_entropy_of_known_counts() -> None:
    codes = CodeUsage(8)
    codes.update(torch.tensor([[0, 0, 1], [1, 2, 3]]))
    codes.update(torch.tensor([2, 3], dtype=torch.int32))
    assert codes.counts.tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert codes.usage() == 0.5
    assert codes.entropy() == pytest.approx(2.0)
    one = CodeUsage(8)
    one.update(torch.full((5,), 7))
    assert (one.usage(), one.entropy()) == (0.125, 0.0)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        one.update(torch.tensor([8]))


def test_means_of_pictures() -> None:
    means = PictureMeans()
    means.update("psnr", torch.tensor([1.0, 2.0]))
    means.update("psnr", torch.tensor([6.0]))
    assert means.mean("psnr") == 3.0
    with pytest.raises(ValueError, match="ssim: expected at least one picture"):
        means.mean("ssim")


@pytest.mark.parametrize("block_size", [4, 7, 100])
def test_precision_and_recall_are_those_of_the_definition(block_size: int) -> None:
    rng = np.random.default_rng(2)
    reference, samples = rng.normal(size=(31, 3)), rng.normal(size=(26, 3)) * 0.7 + 1.2
    found = precision_and_recall(torch.from_numpy(reference), torch.from_numpy(samples), block_size=block_size)
    expected = oracles.precision_and_recall(reference, samples)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 < min(found) < max(found) < 1  # a case that tells the two apart
    assert found.precision != found.recall


def test_precision_and_recall_of_equal_and_of_distant_sets() -> None:
    values = torch.randn(20, 4)
    assert precision_and_recall(values, values) == (1.0, 1.0)
    assert precision_and_recall(values, values + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="samples: expected more than 3 vectors"):
        precision_and_recall(values, values[:3])


@pytest.mark.slow
def test_two_processes_find_what_one_does() -> None:
    """Every process holds the sums of all, and rows of different numbers meet in the first."""
    oracles.in_processes(
        2,
        """
        from titok.evaluation.statistics import ClassScore, CodeUsage, FeatureMoments
        from titok.processes import rows_in_first_process
        torch.manual_seed(0)
        rank = own_part()[0]
        values = torch.randn(11, 5, dtype=torch.float64)
        mine = slice(0, 8) if rank == 0 else slice(8, 11)
        for share in (slice(0, 11), mine):
            moments, score, codes = FeatureMoments(5), ClassScore(5, 11, 4), CodeUsage(9)
            moments.update(values[share])
            score.update(values[share], torch.arange(11)[share])
            codes.update((torch.arange(11) % 7)[share])
            if share is mine:
                for sums in (moments, score, codes):
                    sums.reduce()
                assert moments.count == whole[0]
                torch.testing.assert_close(moments.covariance(), whole[1], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(score.scores(), whole[2], rtol=1e-12, atol=1e-12)
                assert torch.equal(codes.counts, whole[3])
            whole = (moments.count, moments.covariance(), score.scores(), codes.counts)
        rows = rows_in_first_process(values[mine])
        assert (rows is None) if rank else torch.equal(rows, values)
        nothing = rows_in_first_process(values[:3] if rank == 0 else values[:0])
        assert (nothing is None) if rank else torch.equal(nothing, values[:3])
        """,
    )
