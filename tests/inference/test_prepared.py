"""Prepared weights: right results, the original weights back, and no change of a weight that is missed."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from titok import engine
from titok.inference import onednn
from titok.inference.prepared import PreparableModel
from titok.inference.prepared_weights import PreparedError, PreparedParameter
from titok.models.layers import Conv1x1, Conv3x3, Linear, UpsampleConv

needs_onednn = pytest.mark.skipif(not onednn.packs(torch.ones(1)), reason="this PyTorch lacks oneDNN's ops")


class Net(PreparableModel):
    """One layer of each kind that can be prepared, each with its input."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = Linear(384, 512)
        self.conv = Conv3x3(32, 64, bias=True, size=(8, 8))
        self.upsample = UpsampleConv(32, size=(8, 8))
        self.folding = Conv3x3(32, 16, bias=False, size=(8, 8), takes_shortcut=True)
        self.shortcut = Conv1x1(16, 16, bias=False)
        self.norm = nn.LayerNorm(4)  # is not prepared
        self.to(dtype).eval()

    def prepare(self) -> Net:
        super().prepare()
        self.folding.prepare_weights(self.shortcut)
        return self

    def inputs(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        dtype = next(self.parameters()).dtype
        image = torch.randn(2, 32, 6, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return {"linear": torch.randn(5, 384, dtype=dtype), "conv": image, "upsample": image, "folding": image}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "linear": self.linear(inputs["linear"]),
            "conv": self.conv(inputs["conv"]),
            "upsample": self.upsample(inputs["upsample"]),
            "folding": self.folding(inputs["folding"], shortcut=self.shortcut),
        }


def oracle(weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `Net` should return, in float64 from a state dict."""
    w = {name: weight.detach().double() for name, weight in weights.items()}
    x = {name: value.detach().double() for name, value in inputs.items()}
    folding = F.conv2d(x["folding"], w["folding.weight"], padding=1)
    enlarged = x["upsample"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {
        "linear": x["linear"] @ w["linear.weight"].T + w["linear.bias"],
        "conv": F.conv2d(x["conv"], w["conv.weight"], w["conv.bias"], padding=1),
        "upsample": F.conv2d(enlarged, w["upsample.weight"], w["upsample.bias"], padding=1),
        "folding": folding + F.conv2d(folding, w["shortcut.weight"]),
    }


def net(dtype: torch.dtype = torch.float32) -> tuple[Net, dict[str, Tensor]]:
    """A model, and a copy of its weights."""
    torch.manual_seed(0)
    model = Net(dtype)
    return model, {name: weight.clone() for name, weight in model.state_dict().items()}


def held(model: nn.Module) -> set[str]:
    """The names of the prepared weights."""
    return {name for name, p in model.named_parameters() if isinstance(p, PreparedParameter)}


def assert_right(model: Net, weights: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    inputs = model.inputs()
    want = oracle(weights, inputs)
    with torch.no_grad():
        got = model(inputs)
    for name in want:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < tolerance, (name, float(error))


WEIGHTS = {"linear.weight", "conv.weight", "upsample.weight", "folding.weight", "shortcut.weight"}


@needs_onednn
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str)
def test_prepared_layers_compute_the_same(dtype: torch.dtype, tolerance: float) -> None:
    model, weights = net(dtype)
    assert_right(model, weights, tolerance)
    assert held(model.prepare()) == WEIGHTS
    assert_right(model, weights, tolerance)
    with engine.plain():
        assert_right(model, weights, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(model, weights, 2e-2)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "way",
    [
        lambda m: m.unprepare(),
        lambda m: m.train(),
        lambda m: m.requires_grad_(True),
        lambda m: nn.Sequential(m).train()[0],
        lambda m: m.to(memory_format=torch.preserve_format),
        lambda m: nn.ModuleList([m]).to("cpu")[0],
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.state_dict(), m)[1],
        lambda m: (nn.Sequential(m).state_dict(), m)[1],
    ],
    ids=[
        "unprepare",
        "train",
        "requires_grad_",
        "parent.train",
        "to",
        "parent.to",
        "deepcopy",
        "pickle",
        "state_dict",
        "parent.state_dict",
    ],
)
def test_the_original_weights_come_back_bit_for_bit(way: Callable[[Net], Net], dtype: torch.dtype) -> None:
    model, weights = net(dtype)
    model.norm.weight.requires_grad_(False)
    model.prepare()
    back = way(model)
    assert not back.prepared
    assert held(back) == set()
    assert all(torch.equal(p, weights[name]) for name, p in back.named_parameters())
    trainable = {name for name, p in back.named_parameters() if p.requires_grad}
    assert trainable - {"norm.weight"} == set(weights) - {"norm.weight"}


def test_loading_replaces_prepared_weights() -> None:
    for wrap in (lambda m: m, lambda m: nn.ModuleDict({"m": m})):
        model, weights = net()
        model.prepare()
        doubled = {name: 2 * weight for name, weight in weights.items()}
        target = wrap(model)
        prefix = "m." if target is not model else ""
        target.load_state_dict({prefix + name: weight for name, weight in doubled.items()})
        assert not model.prepared
        assert_right(model.prepare(), doubled)


EDITS: dict[str, Callable[[Net], Any]] = {
    "in place": lambda m: m.linear.weight.mul_(1.5),
    "rows through .data": lambda m: m.linear.weight.data[64:90].zero_(),
    "through .data": lambda m: m.conv.weight.data.mul_(1.5),
    "average through .data": lambda m: m.conv.weight.data.lerp_(torch.randn(64, 32, 3, 3), 0.01),
    "replaced data": lambda m: setattr(m.upsample.weight, "data", torch.zeros(32, 32, 3, 3)),
    "through numpy": lambda m: m.linear.weight.numpy(),
    "detached": lambda m: m.shortcut.weight.detach().zero_(),
    "through dlpack": lambda m: np.from_dlpack(m.linear.weight),
    "storage": lambda m: m.linear.weight.untyped_storage(),
    "address": lambda m: m.linear.weight.data_ptr(),
    "copied into": lambda m: m.folding.weight.copy_(torch.zeros(())),
    "many at once": lambda m: torch._foreach_mul_([m.linear.weight, m.conv.weight], 2.0),
    "initialised": lambda m: nn.init.zeros_(m.linear.weight),
    "made to require a gradient": lambda m: m.linear.weight.requires_grad_(),
    "with a part of the model": lambda m: m.conv.requires_grad_(True),
    "by its attribute": lambda m: setattr(m.linear.weight, "requires_grad", True),
    "index": lambda m: m.linear.weight.__setitem__(0, 0.0),
    "part of the model, loaded": lambda m: m.linear.load_state_dict(
        {"weight": torch.zeros(512, 384)}, strict=False
    ),
    "part of the model, converted": lambda m: m.linear.double(),
    "part of the model, saved": lambda m: m.linear.state_dict(),
}


@needs_onednn
@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_a_prepared_weight_cannot_be_read_or_written(edit: str) -> None:
    model, weights = net()
    model.prepare()
    with pytest.raises(RuntimeError, match=r"call unprepare\(\) of its model first, or train\(\)"):
        EDITS[edit](model)
    assert_right(model, weights)
    model.unprepare()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_an_optimizer_cannot_step_on_prepared_weights() -> None:
    model, _ = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.prepare()
    with pytest.raises(PreparedError):
        optimizer.step()
    model.train()
    before = model.linear.weight.clone()
    optimizer.step()
    assert not torch.equal(model.linear.weight, before)
    assert_right(model, model.state_dict())


@needs_onednn
def test_prepared_weights_describe_themselves() -> None:
    model, weights = net(torch.bfloat16)
    shapes = {
        name: (p.shape, p.dtype, p.device, p.numel(), p.element_size()) for name, p in model.named_parameters()
    }
    model.prepare()
    assert shapes == {
        name: (p.shape, p.dtype, p.device, p.numel(), p.element_size()) for name, p in model.named_parameters()
    }
    weight = model.linear.weight
    assert (weight.ndim, len(weight), weight.is_leaf, weight.grad, weight.is_floating_point()) == (
        2,
        512,
        True,
        None,
        True,
    )
    assert repr(weight) == "PreparedParameter(shape=(512, 384), dtype=torch.bfloat16, device=cpu)"
    assert list(model.unprepare().state_dict()) == list(weights)


HOLDERS: dict[str, Callable[[nn.Parameter], Any]] = {
    "data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    "row": lambda w: w.data[3],
    "numpy": lambda w: w.detach().numpy(),
    "dlpack": lambda w: torch.utils.dlpack.to_dlpack(w.detach()),
    "storage": lambda w: w.untyped_storage(),
    "graph": lambda w: (w * 2).sum(),
    "saved for backward": lambda w: torch.nn.functional.linear(torch.randn(2, 384, requires_grad=True), w),
    "another parameter": lambda w: nn.Parameter(w.data),
    "another process": lambda w: w.share_memory_(),
}


@needs_onednn
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_weight_whose_memory_somebody_holds_is_not_prepared(holder: str) -> None:
    """It could be changed from there, as this test does."""
    model, weights = net()
    other = HOLDERS[holder](model.linear.weight)
    assert held(model.prepare()) == WEIGHTS - {"linear.weight"}
    if holder in ("data", "detached", "row", "numpy", "another parameter", "another process"):
        with torch.no_grad():
            other[...] = 0
        weights["linear.weight"] = model.linear.weight.detach().clone()
        assert (weights["linear.weight"] == 0).any()
    assert_right(model, weights)
    del other
    if holder != "another process":
        assert held(model.prepare()) == WEIGHTS
        assert_right(model, weights)


@needs_onednn
def test_what_is_not_prepared_is_read_at_each_call() -> None:
    model, weights = net()
    model.prepare()
    model.linear.bias.data += 1
    model.upsample.bias.data[3] -= 1
    weights = weights | {"linear.bias": model.linear.bias.clone(), "upsample.bias": model.upsample.bias.clone()}
    assert_right(model, weights)
    model.conv.weight = nn.Parameter(torch.randn(64, 32, 3, 3))  # an ordinary parameter in place of a prepared one
    model.shortcut.weight = nn.Parameter(torch.randn(16, 16, 1, 1))
    weights["conv.weight"] = model.conv.weight.detach().clone()
    weights["shortcut.weight"] = model.shortcut.weight.detach().clone()
    assert_right(model, weights)
    assert_right(model.prepare(), weights)
    assert "conv.weight" in held(model)


def test_gradients_with_respect_to_the_input_of_a_prepared_model() -> None:
    model, _ = net(torch.float64)
    x = {name: value.requires_grad_() for name, value in model.inputs().items()}
    wanted = torch.autograd.grad([value.square().sum() for value in model(x).values()], list(x.values()))
    model.prepare()
    got = torch.autograd.grad([value.square().sum() for value in model(x).values()], list(x.values()))
    assert all(torch.allclose(a, b) for a, b in zip(got, wanted, strict=True))
    with pytest.raises(RuntimeError, match="does not require grad"):  # the weights are frozen
        sum(value.sum() for value in model(model.inputs()).values()).backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
def test_forward_mode_derivatives_of_a_prepared_model() -> None:
    model, _ = net()
    inputs = model.inputs()

    def tangents() -> list[Tensor]:
        torch.manual_seed(2)
        with torch.autograd.forward_ad.dual_level():
            dual = {k: torch.autograd.forward_ad.make_dual(x, torch.randn_like(x)) for k, x in inputs.items()}
            results = model(dual)
            return [torch.autograd.forward_ad.unpack_dual(y).tangent for y in results.values()]

    wanted = tangents()
    model.prepare()
    for got, want in zip(tangents(), wanted, strict=True):
        assert got is not None
        assert torch.allclose(got, want, atol=1e-4)


def test_training_mode_is_refused() -> None:
    model, _ = net()
    with pytest.raises(RuntimeError, match="expected a model in eval mode, got one in training mode"):
        model.train().prepare()


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, weights = net()  # PyTorch forbids to replace their data
        assert_right(model.prepare(), weights)
        model.linear.weight.neg_()
        weights["linear.weight"].neg_()
        assert_right(model, weights)


@needs_onednn
@pytest.mark.slow
def test_threads_compute_while_another_prepares() -> None:
    """Readers always see either the weights or their prepared form."""
    model, weights = net()
    inputs, stop, errors = model.inputs(), threading.Event(), []
    want = oracle(weights, inputs)

    def compute() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    got = model(inputs)
                    worst = max(float((got[k].double() - want[k]).abs().max() / want[k].abs().max()) for k in want)
                    if not worst < 1e-5:
                        errors.append(worst)
                except Exception as error:
                    errors.append(error)

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        model.prepare()
        model.unprepare()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


@needs_onednn
def test_the_flop_counter_counts_prepared_layers() -> None:
    model, _ = net()
    model.prepare()
    with FlopCounterMode(display=False) as counter:
        model(model.inputs())
    pixels, windows = 2 * 6 * 7, 2 * 7 * 8
    convs = 9 * (32 * 64 + 32 * 16) * pixels + 2 * 4 * 32 * 64 * windows
    assert counter.get_total_flops() == 2 * (5 * 384 * 512 + convs)
