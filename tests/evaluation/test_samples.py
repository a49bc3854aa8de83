"""Figures of generated pictures against slow definitions, with statistics of the reference and by two processes."""

from __future__ import annotations

import json
from pathlib import Path

import evaluation_oracles as oracles
import numpy as np
import pytest
import torch

from titok.evaluation import samples as module
from titok.evaluation.picture_sets import NpzPictures
from titok.evaluation.samples import evaluate_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def features(pictures: np.ndarray) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in oracles.Projection("inception")(torch.from_numpy(pictures)).items()}


def write(path: Path, pictures: np.ndarray, **arrays: np.ndarray) -> NpzPictures:
    np.savez(path, arr_0=pictures, **arrays)  # type: ignore[arg-type]
    return NpzPictures(path)


@pytest.fixture
def generated() -> np.ndarray:
    return oracles.random_pictures(20, 1)


@pytest.fixture
def real() -> np.ndarray:
    return (oracles.random_pictures(26, 2) * 0.8 + 30).astype(np.uint8)


def test_figures_are_those_of_the_definitions(
    generated: np.ndarray, real: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPLIT_SIZE", 8)
    found = evaluate_samples(
        write(tmp_path / "a.npz", generated),
        write(tmp_path / "b.npz", real),
        oracles.Projection("inception"),
        batch_size=3,
        progress=False,
    )
    one, other = features(generated), features(real)
    precision, recall = oracles.precision_and_recall(
        other["pool"].astype(np.float32), one["pool"].astype(np.float32)
    )
    assert found.figures == pytest.approx(
        {
            "fid": oracles.frechet_distance(one["pool"], other["pool"]),
            "sfid": oracles.frechet_distance(one["spatial"], other["spatial"]),
            "inception_score": oracles.class_score(one["logits"], 8),
            "precision": precision,
            "recall": recall,
        },
        rel=1e-8,
    )
    assert found.counts == {"samples": 20, "reference": 26}


def test_statistics_of_the_reference_take_precedence(
    generated: np.ndarray, real: np.ndarray, tmp_path: Path
) -> None:
    """As in ADM's evaluator. Another extractor than Inception takes the pictures."""
    whole = features(oracles.random_pictures(40, 9))
    statistics = {
        f"{name}{suffix}": function(whole[kind])
        for kind, suffix in (("pool", ""), ("spatial", "_s"))
        for name, function in (("mu", lambda v: v.mean(axis=0)), ("sigma", lambda v: np.cov(v, rowvar=False)))
    }
    samples = write(tmp_path / "a.npz", generated)
    reference = write(tmp_path / "b.npz", real, **statistics)
    found = evaluate_samples(samples, reference, oracles.Projection("inception"), progress=False)
    assert found.figures["fid"] == pytest.approx(
        oracles.frechet_distance(features(generated)["pool"], whole["pool"])
    )
    expected = oracles.frechet_distance(features(generated)["spatial"], whole["spatial"])
    assert found.figures["sfid"] == pytest.approx(expected)
    assert not any("reference pictures" in warning for warning in found.warnings)
    other = evaluate_samples(samples, reference, oracles.Projection(), with_precision=False, progress=False)
    assert other.figures["frechet_distance_projection"] == pytest.approx(
        oracles.frechet_distance(features(generated)["pool"], features(real)["pool"])
    )


def test_equal_sets(generated: np.ndarray, tmp_path: Path) -> None:
    samples = write(tmp_path / "a.npz", generated)
    figures = evaluate_samples(samples, samples, oracles.Projection("inception"), progress=False).figures
    assert figures["fid"] == pytest.approx(0, abs=1e-8)
    assert figures["sfid"] == pytest.approx(0, abs=1e-8)
    assert (figures["precision"], figures["recall"]) == (1.0, 1.0)


def test_where_mismatches_come_from_is_named(generated: np.ndarray, real: np.ndarray, tmp_path: Path) -> None:
    grey = generated[:6, :8, :8, :1]
    samples = write(tmp_path / "a.npz", grey, arr_1=np.array([0, 0, 0, 0, 1, 2]))
    extractor = oracles.Projection(size=(8, 8), spatial=False)
    text = "\n".join(evaluate_samples(samples, samples, extractor, progress=False).warnings)
    for part in (
        "6 samples: published distances use 50000",
        "6 samples for 6 features: their covariance is singular",
        "grey pictures, read here as RGB",
        "1 to 4 pictures of a class",
        "all samples are grey",
        "projection has no spatial features",
    ):
        assert part in text

    def mean_colour(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": pictures.double().mean(dim=(1, 2))}

    mean_colour.name = "colour"  # type: ignore[attr-defined]
    other = write(tmp_path / "b.npz", real)
    found = evaluate_samples(samples, other, mean_colour, progress=False)  # type: ignore[arg-type]
    assert any("8 x 8 pixels, reference of 24 x 16" in warning for warning in found.warnings)
    assert "class_score_colour" not in found.figures


@pytest.mark.slow
def test_two_processes_find_what_one_does(generated: np.ndarray, real: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path / "a.npz", generated)
    write(tmp_path / "b.npz", real)
    code = f"""
        import json
        from pathlib import Path
        import evaluation_oracles as oracles
        from titok.evaluation.picture_sets import NpzPictures
        from titok.evaluation.samples import evaluate_samples
        folder = Path({str(tmp_path)!r})
        one, other = NpzPictures(folder / "a.npz"), NpzPictures(folder / "b.npz")
        rank, world = own_part()
        found = evaluate_samples(one, other, oracles.Projection(), batch_size=6)
        (folder / f"{{world}}-{{rank}}.json").write_text(json.dumps(found.figures))
    """
    for count in (1, 2):
        oracles.in_processes(count, code)
    one, *both = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert both[0] == both[1]
    assert both[0] == pytest.approx(one, rel=1e-9)
