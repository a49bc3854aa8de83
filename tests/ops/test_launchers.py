"""Launchers of titok.kernels: optional tensors, recording, the device that a kernel runs on."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from titok.kernels import _launch, add_layer_norm, code_mixture, group_norm_silu, masked_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU Triton interprets: see conftest.py


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


@pytest.mark.slow
def test_attention_without_log_sum_exp() -> None:
    """The same output whether or not the log-sum-exp is stored, for few tokens and for many."""
    for tokens in (17, 70):
        qkv, lse = randn(2, tokens, 3 * 2 * 16), randn(2, 2, tokens)
        first, second = torch.empty(2, 2, tokens, 32, device=DEVICE).unbind()
        masked_attention.forward(qkv, None, 2, 0, 0.25, first, lse)
        masked_attention.forward(qkv, None, 2, 0, 0.25, second, None)
        assert torch.equal(first, second)


def test_mixture_without_gradient_of_the_codebook() -> None:
    logits, codebook, grad = randn(5, 20), randn(20, 8), randn(5, 8)
    mixture, first, second = torch.empty_like(grad), torch.empty_like(logits), torch.empty_like(logits)
    code_mixture.forward(logits, codebook, mixture)
    grad_codebook = code_mixture.backward(grad, logits, codebook, mixture, first, need_codebook=True)
    assert grad_codebook is not None
    assert grad_codebook.shape == codebook.shape
    assert code_mixture.backward(grad, logits, codebook, mixture, second, need_codebook=False) is None
    assert torch.equal(first, second)


def test_norm_without_gradient_of_the_sum() -> None:
    grad, total, weight = randn(5, 24), randn(5, 24), randn(24)
    first, second = torch.empty_like(grad), torch.empty_like(grad)
    parameters = add_layer_norm.backward(torch.zeros_like(grad), grad, total, weight, 1e-6, first)
    assert parameters.shape == (2, 24)
    assert torch.equal(add_layer_norm.backward(None, grad, total, weight, 1e-6, second), parameters)
    assert torch.equal(first, second)


@pytest.mark.parametrize("side", [4, 12], ids=["one pass", "chunks"])
def test_group_norm_without_residual(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves `total` alone, and gives what a residual of zeros gives."""
    monkeypatch.setattr(group_norm_silu, "GROUP_NORM_SILU_ONE_PASS_VALUES", 1024)
    x = randn(2, 16, side, side).contiguous(memory_format=torch.channels_last)
    weight, bias = randn(16), randn(16)

    def run(residual: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        total, normalised = torch.full_like(x, 7.0), torch.empty_like(x)
        mean, rstd = torch.empty(2, 2, 4, device=DEVICE).unbind()
        group_norm_silu.forward(x, residual, 4, weight, bias, 1e-6, total, normalised, mean, rstd)
        return total, normalised, mean, rstd

    bare, zeros = run(None), run(torch.zeros_like(x))
    assert (bare[0] == 7).all()
    assert torch.equal(zeros[0], x)
    assert all(torch.equal(a, b) for a, b in zip(bare[1:], zeros[1:], strict=True))


def normalise(x: torch.Tensor) -> torch.Tensor:
    total, normalised = torch.empty_like(x), torch.full_like(x, 7.0)
    ones, zeros = torch.ones(x.shape[-1], device=DEVICE), torch.zeros(x.shape[-1], device=DEVICE)
    add_layer_norm.forward(x, torch.zeros_like(x), ones, zeros, 1e-6, total, normalised)
    return normalised


def test_recording_runs_nothing_and_ends_with_its_context() -> None:
    x = randn(3, 8)
    with _launch.record() as launches:
        assert (normalise(x) == 7).all()
    assert [launch.kernel.__name__ for launch in launches] == ["add_layer_norm_forward"]
    assert launches[0].signature["x_ptr"] == "*fp32"
    assert launches[0].constexprs == {"D": 8, "BLOCK_D": 8}
    assert not (normalise(x) == 7).any()
    assert len(launches) == 1


def test_other_threads_launch_while_one_records() -> None:
    x, results = randn(3, 8), []
    with _launch.record() as launches:
        thread = threading.Thread(target=lambda: results.append(normalise(x)))
        thread.start()
        thread.join()
    assert launches == []
    assert not (results[0] == 7).any()


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or nullcontext())
    x = randn(3, 8)
    normalise(x)
    assert [tensor.data_ptr() for tensor in entered] == [x.data_ptr()]


def test_what_no_kernel_takes_is_refused() -> None:
    with (
        _launch.record(),
        pytest.raises(TypeError, match="eps: expected a tensor, an int, a float or None, got str"),
    ):
        add_layer_norm.forward(*(randn(1, 8) for _ in range(2)), randn(8), randn(8), "x", randn(1, 8), randn(1, 8))  # type: ignore[arg-type]
