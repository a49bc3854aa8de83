"""`titok._C` checks every argument itself before it writes anything, whatever Python code called it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cpp_cases import (
    ANY_ROWS,
    CASES,
    CHANNELS_LAST,
    EMPTY,
    OPTIONAL,
    STRIDED,
    TENSORS,
    UNREADABLE,
    decode_arguments,
    decode_params,
    listed,
    nothing,
    rows,
    tokens,
)
from titok.ops.core.available import why_no_cpp

if reason := why_no_cpp():
    pytest.skip(reason, allow_module_level=True)

import titok._C as cpp


def function(case: str) -> Callable[..., Any]:
    return getattr(cpp, case.split(":")[0])


def assert_rejected(
    case: str, arguments: dict[str, Any], kind: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    """The call raises and leaves every tensor as it was."""
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    with pytest.raises(kind, match=message):
        function(case)(*arguments.values())
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_right_arguments_are_taken(case: str) -> None:
    arguments = CASES[case]()
    assert function(case)(*arguments.values()) in (None, 0)
    assert list(inspect.signature(function(case)).parameters) == list(arguments)


@pytest.mark.parametrize("case", CASES)
def test_number_of_arguments(case: str) -> None:
    arguments = list(CASES[case]().values())
    for wrong in ([], arguments[:-1], [*arguments, None]):
        with pytest.raises(TypeError, match=rf"expected {len(arguments)} positional arguments, got {len(wrong)}"):
            function(case)(*wrong)


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_a_tensor_is_wanted(case: str, name: str) -> None:
    for wrong in (3, "text", [1.0], torch.zeros(2).numpy(), torch.float32, Tensor):
        assert_rejected(
            case, {**CASES[case](), name: wrong}, TypeError, rf"^{name}: expected a torch\.Tensor, got"
        )
    if not listed(OPTIONAL, case, name):  # a ValueError where None is wrong only beside the others
        assert_rejected(case, {**CASES[case](), name: None}, (TypeError, ValueError), r"^\w+: expected ")


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_dtype(case: str, name: str) -> None:
    arguments = CASES[case]()
    right = arguments[name]
    for dtype in (torch.float64, torch.int16, torch.complex64, torch.bool, torch.int64, torch.float32):
        if dtype == right.dtype:
            continue
        wrong = torch.zeros_like(right, dtype=dtype)
        got = str(dtype).removeprefix("torch.")
        assert_rejected(case, {**arguments, name: wrong}, TypeError, rf"^{name}: expected dtype .*, got {got}$")


# The dtype of each of these follows from another argument. As float32 a 16-bit tensor would be read past its end.
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("add_layer_norm", "bias"),
        ("add_layer_norm", "total"),
        ("add_layer_norm_backward", "grad_total"),
        ("add_layer_norm_backward", "grad"),
        ("add_layer_norm_backward", "partial"),
        ("group_norm_silu", "residual"),
        ("group_norm_silu", "bias"),
        ("group_norm_silu", "total"),
        ("group_norm_silu", "mean"),
        ("masked_attention", "out"),
        ("masked_attention", "lse"),
        ("masked_attention_backward", "grad"),
        ("masked_attention_backward", "dqkv"),
        ("maskgit_decode_step", "uncond"),
        ("maskgit_decode_step", "confidence"),
    ],
)
def test_dtypes_that_go_together(case: str, name: str) -> None:
    arguments = CASES[case]()
    arguments[name] = arguments[name].to(torch.bfloat16)
    assert_rejected(case, arguments, TypeError, f"^{name}: expected dtype float32, got bfloat16$")


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_shape(case: str, name: str) -> None:
    """A dimension more or less, and each dimension one too small and one too large. Of two tensors that do not fit
    together either may be named."""
    arguments = CASES[case]()
    right = arguments[name]
    shapes = [(*right.shape, 1), (1, *right.shape), right.shape[:-1]]
    for axis in range(1 if (case, name) in ANY_ROWS else 0, right.ndim):
        for size in (right.shape[axis] - 1, right.shape[axis] + 1):
            shapes.append((*right.shape[:axis], size, *right.shape[axis + 1 :]))
    for shape in shapes:
        wrong = torch.zeros(shape, dtype=right.dtype)
        if wrong.ndim == 4:
            wrong = wrong.to(memory_format=CHANNELS_LAST)
        assert_rejected(case, {**arguments, name: wrong}, ValueError, r"^\w+: expected ")


@pytest.mark.parametrize(("case", "name"), TENSORS)
def test_strides(case: str, name: str) -> None:
    """A gap between neighbours of the last dimension, and rows in another order."""
    arguments = CASES[case]()
    right = arguments[name]
    gap = torch.zeros(*right.shape, 2, dtype=right.dtype)[..., 0]
    assert_rejected(case, {**arguments, name: gap}, ValueError, f"^{name}: expected .*strides")
    if listed(STRIDED, case, name):
        return
    if right.ndim == 4:
        wrong = torch.zeros(right.shape, dtype=right.dtype)
    elif right.ndim > 1:
        wrong = torch.zeros(right.shape[::-1], dtype=right.dtype).permute(*reversed(range(right.ndim)))
    else:
        wrong = torch.zeros(1, dtype=right.dtype).expand(right.shape)
    assert_rejected(case, {**arguments, name: wrong}, ValueError, f"^{name}: expected .*strides")


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, name in TENSORS if listed(STRIDED, case, name)])
def test_rows_may_lie_apart(case: str, name: str) -> None:
    arguments = CASES[case]()
    function(case)(*arguments.values())
    expected = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor)}
    right = arguments[name]
    apart = torch.zeros(*right.shape[:-1], right.shape[-1] + 3, dtype=right.dtype)[..., : right.shape[-1]]
    function(case)(*{**arguments, name: apart.copy_(right)}.values())
    for n, value in expected.items():
        assert torch.equal(arguments[n], value), n


@pytest.mark.parametrize(("case", "name"), TENSORS)
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_elements_must_lie_in_memory(case: str, name: str, kind: str) -> None:
    arguments = CASES[case]()
    if kind == "negated view" and arguments[name].dtype == torch.bool:
        pytest.skip("a bool has no negative")
    arguments[name] = UNREADABLE[kind](arguments[name])
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        function(case)(*arguments.values())


@pytest.mark.parametrize(
    ("case", "name", "bad"),
    [
        ("add_layer_norm", "eps", []),
        ("group_norm_silu", "eps", []),
        ("group_norm_silu", "num_groups", [0, -3, 4, 12, 1 << 40, 1 << 80]),
        ("masked_attention", "num_heads", [0, -2, 3, 16, 1 << 40, 1 << 80]),
        ("masked_attention", "start", [-1, 3, 5, 6, 1 << 40, -(1 << 80)]),
        ("masked_attention", "scale", []),
        ("masked_attention_backward", "num_heads", [0, -2, 3, 16, 1 << 40, 1 << 80]),
        ("masked_attention_backward", "start", [-1, 3, 5, 6, 1 << 40, -(1 << 80)]),
        ("masked_attention_backward", "scale", []),
        ("maskgit_decode_step", "mask_token", [0, 4, 1 << 63, -(1 << 80)]),
        ("maskgit_decode_step", "threads", [0, -1, 1 << 31]),
    ],
)
def test_numbers(case: str, name: str, bad: list[int]) -> None:
    for value in bad:
        assert_rejected(case, {**CASES[case](), name: value}, ValueError, r"^\w+: expected .*, got ")
    wrong = ["text", None, [1]] if name in ("eps", "scale") else ["text", None, 1.5, torch.zeros(2)]
    for value in wrong:
        kind = "a number" if name in ("eps", "scale") else "an integer"
        assert_rejected(case, {**CASES[case](), name: value}, TypeError, f"^{name}: expected {kind}, got ")


class Resizing:
    """A number whose conversion takes the memory of a tensor that was read before."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __index__(self) -> int:
        self.tensor.untyped_storage().resize_(0)
        return 2

    def __float__(self) -> float:
        return float(self.__index__())


