"""The random choices of one call, and the comparisons that all calls share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLOATS = (F32, BF16, F16, F64)
# Relative rounding error of a stored value, and the spacing of the smallest ones.
EPS = {F16: 2.0**-10, BF16: 2.0**-7, F32: 2.0**-22, F64: 2.0**-51}
TINY = {F16: 2.0**-23, BF16: 1e-38, F32: 1e-38, F64: 1e-300}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in FLOATS}
NOT_A_TENSOR = (None, 3, "text", [1.0], torch.float32)


class Draw:
    """Random choices, a function of the seed and the number of the call.

    Every tensor that it makes is remembered, so that `check_inputs` can tell whether the call changed one.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.number = number
        self.random = random.Random(f"{seed}:{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.story: dict[str, str] = {}  # what was chosen, for the message of a failure
        self._inputs: list[tuple[str, Tensor, Tensor]] = []

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, *, least: int = 0, most: int = 300) -> int:
        """A size from `least` to `most`: mostly small, and around multiples of vectors and tiles."""
        sizes = (
            0,
            1,
            1,
            2,
            3,
            4,
            5,
            7,
            8,
            9,
            12,
            15,
            16,
            17,
            24,
            31,
            32,
            33,
            48,
            49,
            63,
            64,
            65,
            96,
            97,
            130,
            257,
        )
        return self.pick(*(s for s in sizes if least <= s <= most))

    def note(self, **chosen: Any) -> None:
        self.story |= {name: f"{value}" for name, value in chosen.items()}

    # --- tensors

    def normal(self, *shape: int, dtype: torch.dtype = F64, spread: float = 1.0, centre: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator, dtype=F64) * spread + centre).to(dtype)

    def bits(self, *shape: int, probability: float = 0.5) -> Tensor:
        """Bools that are true with this probability."""
        return torch.rand(shape, generator=self.generator) < probability

    def sprinkle(self, x: Tensor, *values: float, probability: float = 0.1) -> Tensor:
        """A copy with the values at random places."""
        x = x.clone()
        for value in values:
            x[self.bits(*x.shape, probability=probability)] = value
        return x

    def tensor(
        self,
        name: str,
        values: Tensor,
        layouts: Sequence[str] = (),
        *,
        gradient: bool = False,
        aligned: bool = False,
    ) -> Tensor:
        """The values in memory of a random layout, between other values where the layout has gaps.

        Without `aligned`, one in twenty tensors begins at an address that is no multiple of the bytes of an element.

        Args:
            layouts: those to choose from beside "contiguous" and "offset": "gap" (rows lie apart), "step" (so do
                neighbours), "permuted" (dimensions in another order), "expanded" (one dimension has stride 0, and its
                first values everywhere), "channels last".
        """
        layout = self.pick("contiguous", "offset", *layouts)
        if not aligned and values.numel() > 0 and self.chance(0.05):
            layout = "unaligned"
        x = _LAYOUTS[layout](self, values)
        where = f"strides {x.stride()} at {x.storage_offset()} of {layout} memory"
        self.note(**{name: f"{str(x.dtype)[6:]}{tuple(x.shape)} {where}"})
        self._inputs.append((name, x, x.clone()))
        return x.requires_grad_() if gradient else x

    def surrounding(self, *shape: int, like: Tensor) -> Tensor:
        """What lies around a tensor: NaN, or the largest integers, so that a value read from there is noticed."""
        if like.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        value = torch.nan if like.is_floating_point() else torch.iinfo(like.dtype).max
        return torch.full(shape, value, dtype=like.dtype)

    def check_inputs(self, *but: str) -> None:
        """No tensor has changed, except those named."""
        for name, x, before in self._inputs:
            assert name in but or same_bits(x.detach(), before), f"{name} was changed"

    # --- wrong arguments

    def spoil(
        self, arguments: dict[str, Any], wrong: dict[str, Sequence[Any]], optional: Sequence[str] = ()
    ) -> str:
        """Replaces one argument by a wrong one, from `wrong` or, for tensors, of a wrong type, dtype or shape."""
        tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        name = self.pick(*tensors, *(n for n in wrong if n in arguments))
        right = arguments[name]
        if name in wrong:
            value = self.pick(*wrong[name])
        elif self.chance(0.4):
            value = self.pick(*(v for v in NOT_A_TENSOR if v is not None or name not in optional))
        elif self.chance(0.6):
            dtypes = (torch.int32, torch.complex64, torch.float8_e4m3fn)
            value = right.detach().to(self.pick(*(dtype for dtype in dtypes if dtype != right.dtype)))
        else:
            value = torch.tensor(1, dtype=right.dtype)  # without dimensions
        arguments[name] = value
        shown = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        self.note(wrong=f"{name} = {shown}")
        return name

    def must_raise(self, call: Callable[[], Any]) -> None:
        """The call raises an error that says what was expected, and changes nothing."""
        assert error_of(call) is not None, "a wrong argument was taken"
        self.check_inputs()


