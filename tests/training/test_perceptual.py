"""Perceptual losses: by definition, and compared with torchvision and lpips on random weights."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from titok.training.losses import (
    LogitsDistance,
    LPIPSDistance,
    PerceptualLoss,
    convnext_small_distance,
    lpips_distance,
    perceptual,
)

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
SHIFT = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)  # of LPIPS
SCALE = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)


class Network(nn.Module):
    """A small classifier with dropout, which is active in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(5))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def network(size: int) -> nn.Module:
    model = Network()
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return model.train()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 5, 2), nn.Tanh())


def small_lpips() -> LPIPSDistance:
    return LPIPSDistance(layers().double(), {1: torch.rand(4).double(), 4: torch.rand(5).double()})


def pair(size: int = 9, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Images that exceed [0, 1], and targets."""
    images = torch.rand(batch, 3, size, size + 1, dtype=torch.float64) * 1.4 - 0.2
    return images.requires_grad_(), torch.rand_like(images).requires_grad_()


@pytest.fixture(scope="module")
def torchvision() -> ModuleType:
    """torchvision, also where it does not belong to the installed torch.

    A torchvision that was built for torch with CUDA cannot load its operators beside torch for CPUs. Its networks
    need none, but the import needs the declarations of two operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declarations = library  # they last as long as this object
    return torchvision


# ---------------------------------------------------------------------------------------------------------------
# Distances with small networks.


@pytest.mark.parametrize("size", [5, 9, 12])
def test_logits_distance_by_definition(size: int) -> None:
    model = network(size).double()
    distance = LogitsDistance(model, size)
    images, target = pair()

    def logits(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        x = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
        return model.layers[4](model.layers[2](model.layers[1](model.layers[0](x))))

    want = (logits(images) - logits(target)).square().sum() / 10
    got = distance(images, target)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    (got_gradient,) = torch.autograd.grad(got, images)
    torch.testing.assert_close(got_gradient, torch.autograd.grad(want, images)[0], rtol=1e-10, atol=1e-14)


def test_lpips_by_definition() -> None:
    distance = small_lpips()
    images, target = pair()
    want = torch.zeros(2, dtype=torch.float64)
    for numbers, weights in (((0, 1), 1), ((0, 1, 2, 3, 4), 4)):
        features = []
        for x in (images, target):
            x = torch.stack([(2 * x[:, c] - 1 - SHIFT[c]) / SCALE[c] for c in range(3)], dim=1)
            for number in numbers:
                x = distance.layers[number](x)
            features.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        weighted = (features[0] - features[1]).square() * distance.channel_weights[weights][:, None, None]
        want = want + weighted.sum(dim=1).flatten(1).mean(dim=1)
    torch.testing.assert_close(distance(images, target), want.mean(), rtol=1e-10, atol=0)


def test_lpips_has_a_gradient_where_all_features_are_zero() -> None:
    distance = LPIPSDistance(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()), {1: torch.ones(2)})
    with torch.no_grad():
        distance.layers[0].bias.fill_(-100.0)
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    distance(images, torch.rand(1, 3, 4, 4)).backward()
    assert not images.grad.any()


@pytest.mark.parametrize("make", [lambda: LogitsDistance(network(6).double(), 6), small_lpips])
def test_gradients_reach_the_first_argument_alone(make) -> None:
    distance = make()
    images, target = pair(6, batch=1)
    loss = distance(images, target)
    loss.backward()
    assert images.grad is not None
    assert target.grad is None
    module = distance.network if isinstance(distance, LogitsDistance) else distance.layers
    assert not module.training
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    assert gradcheck(lambda x: distance(x, target), images)


def test_any_callable_is_a_network() -> None:
    distance = LogitsDistance(lambda x: x.mean(dim=(2, 3)), size=4).to("cpu", torch.float64)
    images, target = pair(4)
    resized = [
        F.interpolate(x, (4, 4), mode="bilinear", antialias=True).mean(dim=(2, 3)) / STD for x in (images, target)
    ]
    torch.testing.assert_close(distance(images, target), F.mse_loss(*resized), rtol=1e-10, atol=0)


def test_a_module_that_holds_a_loss_does_not_train_or_save_its_networks() -> None:
    model = nn.Linear(2, 2)
    model.perceptual = PerceptualLoss([(1.0, LogitsDistance(network(6), 6)), (0.5, small_lpips())])
    assert set(model.state_dict()) == {"weight", "bias"}
    assert len(list(model.parameters())) == 2
    model.train()
    assert not model.perceptual.terms[0][1].network.training


def test_networks_stay_where_they_are_until_moved() -> None:
    model = network(6).double()
    loss = PerceptualLoss([(1.0, LogitsDistance(model, 6)), (1.0, small_lpips()), (1.0, F.mse_loss)])
    images, target = pair(7)
    assert loss(images, target).dtype == torch.float64
    assert loss.to("cpu") is loss
    assert next(model.parameters()).dtype == torch.float32
    assert loss(images.float(), target.float()).dtype == torch.float32


def test_perceptual_loss_is_the_weighted_sum() -> None:
    loss = PerceptualLoss([(0.25, F.mse_loss), (2.0, F.l1_loss)])
    images, target = pair()
    want = 0.25 * F.mse_loss(images, target) + 2 * F.l1_loss(images, target)
    torch.testing.assert_close(loss(images, target), want)


def test_official_names_are_weighted_means(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []

    def make(kind: str, value: float):
        def distance(path: str | None):
            paths.append((kind, path))
            return lambda images, target: torch.tensor(value)

        return distance

    monkeypatch.setattr(perceptual, "lpips_distance", make("lpips", 3.0))
    monkeypatch.setattr(perceptual, "convnext_small_distance", make("convnext_s", 5.0))
    expected = {
        "lpips": 3.0, "convnext_s": 5.0, "lpips-convnext_s-1.0-0.1": (3 + 0.5) / 1.1, "lpips-convnext_s-1-3": 4.5
    }  # fmt: skip
    for name, value in expected.items():
        loss = PerceptualLoss.from_name(name, convnext_weights="c.pth", vgg_weights="v.pth")
        assert loss(*pair()).item() == pytest.approx(value), name
    assert set(paths) == {("lpips", "v.pth"), ("convnext_s", "c.pth")}


@pytest.mark.parametrize(
    "name", ["vgg", "", "lpips-convnext_s", "lpips-convnext_s-1", "lpips-convnext_s-0-0", "x-lpips-convnext_s-1-1"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name: expected 'lpips', 'convnext_s' or 'lpips-convnext_s-A-B', got"):
        PerceptualLoss.from_name(name)


def test_wrong_arguments_are_named() -> None:
    distance = LogitsDistance(network(6), 6)
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        distance(images[:, :1], images[:, :1])
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"):
        distance(images, images[:1])
    with pytest.raises(ValueError, match="size: expected an int of at least 1, got 0"):
        LogitsDistance(network(6), 0)
    with pytest.raises(ValueError, match="terms: expected at least one, got none"):
        PerceptualLoss([])
    with pytest.raises(ValueError, match="terms: expected finite weights, got inf"):
        PerceptualLoss([(float("inf"), distance)])


# ---------------------------------------------------------------------------------------------------------------
# Packages that are missing or do not fit.


@pytest.mark.parametrize("loss", ["convnext_s", "lpips"])
def test_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    for module in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)
    hint = rf"'{loss}' needs torchvision.*: pip install 'titok-kernels\[train\]'"
    with pytest.raises(ModuleNotFoundError, match=hint):
        PerceptualLoss.from_name(loss)


def test_missing_lpips_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'lpips' needs lpips: pip install 'titok-kernels\[train\]'"):
        lpips_distance()


def test_a_torchvision_for_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ImportError, match=r"cannot import torchvision \(operator.*\): install the build that belongs"
    ):
        convnext_small_distance()


@pytest.mark.slow
def test_the_losses_are_imported_without_torchvision_and_lpips() -> None:
    code = (
        "import sys, titok.training, titok.training.losses; "
        "print([name for name in ('torchvision', 'lpips') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


# ---------------------------------------------------------------------------------------------------------------
# The published networks, with random weights.


@pytest.fixture(scope="module")
def convnext(torchvision: ModuleType) -> nn.Module:
    """ConvNeXt-S. Its blocks would change almost nothing with the layer scale of 1e-6 that training starts with."""
    model = torchvision.models.convnext_small()
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_convnext_distance_is_that_of_torchvisions_network(
    torchvision: ModuleType, convnext: nn.Module, tmp_path: Path
) -> None:
    from torchvision.transforms import InterpolationMode, functional

    torch.save(convnext.state_dict(), tmp_path / "convnext.pth")
    distance = convnext_small_distance(tmp_path / "convnext.pth")
    images, target = (x.detach().float() for x in pair(96, batch=1))

    def logits(x: Tensor) -> Tensor:
        x = functional.resize(x, [224, 224], InterpolationMode.BILINEAR, antialias=True)
        return convnext(functional.normalize(x, MEAN.tolist(), STD.tolist()))

    with torch.no_grad():
        want = (logits(images) - logits(target)).square().mean()
        assert want > 1e-4
        torch.testing.assert_close(distance(images, target), want, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_published_weights_are_downloaded_without_unpickling_code(
    torchvision: ModuleType, convnext: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(url: str, **options: object) -> dict[str, Tensor]:
        calls.append((url, options))
        return convnext.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    distance = convnext_small_distance()
    assert calls == [
        (
            torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url,
            {"map_location": "cpu", "check_hash": True, "weights_only": True},
        )
    ]
    assert all(torch.equal(p, convnext.state_dict()[name]) for name, p in distance.network.named_parameters())


@pytest.mark.slow
def test_lpips_is_that_of_the_package(
    torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("lpips is not installed")
    import lpips

    with torch.device("meta"):  # its classifier, which LPIPS does not read, has 124 million parameters
        features = torchvision.models.vgg16().features
    features.to_empty(device="cpu")
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg.pth")
    distance = lpips_distance(tmp_path / "vgg.pth")

    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: SimpleNamespace(features=features))
    oracle = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).double()
    # The package keeps both in float32, whose rounding would show.
    oracle.scaling_layer.shift, oracle.scaling_layer.scale = (x[None, :, None, None] for x in (SHIFT, SCALE))
    images, target = pair(48)
    distance.to("cpu", torch.float64)
    got = distance(images, target)
    want = oracle(images, target, normalize=True).mean()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    (got_gradient,) = torch.autograd.grad(got, images)
    (want_gradient,) = torch.autograd.grad(want, images)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_other_weights_are_refused(torchvision: ModuleType, tmp_path: Path) -> None:
    torch.save({"features.0.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not the weights of ConvNeXt"):
        convnext_small_distance(tmp_path / "other.pth")
    if importlib.util.find_spec("lpips") is not None:
        with pytest.raises(ValueError, match=r"other\.pth: not the weights of VGG-16"):
            lpips_distance(tmp_path / "other.pth")
