"""The Inception network: its resizing by definition, its features against torch-fidelity's, and its weights."""

from __future__ import annotations

import pickle
import urllib.error
from pathlib import Path

import evaluation_oracles as oracles
import numpy as np
import pytest
import torch
from torch import nn

from titok.checkpoints.files import write_safetensors
from titok.evaluation import inception
from titok.evaluation.features import FigureNames, InceptionFeatures, load_extractor


def random_network() -> inception.InceptionNetwork:
    """A network whose features depend on the picture, unlike with PyTorch's own random weights."""
    torch.manual_seed(0)
    network = inception.InceptionNetwork()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.fill_(0.3)
            module.weight.data.uniform_(0.8, 1.4)
            module.bias.data.normal_(0, 0.1)
    return network


@pytest.mark.parametrize("size", [(32, 32), (23, 40), (64, 31), (1, 1)])
def test_resizing_is_that_of_tensorflow_bit_for_bit(size: tuple[int, int]) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 2, *size)))
    found = inception.resize_as_tensorflow(images.float(), 37)
    for channel in range(2):
        expected = oracles.resize_bilinear(images[0, channel].numpy(), 37)
        assert np.array_equal(found[0, channel].numpy(), expected)


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    oracles.allow_torchvision()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(random_network().state_dict(), tmp_path / "inception.pth")
    other = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(tmp_path / "inception.pth"))
    kept: list[torch.Tensor] = []
    other.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    pictures = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    pool, logits = other(pictures)
    found = InceptionFeatures(tmp_path / "inception.pth")(pictures.permute(0, 2, 3, 1))
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
    }
    assert (pool[0] - pool[1]).abs().max() > 1e-3 * pool.abs().max()  # the features tell pictures apart
    torch.testing.assert_close(found["pool"], pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6)
    for row in range(2):  # ADM's evaluator takes 7 channels, ordered as TensorFlow does
        expected = kept[0][row].permute(1, 2, 0)[..., :7].flatten()
        torch.testing.assert_close(found["spatial"][row], expected, rtol=1e-6, atol=1e-6)
    in_float64 = InceptionFeatures(tmp_path / "inception.pth", dtype=torch.float64)(pictures.permute(0, 2, 3, 1))
    assert in_float64["pool"].dtype == torch.float64
    torch.testing.assert_close(in_float64["pool"].float(), pool, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_weights_in_either_format(tmp_path: Path) -> None:
    state = {name: value for name, value in random_network().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth")
    write_safetensors(tmp_path / "a.safetensors", state)
    one, two = (InceptionFeatures(tmp_path / name) for name in ("a.pth", "a.safetensors"))
    assert one.weights_hash == two.weights_hash
    assert not any(parameter.requires_grad for parameter in one.network.parameters())
    del state["fc.bias"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b.pth: not the weights of torch-fidelity's Inception: .*fc.bias"):
        InceptionFeatures(tmp_path / "b.pth")


def test_code_in_a_file_of_weights_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "harm",)  # type: ignore[return-value]

    (tmp_path / "a.pth").write_bytes(pickle.dumps({"fc.weight": Harm()}, protocol=2))
    with pytest.raises(ValueError, match=r"a\.pth: not a plain state dict"):
        InceptionFeatures(tmp_path / "a.pth")
    assert not (tmp_path / "harm").exists()


def test_a_download_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        assert options["weights_only"] is True
        assert options["check_hash"] is True
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(OSError, match=r"cannot be downloaded from https://.*no network.*choose other features"):
        inception.load_inception()


def test_extractors_by_name() -> None:
    found = load_extractor("evaluation_oracles:projection")
    names = FigureNames(found)
    assert (names.distance, names.score) == ("frechet_distance_projection", "class_score_projection")
    assert FigureNames(load_extractor("evaluation_oracles:inception_like")).distance == "fid"
    for name in ("other", "evaluation_oracles:nothing"):
        with pytest.raises(ValueError, match="features: "):
            load_extractor(name)
