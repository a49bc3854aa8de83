"""TiTok: images as short 1D token sequences, and MaskGIT to generate them.

The public names are imported when they are first used. `import titok` therefore loads neither PyTorch nor any
optional package, and `titok --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, ViTConfig, VQGANConfig
    from titok.generation.pipeline import Pipeline
    from titok.generation.sampling import sample_steps, sample_tokens
    from titok.models.generator import MaskGIT
    from titok.models.tokenizer import TiTok
    from titok.models.vqgan import MaskGITVQGAN

__version__ = "0.1.0"  # the only place: pyproject.toml reads it from here

_HOME = {
    "GeneratorConfig": "titok.config",
    "MaskGIT": "titok.models.generator",
    "MaskGITVQGAN": "titok.models.vqgan",
    "Pipeline": "titok.generation.pipeline",
    "SamplingConfig": "titok.config",
    "TiTok": "titok.models.tokenizer",
    "TokenizerConfig": "titok.config",
    "VQGANConfig": "titok.config",
    "ViTConfig": "titok.config",
    "sample_steps": "titok.generation.sampling",
    "sample_tokens": "titok.generation.sampling",
}

__all__ = [
    "GeneratorConfig",
    "MaskGIT",
    "MaskGITVQGAN",
    "Pipeline",
    "SamplingConfig",
    "TiTok",
    "TokenizerConfig",
    "VQGANConfig",
    "ViTConfig",
    "sample_steps",
    "sample_tokens",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'titok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
