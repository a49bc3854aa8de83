"""The kinds of values that ops take: their names in a schema, and the check that a value is of its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# How the schema of an op writes the types of its arguments.
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | torch.SymInt: "SymInt",
    float: "float",
    str: "str",
    torch.dtype | None: "ScalarType?",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return isinstance(value, float | torch.SymFloat) or _is_int(value)


# For each of these types: whether a value is of it, and how a message names it.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "Tensor": (lambda value: isinstance(value, Tensor), "a torch.Tensor"),
    "Tensor?": (lambda value: value is None or isinstance(value, Tensor), "a torch.Tensor or None"),
    "bool": (lambda value: isinstance(value, bool), "a bool"),
    "int": (_is_int, "an int"),
    "SymInt": (_is_int, "an int"),
    "float": (_is_float, "a float"),
    "str": (lambda value: isinstance(value, str), "a str"),
    "str?": (lambda value: value is None or isinstance(value, str), "a str or None"),
    "ScalarType?": (lambda value: value is None or isinstance(value, torch.dtype), "a torch.dtype or None"),
}


def is_of_kind(kind: str, value: Any) -> bool:
    """Whether a value is of a type of a schema. An int is a float too; a bool is no number."""
    return _KINDS[kind][0](value)


def check_kind(name: str, kind: str, value: Any) -> None:
    """Raises `TypeError` unless the value is of this type of a schema."""
    if not is_of_kind(kind, value):
        raise TypeError(f"{name}: expected {_KINDS[kind][1]}, got {type(value).__name__}")