def test_numbers_run_no_python_code() -> None:
    arguments = CASES["masked_attention"]()
    for name, kind in (("num_heads", "an integer"), ("scale", "a number")):
        wrong = {**arguments, name: Resizing(arguments["qkv"])}
        assert_rejected("masked_attention", wrong, TypeError, f"^{name}: expected {kind}, got Resizing$")
    numpy = {**arguments, "num_heads": np.int32(2), "start": np.int64(1), "scale": np.float32(0.5)}
    assert cpp.masked_attention(*numpy.values()) is None


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("seed", [-1, 1 << 64]),
        ("first_sample", [-1, 1 << 64]),
        ("step", [-1, 1 << 32]),
        ("num_masked", [-1, 1 << 31]),
        ("draw_scale", [-1.0, math.nan, math.inf]),
    ],
)
def test_numbers_of_a_step(name: str, bad: list[Any]) -> None:
    for value in bad:
        arguments = decode_arguments(params=decode_params(**{name: value}))
        assert_rejected("maskgit_decode_step", arguments, ValueError, rf"^params\.{name}: expected .*, got ")
    arguments = decode_arguments(params=decode_params(**{name: "text"}))
    assert_rejected("maskgit_decode_step", arguments, TypeError, rf"^params\.{name}: expected an? \w+, got str")


