"""Golden data of the official TiTok code: arrays, tolerances, and the recipe for the made-up weights.

tests/data/golden/README.md describes where the data comes from. This file imports nothing of titok.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent / "data" / "golden"
# Standard deviations of embeddings, by a part of the name.
_TABLES = (
    ("positional_embedding", 1.0),
    ("position_embeddings", 1.0),
    ("pos_embed", 1.0),
    ("embedding", 0.5),
    ("latent_tokens", 0.5),
    ("mask_token", 0.5),
)
# Factors on 1/sqrt(fan in), the standard deviation of other weights, by the end of the name.
_GAINS = (
    ("in_proj_weight", 2.0),
    ("qkv.weight", 2.0),
    ("query.weight", 2.0),
    ("key.weight", 2.0),
    ("patch_embed.weight", 4.0),
    ("ffn.2.weight", 4.0),
)


def recipe_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up values of one tensor, from a random generator that is seeded with its official name."""
    f, rng = np.float32, np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    w = rng.standard_normal(tuple(shape), dtype=f)
    if name.endswith("bias"):
        return w * f(0.02)
    if len(shape) == 1:
        return f(1) + f(0.02) * w
    for part, gain in _TABLES:
        if part in name:
            return w * f(gain)
    gain = next((g for end, g in _GAINS if name.endswith(end)), 1.0)
    return w * f(gain / math.sqrt(math.prod(shape[1:])))


@functools.cache
def index() -> dict[str, Any]:
    """The description of every case, by its name."""
    return json.loads((ROOT / "cases" / "index.json").read_text())["cases"]


def manifest(name: str) -> dict[str, Any]:
    """The contents of one file of tests/data/golden/manifest."""
    return json.loads((ROOT / "manifest" / f"{name}.json").read_text())


@functools.lru_cache(maxsize=2)
def recipe_state(case: str) -> dict[str, torch.Tensor]:
    """The state dict of a case under its official names, with values that match the crc32 of the manifest.

    Tensors that kept the values of their construction, such as blur kernels, are left out.
    """
    state = {}
    for name, entry in manifest(f"cases/{case}").items():
        if entry.get("as_constructed"):
            continue
        value = recipe_weight(name, tuple(entry["shape"]))
        crc = format(zlib.crc32(np.ascontiguousarray(value).tobytes()), "08x")
        assert crc == entry["crc32"], f"the recipe gives other values for {name}"
        state[name] = torch.from_numpy(value)
    return state


class Case:
    """One golden case: `case["out.z"]` is a tensor, `case.tolerance("out.z")` its allowed error in float32."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = index()[name]
        self._arrays = np.load(ROOT / "cases" / self.entry["file"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name])

    def tolerance(self, name: str) -> float:
        """Five times the largest difference between the official code's float32 and float64 results."""
        return 5 * self.entry["arrays"][name]["f32_vs_f64_max_abs_diff"]

    def assert_float32(self, name: str, got: torch.Tensor) -> None:
        """Fails unless a float32 result has the shape of the array `name` and is within its tolerance."""
        want = self[name]
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= self.tolerance(name), name

    def assert_float64(self, name: str, got: torch.Tensor) -> None:
        """Fails unless a float64 result is within 1e-10 of the largest value of the array `name`.

        Long arrays are kept for the first batch row only, so only that row is compared.
        """
        want = self[name]
        got = got[: want.shape[0]] if want.ndim else got
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-10 * float(want.abs().max()), name
