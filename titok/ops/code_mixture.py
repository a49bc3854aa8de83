"""The expected codebook row under softmax weights, as TiTok's stage-2 decoder feeds it to the pixel decoder."""

from __future__ import annotations

from typing import Any

import torch

from titok.checks import FLOAT_DTYPES, check_tensor
from titok.ops import _registry
from titok.ops._extension import why_no_triton
from titok.profiling import ranged


@ranged("code_mixture")
def code_mixture(logits: torch.Tensor, codebook: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """softmax(logits) @ codebook, the probabilities never stored by the Triton kernel.

    The natural layout is channels-last: the decoder head as a linear layer writes logits (B, P, K) with K
    contiguous and gets (B, P, C). Anything else is copied to that layout first.

    Args:
        logits: (..., K), float16, bfloat16, float32 or float64; K codes.
        codebook: (K, C), any of these dtypes, same device; cast to the dtype of `logits`.
        backend: "triton", "plain", or None for the fastest that can run.

    Returns:
        (..., C) in the dtype of `logits`, under autocast too. The softmax and every sum are accumulated in float32
        (float64 for float64). A row of logits that holds NaN or +inf, or -inf alone, gives NaN, as torch.softmax.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or a back end of no such name.
        RuntimeError: the named back end can't run here.

    Source: TiTok (arXiv:2406.07550), decoder fine-tuning: the expected proxy code stands for the arg max, so
    that the pixel loss reaches the decoder.
    """
    check_tensor("logits", logits, shape=("...", "K"), dtypes=FLOAT_DTYPES)
    check_tensor("codebook", codebook, shape=(logits.shape[-1], "C"), dtypes=FLOAT_DTYPES, device=logits.device)
    if codebook.numel() == 0:
        raise ValueError(f"codebook: expected at least one code and one channel, got {tuple(codebook.shape)}")
    if _registry.runs_eagerly(logits, codebook, gradients=True):
        if _choose(backend, logits, codebook) == "plain":
            return _plain_forward(logits, codebook)  # with PyTorch's own gradient, which costs less
        if _registry.runs_eagerly(logits, codebook):
            return _forward(logits, codebook, backend)
    return _OP(logits, codebook, backend)


def _choose(backend: str | None, logits: torch.Tensor, codebook: torch.Tensor) -> str:
    def triton() -> str | None:
        if logits.dtype == torch.float64:
            return "it has no float64 kernel"
        if codebook.shape[1] > 256:
            return f"it holds a row of at most 256 channels, got {codebook.shape[1]}"
        return why_no_triton(logits, codebook)

    return _registry.choose("code_mixture", backend, {"triton": triton, "plain": lambda: None})


def _forward(logits: torch.Tensor, codebook: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    if _choose(backend, logits, codebook) == "plain":
        return _plain_forward(logits, codebook)
    out = _fake(logits, codebook)
    if out.numel():
        from titok.kernels import code_mixture as kernels

        rows, codes = logits.contiguous().view(-1, logits.shape[-1]), codebook.to(logits.dtype).contiguous()
        kernels.forward(rows, codes, out.view(-1, out.shape[-1]))
    return out


def _plain_forward(logits: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    with _registry.no_autocast(logits):  # softmax itself accumulates in float32
        return torch.softmax(logits.contiguous(), -1) @ codebook.to(logits.dtype)


def _weights(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _fake(logits: torch.Tensor, codebook: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    return logits.new_empty((*logits.shape[:-1], codebook.shape[1]))


def _backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    mixture: torch.Tensor,
    need_logits: bool,
    need_codebook: bool,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d loss / d (logits, codebook); an empty tensor for one that is not needed."""
    logits, grad = logits.contiguous(), grad.contiguous()
    if _choose(backend, logits, codebook) == "triton":
        return _backward_triton(grad, logits, codebook, mixture, need_logits, need_codebook)
    grad_logits, grad_codebook = logits.new_empty(0), codebook.new_empty(0)
    with _registry.no_autocast(logits):
        weights = _weights(logits)
        if need_logits:
            inner = (grad @ codebook.to(grad.dtype).mT).to(weights.dtype)
            grad_logits = torch._softmax_backward_data(inner, weights, -1, weights.dtype).to(logits.dtype)
        if need_codebook:
            rows = weights.reshape(-1, weights.shape[-1]).to(grad.dtype)
            grad_codebook = (rows.mT @ grad.reshape(-1, grad.shape[-1])).to(codebook.dtype)
    return grad_logits, grad_codebook


def _backward_triton(
    grad: torch.Tensor,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    mixture: torch.Tensor,
    need_logits: bool,
    need_codebook: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from titok.kernels import code_mixture as kernels

    grad_logits, grad_codebook = torch.zeros_like(logits), torch.zeros_like(codebook)
    if logits.numel():
        (num_codes, channels), rows = codebook.shape, logits.view(-1, logits.shape[-1])
        grad = grad.view(-1, channels)
        codes = codebook.to(logits.dtype).contiguous()
        out = (mixture.view(-1, channels), grad_logits.view(-1, num_codes))
        if (summed := kernels.backward(grad, rows, codes, *out, need_codebook)) is not None:
            grad_codebook = summed.to(codebook.dtype)
    return grad_logits if need_logits else logits.new_empty(
        0
    ), grad_codebook if need_codebook else codebook.new_empty(0)


def _backward_fake(
    grad: torch.Tensor,
    logits: torch.Tensor,
    codebook: torch.Tensor,
    mixture: torch.Tensor,
    need_logits: bool,
    need_codebook: bool,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        logits.new_empty(logits.shape if need_logits else 0),
        codebook.new_empty(codebook.shape if need_codebook else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    logits, codebook, ctx.backend = inputs
    ctx.save_for_backward(logits, codebook, output)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_logits, need_codebook = ctx.needs_input_grad[:2]
    grads = _BACKWARD_OP(grad, *ctx.saved_tensors, need_logits, need_codebook, ctx.backend)
    return grads[0] if need_logits else None, grads[1] if need_codebook else None, None


_BACKWARD_OP = _registry.register(
    "code_mixture_backward(Tensor grad, Tensor logits, Tensor codebook, Tensor mixture, bool need_logits, "
    "bool need_codebook, str? backend=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_OP = _registry.register(
    "code_mixture(Tensor logits, Tensor codebook, str? backend=None) -> Tensor",
    _forward,
    _fake,
    backward=_autograd,
    setup_context=_setup_context,
)
