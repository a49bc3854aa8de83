"""Data on disk: pictures, folders of pictures, tokens. Also the digits of the quickstart, and augmentation.

`ImageFolder` is imported when it is first used: importing this package does not load PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titok.data.folders import ImageFolder

__all__ = ["ImageFolder"]


def __getattr__(name: str) -> Any:
    if name == "ImageFolder":
        from titok.data.folders import ImageFolder

        return ImageFolder
    raise AttributeError(f"module 'titok.data' has no attribute {name!r}")