def test_numbers_of_a_step_that_can_be_anything() -> None:
    """No logit, guidance or temperature leaves a row without a code."""
    odd = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e39)
    for name in ("guidance", "inverse_temperature", "noise"):
        for value in odd:
            for scale in (0.0, 1.0, 1e-45, 3e38):
                arguments = decode_arguments(params=decode_params(**{name: value, "draw_scale": scale}))
                arguments["cond"].view(-1)[: len(odd)] = torch.tensor(odd)
                assert cpp.maskgit_decode_step(*arguments.values()) == 0
                assert bool(((arguments["out"] >= 0) & (arguments["out"] <= 5)).all())


def test_containers_and_flags() -> None:
    for wrong in ([*decode_params()], 3, None):
        assert_rejected(
            "maskgit_decode_step", decode_arguments(params=wrong), TypeError, "^params: expected a tuple, got "
        )
    for short in ((), decode_params()[:-1], (*decode_params(), 1)):
        arguments = decode_arguments(params=short)
        assert_rejected(
            "maskgit_decode_step", arguments, ValueError, rf"^params: expected 8 items, got {len(short)}$"
        )
    for wrong in (1, None, "text"):
        assert_rejected(
            "maskgit_decode_step", decode_arguments(maskgit=wrong), TypeError, "^maskgit: expected a bool"
        )
        arguments = {**CASES["nearest_codebook"](), "normalize": wrong}
        assert_rejected("nearest_codebook", arguments, TypeError, "^normalize: expected a bool")


def test_packed_numbers_are_checked_too() -> None:
    numbers = torch.zeros(10, dtype=torch.int32)
    numbers.view(torch.float32)[9] = math.nan
    assert_rejected(
        "maskgit_decode_step", decode_arguments(packed=numbers), ValueError, "^packed: expected a finite number"
    )
    short = torch.zeros(9, dtype=torch.int32)
    assert_rejected("maskgit_decode_step", decode_arguments(packed=short), ValueError, "^packed: expected shape")


def test_values_out_of_range() -> None:
    """Returned as a number, so that the caller can say which value it was; nothing is written."""
    index = torch.arange(6).view(2, 3)
    by_rows = {"cond": rows(6, 5), "uncond": rows(6, 5), "rows": index, "uncond_rows": index}
    known = torch.tensor([[5, 5, 5], [5, 6, 5]])
    for expected, arguments in (
        (1, decode_arguments(tokens=known)),
        (1, decode_arguments(tokens=-known)),
        (2, decode_arguments(**{**by_rows, "rows": index + 1})),
        (2, decode_arguments(**{**by_rows, "cond": rows(0, 5)})),
        (3, decode_arguments(**{**by_rows, "uncond_rows": -index})),
        (4, decode_arguments(keep=torch.tensor([1, -1]))),
    ):
        before = arguments["out"].clone()
        assert cpp.maskgit_decode_step(*arguments.values()) == expected
        assert torch.equal(arguments["out"], before)
        assert not arguments["confidence"].any()


@pytest.mark.parametrize(
    ("case", "changes", "name"),
    [
        ("add_layer_norm", {"total": None}, "total"),
        ("add_layer_norm", {"residual": None}, "total"),
        ("group_norm_silu", {"total": None}, "total"),
        ("group_norm_silu", {"residual": None}, "total"),
        ("maskgit_decode_step:rows", {"uncond_rows": None}, "uncond_rows"),
        ("maskgit_decode_step:rows", {"rows": None}, "cond"),
        ("maskgit_decode_step", {"uncond_rows": torch.zeros(2, 3, dtype=torch.int64)}, "uncond_rows"),
    ],
)
def test_arguments_that_go_together(case: str, changes: dict[str, Any], name: str) -> None:
    assert_rejected(case, {**CASES[case](), **changes}, ValueError, f"^{name}: expected ")


