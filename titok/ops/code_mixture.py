"""The expected codebook row under softmax weights, as TiTok's stage-2 decoder feeds it to the pixel decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.ops.core.available import why_no_triton
from titok.ops.core.op import Op
from titok.ops.core.parts import Composite, Gradient, Kernel, contiguous, product, vjp


def code_mixture(logits: Tensor, codebook: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(logits) @ codebook; the Triton kernel never stores the probabilities. Differentiable once.

    The natural layout is channels-last: the decoder head as a linear layer writes logits (B, P, K) with K
    contiguous and gets (B, P, C). Anything else is copied to that layout first.

    Args:
        logits: (..., K), float16, bfloat16, float32 or float64; K codes.
        codebook: (K, C), any of these dtypes, same device; converted to the dtype of `logits`.
        backend: "triton", "plain", or None for the fastest that can run.

    Returns:
        (..., C) in the dtype of `logits`, under autocast too. The softmax and every sum are accumulated in float32
        (float64 for float64). A row of logits that holds NaN or +inf, or -inf alone, gives NaN, as torch.softmax.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end cannot run here.

    Source: TiTok (arXiv:2406.07550), decoder fine-tuning: the expected proxy code stands for the arg max, so
    that the pixel loss reaches the decoder.
    """
    return _CODE_MIXTURE(logits, codebook, backend=backend)[0]


class Arguments(NamedTuple):
    logits: Tensor
    codebook: Tensor


def _check(a: Arguments | BackwardArguments) -> None:
    check_tensor("logits", a.logits, shape=("...", "K"), dtypes=FLOAT_DTYPES)
    codes, device = a.logits.shape[-1], a.logits.device
    check_tensor("codebook", a.codebook, shape=(codes, "C"), dtypes=FLOAT_DTYPES, device=device)
    if a.codebook.numel() == 0:
        raise ValueError(f"codebook: expected at least one code and one channel, got {tuple(a.codebook.shape)}")


def _results(a: Arguments) -> tuple[Tensor]:
    return (a.logits.new_empty((*a.logits.shape[:-1], a.codebook.shape[1])),)


def _triton(a: Arguments, mixture: Tensor) -> None:
    from titok.kernels import code_mixture as kernels

    kernels.forward(_rows(a.logits), a.codebook.to(a.logits.dtype), _rows(mixture))


def _plain(a: Arguments) -> tuple[Tensor]:
    # torch.softmax accumulates in float32 by itself.
    probabilities = torch.softmax(a.logits.contiguous(), -1)
    return (product(probabilities, a.codebook.to(a.logits.dtype)),)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _flops(a: Arguments | BackwardArguments) -> int:
    return 2 * a.logits.numel() * a.codebook.shape[1]


# ---------------------------------------------------------------------------------------------------------------
# The gradient


class BackwardArguments(NamedTuple):
    grad: Tensor
    logits: Tensor
    codebook: Tensor
    mixture: Tensor
    need_codebook: bool


def _check_backward(a: BackwardArguments) -> None:
    _check(a)
    shape = (*a.logits.shape[:-1], a.codebook.shape[1])
    for name, tensor in (("grad", a.grad), ("mixture", a.mixture)):
        check_tensor(name, tensor, shape=shape, dtypes=(a.logits.dtype,), device=a.logits.device)


def _backward_results(a: BackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of logits and codebook; the second is empty where nobody needs it."""
    return a.logits.new_empty(a.logits.shape), a.codebook.new_empty(a.codebook.shape if a.need_codebook else 0)


def _backward_triton(a: BackwardArguments, grad_logits: Tensor, grad_codebook: Tensor) -> None:
    from titok.kernels import code_mixture as kernels

    codebook = a.codebook.to(a.logits.dtype)
    grad, logits, mixture = _rows(a.grad), _rows(a.logits), _rows(a.mixture)
    sums = kernels.backward(grad, logits, codebook, mixture, _rows(grad_logits), need_codebook=a.need_codebook)
    if sums is not None:
        grad_codebook.copy_(sums)


def _backward_plain(a: BackwardArguments) -> tuple[Tensor, ...]:
    wide = torch.promote_types(a.logits.dtype, torch.float32)
    logits, codebook = a.logits.to(wide), a.codebook.to(a.logits.dtype).to(wide)

    def mixture(logits: Tensor, codebook: Tensor = codebook) -> Tensor:
        return torch.softmax(logits, -1) @ codebook

    inputs = (logits, codebook) if a.need_codebook else (logits,)
    grad_logits, *rest = vjp(mixture, inputs, a.grad.to(wide))
    grad_codebook = rest[0].to(a.codebook.dtype) if rest else a.codebook.new_empty(0)
    return grad_logits.to(a.logits.dtype).contiguous(), grad_codebook.contiguous()


# ---------------------------------------------------------------------------------------------------------------
# Back ends


def _why_no_triton(a: Arguments | BackwardArguments) -> str | None:
    if a.logits.dtype == torch.float64:
        return "it has no float64 kernel"
    if a.codebook.shape[1] > 256:
        return f"it holds a row of at most 256 channels, got {a.codebook.shape[1]}"
    return why_no_triton(a.logits, a.codebook)


_BACKWARD = Op(
    "code_mixture_backward",
    BackwardArguments,
    2,
    check=_check_backward,
    results=_backward_results,
    backends=(
        Kernel("triton", _backward_triton, _why_no_triton, contiguous),
        Composite("plain", _backward_plain),
    ),
    flops=lambda a: _flops(a) * (1 + a.need_codebook),
)

_CODE_MIXTURE = Op(
    "code_mixture",
    Arguments,
    1,
    check=_check,
    results=_results,
    backends=(Kernel("triton", _triton, _why_no_triton, contiguous), Composite("plain", _plain)),
    gradient=Gradient(
        _BACKWARD,
        save=lambda a, outputs: (*a, *outputs),
        arguments=lambda grads, saved, a, needs: (*grads, *saved, needs[1]),
        gradients=lambda grads, returned: returned,
    ),
    flops=_flops,
)
