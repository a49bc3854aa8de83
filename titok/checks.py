"""Checks of arguments. The error is one line that names the argument, what was expected and what came.

Public functions check their arguments once, at the entry. What they call behind it trusts its arguments.

The values of a tensor on a GPU (ids, classes, pixels) cannot be read without waiting for the GPU. There the same
condition is asserted on the device, so a violation surfaces later, as CUDA's device-side assertion.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titok.config import as_integer, is_bool

INTEGER_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str | torch.SymInt] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks type, dtype, shape and device of a tensor; None leaves one of them free.

    Args:
        name: of the argument, for the message.
        shape: one entry for each dimension. An int must match; a str stands for any size and names the dimension
            in the message. A leading "..." stands for any number of dimensions.

    Raises:
        TypeError: `value` is not a tensor or has another dtype.
        ValueError: the shape or the device differs.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if shape is not None:
        got = value.shape
        leading = len(shape) > 0 and shape[0] == "..."
        wanted = shape[1:] if leading else shape
        fits = len(got) >= len(wanted) if leading else len(got) == len(wanted)
        if fits:
            for size, expected in zip(got[len(got) - len(wanted) :], wanted, strict=True):
                if not isinstance(expected, str) and size != expected:
                    fits = False
        if not fits:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"{name}: expected shape ({sizes}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def check_bool(name: str, value: Any) -> bool:
    """Checks a bool of Python, and returns it.

    Raises:
        TypeError: anything else.
    """
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def check_int(name: str, value: Any) -> int:
    """Checks an integer of Python, NumPy or PyTorch, and returns it as an int (or as the SymInt that it is).

    Raises:
        TypeError: anything else, a bool or a float too.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    integer = as_integer(value)
    if integer is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return integer


def check_number(name: str, value: Any) -> float:
    """Checks a real number of Python or NumPy, which may be infinite or NaN, and returns it as a float.

    Raises:
        TypeError: anything else, a bool too.
        ValueError: an integer too large for a float.
    """
    if type(value) is float:
        return value
    if type(value) is not int and (is_bool(value) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number, got one too large for a float") from None


def check_eps(eps: Any) -> None:
    """Checks the number that a norm adds to the variance: finite and above 0.

    Raises:
        TypeError: not a number.
        ValueError: not finite, or not above 0.
    """
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a number above 0, got {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a number above 0, got {eps}")


def _check_values(name: str, value: Tensor, valid: Tensor, expected: str) -> None:
    """Raises `ValueError` unless all of `valid` is true, a bool tensor of the shape of `value`."""
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    if value.is_cuda:
        torch._assert_async(valid.all(), f"{name}: expected {expected}")
    elif not bool(valid.all()):
        bad = value[~valid]
        raise ValueError(f"{name}: expected {expected}, got {bad[0].item()!r} ({bad.numel()} such values)")


def check_images(images: Any, channels: int, size: tuple[int, int]) -> None:
    """Checks images (B, channels, *size) of any floating dtype with values in [0, 1]; NaN is refused.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: another shape, or a value outside [0, 1].
    """
    if isinstance(images, Tensor) and not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise TypeError(
            f"images: expected a floating dtype with values in [0, 1], got {kind} (divide uint8 by 255)"
        )
    check_tensor("images", images, shape=("B", channels, *size), dtypes=FLOAT_DTYPES)
    _check_values("images", images, (images >= 0) & (images <= 1), "values in [0, 1]")


def _as_int64(value: Any) -> Any:
    """A tensor of any integer dtype as int64. Anything else is returned as it is."""
    is_integer = isinstance(value, Tensor) and value.dtype in INTEGER_DTYPES
    return value.long() if is_integer else value


def check_tokens(tokens: Any, length: int, bound: int, *, name: str = "tokens") -> Tensor:
    """Checks token ids (B, length), of any integer dtype, in [0, bound), and returns them as int64.

    Raises:
        TypeError: not a tensor, or not of an integer dtype.
        ValueError: another shape, or an id outside [0, bound).
    """
    tokens = _as_int64(tokens)
    check_tensor(name, tokens, shape=("B", length), dtypes=(torch.int64,))
    _check_values(name, tokens, (tokens >= 0) & (tokens < bound), f"ids in [0, {bound})")
    return tokens


def check_latents(latents: Any, length: int, dim: int) -> None:
    """Checks latents (B, length, dim) of a VAE, of any floating dtype, finite.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: another shape, or a value that is not finite.
    """
    check_tensor("latents", latents, shape=("B", length, dim), dtypes=FLOAT_DTYPES)
    _check_values("latents", latents, latents.isfinite(), "finite values")


def check_labels(labels: Any, num_classes: int) -> Tensor:
    """Checks labels (B,), of any integer dtype, in [0, num_classes], and returns them as int64.

    The label num_classes stands for "no class".

    Raises:
        TypeError: not a tensor, or not of an integer dtype.
        ValueError: another shape, or a class outside [0, num_classes].
    """
    labels = _as_int64(labels)
    check_tensor("labels", labels, shape=("B",), dtypes=(torch.int64,))
    _check_values("labels", labels, (labels >= 0) & (labels <= num_classes), f"classes in [0, {num_classes}]")
    return labels


def labels_on_host(labels: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """A checked copy of the labels, (B,) int64 on the CPU, so that the caller may change theirs.

    Raises:
        TypeError: neither a tensor of an integer dtype nor a sequence of integers.
        ValueError: another shape, or a class outside [0, num_classes].
    """
    if not isinstance(labels, Tensor):
        try:
            values = torch.tensor(labels, device="cpu")
            # PyTorch takes a bool among integers for 0 or 1, and finds no dtype for an empty list.
            if isinstance(labels, (list, tuple)) and any(map(is_bool, labels)):
                values = values.bool()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels: expected a tensor or a sequence of ints, got {labels!r:.60}") from None
        labels = values if values.numel() else values.long()
    return check_labels(labels.to("cpu", copy=True), num_classes)


def check_integer(name: str, value: Any, bits: int) -> int:
    """Checks an integer in [0, 2^bits) of Python, NumPy or PyTorch, and returns it as an int.

    Raises:
        ValueError: anything else, a bool or a float too.
    """
    integer = value if type(value) is int else as_integer(value)
    if integer is None or not 0 <= integer < 1 << bits:
        raise ValueError(f"{name}: expected an int in [0, 2^{bits}), got {value!r}")
    return integer