def error_of(call: Callable[[], Any]) -> TypeError | ValueError | None:
    """What the call raises, which says what was expected; None where it returns."""
    error = None
    try:
        call()
    except (TypeError, ValueError) as raised:
        error = raised
    assert error is None or ": expected " in str(error), f"the message does not say what was expected: {error}"
    return error


def _contiguous(draw: Draw, values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype).copy_(values)


def _offset(draw: Draw, values: Tensor) -> Tensor:
    start = draw.pick(1, 2, 3, 5, 8)
    flat = draw.surrounding(start + values.numel(), like=values)
    return flat[start:].view(values.shape).copy_(values)


def _gap(draw: Draw, values: Tensor) -> Tensor:
    if values.ndim == 0:
        return _offset(draw, values)
    before, after = draw.pick((0, 1), (1, 0), (3, 5))
    wide = draw.surrounding(*values.shape[:-1], before + values.shape[-1] + after, like=values)
    return wide[..., before : before + values.shape[-1]].copy_(values)


def _step(draw: Draw, values: Tensor) -> Tensor:
    return draw.surrounding(*values.shape, 2, like=values)[..., 0].copy_(values)


def _permuted(draw: Draw, values: Tensor) -> Tensor:
    order = list(range(values.ndim))
    draw.random.shuffle(order)
    back = [order.index(i) for i in range(values.ndim)]
    return values.permute(order).contiguous().clone().permute(back)


def _expanded(draw: Draw, values: Tensor) -> Tensor:
    if values.numel() == 0:
        return _contiguous(draw, values)
    axis = draw.random.randrange(values.ndim)
    return values.narrow(axis, 0, 1).clone().expand(values.shape)


def _channels_last(draw: Draw, values: Tensor) -> Tensor:
    start = draw.pick(0, 0, 3, 16)
    batch, channels, height, width = values.shape
    flat = draw.surrounding(start + values.numel(), like=values)
    return flat[start:].view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(values)


def _unaligned(draw: Draw, values: Tensor) -> Tensor:
    count, offset = values.numel(), draw.random.randrange(1, max(values.itemsize, 2))
    memory = bytearray((count + 1) * values.itemsize)
    x = torch.frombuffer(memory, dtype=values.dtype, count=count, offset=offset)
    channels_last = values.ndim == 4 and draw.chance(0.5)
    dense = values.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return x.as_strided(dense.shape, dense.stride()).copy_(dense)


_LAYOUTS = {
    "contiguous": _contiguous, "offset": _offset, "gap": _gap, "step": _step, "permuted": _permuted,
    "expanded": _expanded, "channels last": _channels_last, "unaligned": _unaligned,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Comparisons


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values; a NaN equals a NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(), b.nan_to_num()
    )  # fmt: skip


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """|actual - expected| <= tolerance + rounding to actual's dtype, elementwise; NaN where NaN is expected.

    An infinity passes for a value that may round to more than the dtype's largest.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, dtype = actual.detach().double(), actual.dtype
    expected = expected.detach()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN where there should be none, or the reverse"
    allowed = tolerance + EPS[dtype] * expected.abs() + TINY[dtype]
    overflows = actual.isinf() & (actual.sign() == expected.sign()) & (expected.abs() + allowed > LARGEST[dtype])
    wrong = ~((actual - expected).abs() <= allowed) & ~expected.isnan() & (actual != expected) & ~overflows
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        allowed = torch.as_tensor(allowed).expand(expected.shape)
        raise AssertionError(
            f"{name}{list(at)}: {actual[at]:.9g}, not {expected[at]:.9g} within {allowed[at]:.3g} "
            f"({int(wrong.sum())} of {wrong.numel()} are wrong)"
        )
