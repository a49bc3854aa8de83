"""Golden data of the official TiTok code: arrays, tolerances, and the recipe for its made-up weights.

tests/data/golden/README.md tells where it comes from. Nothing here imports titok.
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
_TABLES = (
    ("positional_embedding", 1.0),
    ("position_embeddings", 1.0),
    ("pos_embed", 1.0),
    ("embedding", 0.5),
    ("latent_tokens", 0.5),
    ("mask_token", 0.5),
)
_GAINS = (
    ("in_proj_weight", 2.0),
    ("qkv.weight", 2.0),
    ("query.weight", 2.0),
    ("key.weight", 2.0),
    ("patch_embed.weight", 4.0),
    ("ffn.2.weight", 4.0),
)


def recipe_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up values of one tensor, drawn from a generator that its official name seeds."""
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
    return json.loads((ROOT / "cases" / "index.json").read_text())["cases"]


def manifest(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "manifest" / f"{name}.json").read_text())


@functools.lru_cache(maxsize=2)
def recipe_state(case: str) -> dict[str, torch.Tensor]:
    """The official state dict of a case: official names, values checked by the manifest's crc32."""
    state = {}
    for name, entry in manifest(f"cases/{case}").items():
        value = recipe_weight(name, tuple(entry["shape"]))
        crc = format(zlib.crc32(np.ascontiguousarray(value).tobytes()), "08x")
        assert crc == entry["crc32"], f"the recipe gives other values for {name}"
        state[name] = torch.from_numpy(value)
    return state


class Case:
    """One golden case: `case["out.z"]` is a tensor, `case.tolerance("out.z")` what float32 may differ by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = index()[name]
        self._arrays = np.load(ROOT / "cases" / self.entry["file"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[name])

    def tolerance(self, name: str) -> float:
        """Five times the official code's own difference between float32 and float64."""
        return 5 * self.entry["arrays"][name]["f32_vs_f64_max_abs_diff"]

    def assert_float32(self, name: str, got: torch.Tensor) -> None:
        want = self[name]
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= self.tolerance(name), name

    def assert_float64(self, name: str, got: torch.Tensor) -> None:
        """1e-10 of the largest value; long arrays were kept for the first batch row only."""
        want = self[name]
        got = got[: want.shape[0]] if want.ndim else got
        assert got.dtype == torch.float64
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-10 * float(want.abs().max()), name
