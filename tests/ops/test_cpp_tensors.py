"""How `titok._C` reads a tensor: with the DLPack exchange API, or through attributes where torch has none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cpp_cases import UNREADABLE, image
from titok.ops.core.available import why_no_cpp

if reason := why_no_cpp():
    pytest.skip(reason, allow_module_level=True)

import titok._C as cpp


@pytest.mark.parametrize("through_attributes", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_reader_sees_memory_where_there_is_none(through_attributes: bool) -> None:
    unreadable = {kind: make(torch.randn(3, 4)) for kind, make in UNREADABLE.items()}
    unreadable["nested"] = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    unreadable["mkldnn"] = torch.randn(3, 4).to_mkldnn()
    for tensor in unreadable.values():
        with pytest.raises(ValueError, match=r"^tensor: expected "):
            cpp._describe_tensor(tensor, through_attributes)
    for other in (3, None, "text", Tensor):
        with pytest.raises(TypeError, match=r"^tensor: expected a torch\.Tensor, got "):
            cpp._describe_tensor(other, through_attributes)


@pytest.mark.parametrize("through_attributes", [False, True])
def test_batched_tensors_are_refused(through_attributes: bool) -> None:
    def look(x: Tensor) -> Tensor:
        with pytest.raises(ValueError, match=r"^tensor: expected "):
            cpp._describe_tensor(x, through_attributes)
        return x

    torch.vmap(look)(torch.zeros(2, 3))


class Loud(torch.Tensor):
    """Its Python code must not run: a kernel could not trust the answers."""

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called")

    @property
    def shape(self) -> Any:
        raise AssertionError("called")

    def data_ptr(self) -> Any:
        raise AssertionError("called")


READABLE: dict[str, Callable[[], Tensor]] = {
    **{
        str(dtype): lambda dtype=dtype: torch.zeros(2, 3, dtype=dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.complex128,
            torch.float8_e4m3fn,
            torch.uint16,
        )
    },
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.empty(0, 3),
    "gaps": lambda: torch.zeros(4, 6)[1::2, ::3],
    "transposed": lambda: torch.zeros(4, 6).T,
    "expanded": lambda: torch.zeros(1, 6).expand(5, 6),
    "many dimensions": lambda: torch.zeros((1,) * 20),
    "channels last": lambda: image(2, 3, 4, 5),
    "gradient wanted": lambda: torch.zeros(3, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
    "subclass": lambda: torch.zeros(3, 4).as_subclass(Loud),
}


@pytest.mark.parametrize("kind", READABLE)
def test_both_readers_agree(kind: str) -> None:
    """The DLPack exchange API, and attributes, for torch releases without it."""
    tensor = READABLE[kind]()
    assert cpp._describe_tensor(tensor, False) == cpp._describe_tensor(tensor, True)
    address, dtype, device, sizes, strides = cpp._describe_tensor(tensor, False)
    plain = tensor.as_subclass(torch.Tensor) if kind == "subclass" else tensor
    assert (address, device, sizes, strides) == (plain.data_ptr(), "cpu", tuple(plain.shape), plain.stride())
    named = str(plain.dtype).removeprefix("torch.")
    assert dtype == (named if named not in ("float8_e4m3fn", "uint16") else "another dtype")


def test_more_dimensions_than_are_held() -> None:
    for through_attributes in (False, True):
        with pytest.raises(ValueError, match=r"^tensor: expected at most 64 dimensions, got 65$"):
            cpp._describe_tensor(torch.zeros((1,) * 65), through_attributes)


@pytest.mark.slow
def test_a_torch_without_the_exchange_api() -> None:
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import titok._C
out = torch.zeros(2, dtype=torch.int64)
titok._C.nearest_codebook(torch.tensor([[3.0], [0.4]]), torch.tensor([[0.0], [1.0], [2.5]]), False, out)
print(out.tolist())
"""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has none")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[2, 0]\n"
    )
