"""Averages of parameters, compared with golden values of the official code."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from golden import Case
from titok import TiTok
from titok.training.ema import EMA, ema_decay


class Parameters(nn.Module):
    """Parameters by name, without a forward pass."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Changes all parameters that require gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def test_decay_is_the_official_one() -> None:
    case = Case("schedules")
    got = [ema_decay(update, 0.999) for update in case["in.ema.steps"].tolist()]
    assert got == pytest.approx(case["out.ema.decay0.999"].tolist(), rel=1e-12)


def test_averages_are_the_official_ones() -> None:
    want = Case("schedules")["out.ema.shadow_of_1_k_sign"]
    model = Parameters(values=torch.zeros(3, dtype=torch.float64))
    ema = EMA(model)
    for k, expected in enumerate(want):
        with torch.no_grad():
            model.values.copy_(torch.tensor([1.0, k, (-1.0) ** k]))
        ema.update()
        torch.testing.assert_close(ema.averages["values"], expected, rtol=1e-10, atol=1e-10)


def test_first_update_copies_the_parameters() -> None:
    model = Parameters(x=torch.full((3,), torch.inf), y=torch.zeros(2))  # inf - inf would be NaN
    ema = EMA(model)
    with torch.no_grad():
        model.x.copy_(torch.tensor([0.1, -0.7, 3e38]))
    ema.update()
    assert torch.equal(ema.averages["x"], model.x)


def test_swapping_and_back_bit_for_bit(tiny_tokenizer) -> None:
    model = tiny_tokenizer()
    ema = EMA(model)
    for _ in range(3):
        train(model)
        ema.update()
    images = torch.rand(2, 3, 16, 24)
    before = copy.deepcopy(model.state_dict())
    averages = copy.deepcopy(ema.averages)
    with torch.no_grad():
        outputs = model.encode_latents(images)
        with ema.swapped():
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, averages[name]), name
            averaged = TiTok(model.config)
            averaged.load_state_dict(model.state_dict())
            swapped_outputs = model.encode_latents(images)
            assert torch.equal(swapped_outputs, averaged.eval().encode_latents(images))
        assert not torch.equal(outputs, swapped_outputs)
        assert torch.equal(model.encode_latents(images), outputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, averages[name]) for name, value in ema.averages.items())


def test_a_prepared_model_computes_with_the_averages_too(tiny_tokenizer) -> None:
    model = tiny_tokenizer()
    ema = EMA(model)
    train(model)
    ema.update()
    train(model)
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        with ema.swapped():
            expected = model.decode(model.encode(images))
        model.prepare()
        with ema.swapped():
            torch.testing.assert_close(model.decode(model.encode(images)), expected)


def test_parameters_come_back_after_an_error() -> None:
    model = Parameters(x=torch.ones(2))
    ema = EMA(model)
    ema.averages["x"].zero_()

    def fail() -> None:
        with ema.swapped():
            assert not model.x.any()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.x.all()
    ema.update()


def test_frozen_parameters_are_the_models_own() -> None:
    model = Parameters(learned=torch.zeros(2), frozen=torch.ones(2))
    model.frozen.requires_grad_(False)
    ema = EMA(model)
    assert set(ema.averages) == {"learned"}
    model.frozen.fill_(5.0)
    ema.update()
    with ema.swapped():
        assert model.frozen.tolist() == [5.0, 5.0]


def test_a_model_without_learned_parameters_is_left_alone() -> None:
    model = Parameters(frozen=torch.ones(2)).requires_grad_(False)
    ema = EMA(model)
    ema.update()
    with ema.swapped():
        assert model.frozen.all()


def test_shared_parameters_have_one_average() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ema = EMA(model)
    assert set(ema.averages) == {"0.weight"}
    for _ in range(2):
        train(model)
        ema.update()
    with ema.swapped():
        assert model[1].weight is model[0].weight
        assert torch.equal(model[1].weight, ema.averages["0.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    model = Parameters(x=torch.zeros(4, dtype=dtype), y=torch.zeros(2))
    ema = EMA(model)
    ema.update()
    ema.updates = 100_000
    with torch.no_grad():
        model.x.fill_(1)
    ema.update()
    torch.testing.assert_close(ema.averages["x"], torch.full((4,), 0.001))
    with ema.swapped():
        assert model.x.dtype == dtype
        torch.testing.assert_close(model.x.float(), torch.full((4,), 0.001), rtol=1e-2, atol=0)
    assert model.x.eq(1).all()


def test_a_resumed_average_continues_bit_for_bit(tmp_path) -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model)
    for _ in range(3):
        train(model)
        ema.update()
    file = tmp_path / "averages.safetensors"
    safetensors.torch.save_file(ema.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = EMA(other)
    resumed.load_state_dict(safetensors.torch.load_file(file))
    assert resumed.updates == 3
    train(model)
    other.load_state_dict(model.state_dict())
    ema.update()
    resumed.update()
    assert all(torch.equal(value, resumed.averages[name]) for name, value in ema.averages.items())


def test_wrong_states_and_calls_are_refused() -> None:
    ema = EMA(Parameters(x=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"got differences in \['averages.x', 'averages.y'\]"):
        ema.load_state_dict({"updates": torch.tensor(1), "averages.y": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"averages.x.*expected float32 \(2,\), got float32 \(3,\)"):
        ema.load_state_dict({"updates": torch.tensor(1), "averages.x": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"updates.*expected int64 \(\), got float32 \(\)"):
        ema.load_state_dict({"updates": torch.tensor(1.0), "averages.x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got 1.5"):
        EMA(Parameters(x=torch.zeros(2)), decay=1.5)
    with ema.swapped():
        with pytest.raises(RuntimeError, match="update: the parameters hold the averages"):
            ema.update()
        with pytest.raises(RuntimeError, match="swapped: the parameters hold the averages"), ema.swapped():
            pass
    ema.update()
