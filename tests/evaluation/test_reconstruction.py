"""Figures of reconstructions against slow definitions, by one process and by two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_oracles as oracles
import numpy as np
import pytest
import torch
from torch import Tensor

from titok.evaluation.held_out import held_out_by_name
from titok.evaluation.reconstruction import evaluate_reconstruction

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 12) -> Tensor:
    return torch.from_numpy(oracles.random_pictures(count, 3)).permute(0, 3, 1, 2) / 255


def squared_difference(one: Tensor, other: Tensor) -> Tensor:
    """In place of LPIPS."""
    return (one - other).square().mean()


def rounded(pictures: Tensor) -> np.ndarray:
    return np.floor(pictures.double().clamp(0, 1).numpy() * 255 + 0.5)


def test_figures_are_those_of_the_definitions(tiny_tokenizer: Callable[..., Any]) -> None:
    model, pictures, extractor = tiny_tokenizer(), images(), oracles.Projection("inception")
    found = evaluate_reconstruction(
        model, pictures, extractor=extractor, perceptual=squared_difference, batch_size=5, progress=False
    )
    with torch.no_grad():
        tokens = model.encode(pictures)
        copies = rounded(model.decode(tokens).float())
    originals = rounded(pictures)
    errors = ((copies - originals) ** 2).mean(axis=(1, 2, 3))
    figures = found.figures
    assert figures["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), rel=1e-9)
    assert figures["lpips"] == pytest.approx((errors / 255**2).mean(), rel=1e-5)
    counts = np.bincount(tokens.flatten().numpy(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    assert figures["codebook_usage"] == (counts > 0).mean()
    assert figures["entropy_bits"] == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-12)

    def features(values: np.ndarray) -> dict[str, np.ndarray]:
        found = extractor(torch.from_numpy(values).to(torch.uint8).permute(0, 2, 3, 1))
        return {name: tensor.numpy() for name, tensor in found.items()}

    expected = oracles.frechet_distance(features(originals)["pool"], features(copies)["pool"])
    assert figures["rfid"] == pytest.approx(expected, rel=1e-9)
    assert figures["inception_score"] == pytest.approx(
        oracles.class_score(features(copies)["logits"], 12), rel=1e-9
    )
    assert found.counts == {
        "pictures": 12,
        "tokens_per_picture": 4,
        "codebook_size": 16,
        "codes_seen": int((counts > 0).sum()),
    }
    assert any("12 pictures: published distances use 50000" in warning for warning in found.warnings)


def test_figures_that_were_not_asked_for_are_left_out(tiny_tokenizer: Callable[..., Any]) -> None:
    found = evaluate_reconstruction(tiny_tokenizer(), images(3), progress=False)
    assert sorted(found.figures) == ["codebook_usage", "entropy_bits", "psnr"]
    assert found.warnings == []
    vae = evaluate_reconstruction(tiny_tokenizer(bottleneck="vae"), images(3), progress=False)
    assert sorted(vae.figures) == ["psnr"]
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        evaluate_reconstruction(tiny_tokenizer(), images(0))
    with pytest.raises(ValueError, match="at least 2 for a Frechet distance"):
        evaluate_reconstruction(tiny_tokenizer(), images(1), extractor=oracles.Projection())


def test_grey_pictures_are_judged_as_rgb(tiny_tokenizer: Callable[..., Any]) -> None:
    grey = tiny_tokenizer(channels=1, image_size=(8, 8))
    extractor = oracles.Projection(size=(8, 8))
    found = evaluate_reconstruction(grey, torch.rand(9, 1, 8, 8), extractor=extractor, progress=False)
    assert "frechet_distance_projection" in found.figures
    assert any("grey" in warning for warning in found.warnings)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tiny_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code = f"""
        import json
        import test_reconstruction as test
        from pathlib import Path
        from titok import TiTok
        from titok.evaluation.reconstruction import evaluate_reconstruction
        folder = Path({str(tmp_path)!r})
        model = TiTok.from_pretrained(folder / "tokenizer")
        extractor = test.oracles.Projection()
        found = evaluate_reconstruction(model, test.images(), extractor=extractor, batch_size=5)
        rank, world = own_part()
        (folder / f"{{world}}-{{rank}}.json").write_text(json.dumps(found.figures))
    """
    for count in (1, 2):
        oracles.in_processes(count, code)
    one, *both = (json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert both[0] == both[1]
    assert both[0] == pytest.approx(one, rel=1e-9)


def test_ssim_is_that_of_the_definition() -> None:
    oracles.allow_torchvision()
    pytest.importorskip("torchmetrics")
    from titok.evaluation.similarity import ssim

    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    other = (one * 0.7 + rng.integers(0, 70, one.shape)).astype(np.uint8)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def averaged(channel: np.ndarray) -> np.ndarray:
        padded = np.pad(channel, 5, mode="reflect")
        parts = np.lib.stride_tricks.sliding_window_view(padded, (11, 11))
        return np.einsum("hwij,ij->hw", parts, window)

    expected = []
    for row in range(2):
        values = []
        for channel in range(3):
            x, y = (pictures[row, :, :, channel] / 255 for pictures in (one, other))
            mx, my = averaged(x), averaged(y)
            vx, vy, covariance = averaged(x * x) - mx**2, averaged(y * y) - my**2, averaged(x * y) - mx * my
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
        expected.append(np.mean(values))
    found = ssim(torch.from_numpy(one), torch.from_numpy(other))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="sides of at least 6 pixels"):
        ssim(torch.zeros(1, 5, 8, 3, dtype=torch.uint8), torch.zeros(1, 5, 8, 3, dtype=torch.uint8))


def test_a_share_is_held_out_by_name() -> None:
    names = [f"class/{i}.png" for i in range(2000)]
    chosen = held_out_by_name(names, 0.2)
    assert 0.17 < chosen.double().mean() < 0.23
    assert torch.equal(held_out_by_name(names[::-1], 0.2), chosen.flip(0))
    assert not (chosen & ~held_out_by_name(names, 0.3)).any()
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
        held_out_by_name(names, 1.0)