@pytest.mark.parametrize(("name", "arguments"), EMPTY)
def test_nothing_to_do(name: str, arguments: list[Any]) -> None:
    assert getattr(cpp, name)(*arguments) in (None, 0)


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("nearest_codebook", [rows(2, 3), nothing(0, 3), False, nothing(2, dtype=torch.int64)], "codebook"),
        ("nearest_codebook", [nothing(2, 0), nothing(4, 0), False, nothing(2, dtype=torch.int64)], "codebook"),
        ("masked_attention", [nothing(2, 3, 0), None, 1, 0, 1.0, nothing(2, 3, 0), None], "qkv"),
        ("maskgit_decode_step", list(decode_arguments(cond=nothing(2, 3, 0), uncond=None).values()), "cond"),
    ],
)
def test_nothing_to_choose_from(name: str, arguments: list[Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected "):
        getattr(cpp, name)(*arguments)


def test_no_query_gives_no_gradient() -> None:
    dqkv = torch.ones(2, 5, 12)
    empty = nothing(2, 0, 4)
    cpp.masked_attention_backward(empty, rows(2, 5, 12), None, empty, nothing(2, 2, 0), 2, 3, 1.0, dqkv)
    assert not dqkv.any()


def test_more_threads_than_processors() -> None:
    length, codes = 64, 4096
    results = []
    for threads in (1, 1 << 30):
        torch.manual_seed(0)
        arguments = decode_arguments(
            tokens=tokens(1, length, codes),
            cond=rows(1, length, codes),
            uncond=None,
            keep=None,
            mask_token=codes,
            out=tokens(1, length, codes),
            confidence=torch.zeros(1, length),
            threads=threads,
        )
        assert cpp.maskgit_decode_step(*arguments.values()) == 0
        results.append(arguments["out"])
    assert torch.equal(*results)


def test_sizes_beyond_what_the_kernels_count() -> None:
    """Expanded tensors claim any size without having memory."""
    wide = torch.zeros(1, 1, 12).expand(1, 1 << 40, 12)
    with pytest.raises(ValueError, match=r"^qkv: expected at most"):
        cpp.masked_attention(wide, None, 2, 0, 1.0, torch.zeros(1, 1, 4), None)
    many = torch.zeros(1, 3).expand(1 << 31, 3)
    with pytest.raises(ValueError, match=r"^codebook: expected"):
        cpp.nearest_codebook(rows(2, 3), many, False, nothing(2, dtype=torch.int64))
    codes = torch.zeros(1, 1, 262_145)
    one = tokens(1, 1, 1 << 20)
    arguments = decode_arguments(
        tokens=one, cond=codes, uncond=None, keep=None, mask_token=1 << 20, out=one, confidence=torch.zeros(1, 1)
    )
    with pytest.raises(ValueError, match=r"^cond: expected 1 to 262144 codes"):
        cpp.maskgit_decode_step(*arguments.values())
    long = torch.zeros(1, 4097, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^tokens: expected at most 4096"):
        cpp.maskgit_decode_step(*decode_arguments(tokens=long).values())


def test_chunks_of_rows() -> None:
    counts = [cpp.add_layer_norm_chunks(n) for n in (0, 1, 16, 17, 1024, 1025, 4096, 1 << 40)]
    assert counts == [0, 1, 1, 2, 64, 61, 64, 64]
    for wrong, kind in ((-1, ValueError), (1 << 63, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match=r"^rows: expected an integer"):
            cpp.add_layer_norm_chunks(wrong)


@pytest.mark.skipif(not cpp.with_cuda, reason="titok._C was built without nvcc")
def test_cuda_function_refuses_tensors_of_the_cpu() -> None:
    arguments = list(decode_arguments().values())[:-1]
    workspace = [None, torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 0]
    with pytest.raises(ValueError, match=r"^tokens: expected device cuda:0, got cpu$"):
        cpp.maskgit_decode_step_cuda(*arguments, *workspace)
