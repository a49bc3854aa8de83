"""Sets of tokens for the training of generators: a folder with a memory-mapped array, or a file of the official kind.

A folder holds `tokens.npy` (n, copies, K), uint16, or uint32 where the codebook has more than 65,536 codes;
`labels.npy` (n,) int64; `names.jsonl`, a JSON text on each line; and `info.json`, which is written last, with the
classes, the signature of the tokenizer and what the tokens were made of. `titok.data.tokenizing` writes it.

The official kind of file is .jsonl, with {"class_id": label, "tokens": [...]} on each line.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titok.checkpoints.files import first_line, read_json
from titok.data.sources import order_classes
from titok.data.tokens import same_signature, signature

if TYPE_CHECKING:
    from titok.models.tokenizer import TiTok

TOKENS, LABELS, NAMES, INFO = "tokens.npy", "labels.npy", "names.jsonl", "info.json"
JSONL = ".jsonl"
LINES_AT_A_TIME = 65_536
DTYPES = (np.uint16, np.uint32)


class TokenSample(NamedTuple):
    """One row of a set."""

    tokens: Tensor  # (copies, K)
    label: int
    name: str


class TokenSet:
    """Tokens of pictures, with labels and names, by index.

    Attributes:
        path: of the folder or file.
        tokens: (n, copies, K), uint16 or uint32. Those of a folder are mapped from the file: only what is read of them
            is in memory.
        labels: (n,) int64.
        classes: the names of the classes, by label.
        info: what info.json says; empty for a .jsonl file.
    """

    path: Path
    tokens: Tensor
    labels: Tensor
    classes: list[str]
    info: dict[str, Any]

    def __init__(
        self, path: Path, tokens: Tensor, labels: Tensor, classes: list[str], info: dict[str, Any]
    ) -> None:
        self.path, self.tokens, self.labels, self.classes, self.info = path, tokens, labels, classes, info

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of the pictures; in a .jsonl file, their numbers."""
        if not self.info:
            return [f"{number:06}" for number in range(len(self))]
        try:
            with (self.path / NAMES).open(encoding="utf-8") as file:
                names = [json.loads(line) for line in file]
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.path / NAMES}: not a readable list of names ({first_line(error)})") from error
        if len(names) != len(self) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.path / NAMES}: expected {len(self)} names, got {len(names)}")
        return names

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> TokenSample:
        return TokenSample(self.tokens[index], int(self.labels[index]), self.names[index])

    def check(self, tokenizer: TiTok) -> bool:
        """Checks that `tokenizer` may have made these tokens. Returns False where the set does not tell who made them.

        Raises:
            ValueError: another tokenizer made them, or they do not fit this one.
        """
        config = tokenizer.config
        if config.bottleneck == "vae" or self.tokens.shape[-1] != config.num_latent_tokens:
            kind = "latents" if config.bottleneck == "vae" else f"{config.num_latent_tokens} tokens a picture"
            raise ValueError(f"{self.path}: expected {kind}, got {self.tokens.shape[-1]} tokens a picture")
        if not self.info:
            return False
        if not same_signature(torch.tensor(self.info["signature"], device="cpu"), signature(tokenizer)):
            raise ValueError(f"{self.path}: made by a tokenizer with other weights than the one given")
        return True

    def rows(self) -> tuple[Tensor, list[str]]:
        """All copies as rows (n * copies, K) int64 in memory, with a name for each: "cats/a-3.png" for the fourth."""
        copies, names = self.tokens.shape[1], self.names
        if copies > 1:
            paths = [PurePosixPath(name) for name in names]
            names = [str(path.with_stem(f"{path.stem}-{copy}")) for path in paths for copy in range(copies)]
        return self.tokens.flatten(0, 1).long(), names


def is_token_set(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a set of tokens, and not pictures."""
    path = Path(path)
    return path.suffix.lower() == JSONL or ((path / INFO).is_file() and (path / TOKENS).exists())


def open_tokens(path: str | os.PathLike[str]) -> TokenSet:
    """Opens a folder or a .jsonl file of tokens.

    A .jsonl file is read into memory, at 2 or 4 bytes a token. Each of its lines is a row with one copy.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of this kind. The message names it.
    """
    path = Path(path)
    return _read_jsonl(path) if path.suffix.lower() == JSONL else _open_folder(path)


def _open_folder(path: Path) -> TokenSet:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    info = read_json(path / INFO)
    classes, written = info.get("classes"), info.get("signature")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path / INFO}: classes: expected a list of names")
    if not isinstance(written, list) or not all(isinstance(value, (int, float)) for value in written):
        raise ValueError(f"{path / INFO}: signature: expected a list of numbers")
    tokens = _map(path / TOKENS, DTYPES, 3)
    labels = np.array(_map(path / LABELS, (np.int64,), 1))
    if not 0 < len(labels) == len(tokens):
        raise ValueError(f"{path}: expected a label for each of {len(tokens)} rows, got {len(labels)}")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{path / LABELS}: expected labels in [0, {len(classes)})")
    return TokenSet(path, torch.from_numpy(tokens), torch.from_numpy(labels), classes, info)


def _map(path: Path, dtypes: tuple[Any, ...], dimensions: int) -> np.ndarray:
    """The array in an .npy file, mapped. Writing to it changes the memory, and not the file."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds on damaged files
        raise ValueError(f"{path}: not a readable .npy file ({first_line(error)})") from error
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes or array.ndim != dimensions:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{path}: expected {dimensions} dimensions of {expected}, got another array")
    return array.view(np.ndarray)


def _read_jsonl(path: Path) -> TokenSet:
    labels: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    length = -1
    for numbers in _lines_of(path):
        table = np.array(numbers, dtype=np.int64) if len({len(row) for row in numbers}) == 1 else None
        if table is None or table.shape[1] < 2 or length not in (-1, table.shape[1]):
            raise ValueError(f"{path}: expected the same number of tokens on each line, at least one")
        if table.min() < 0 or table[:, 1:].max() >= 1 << 32:
            raise ValueError(f"{path}: expected labels and tokens in [0, 2^32)")
        length = table.shape[1]
        labels.append(table[:, 0].copy())
        rows.append(table[:, 1:].astype(np.uint16 if table[:, 1:].max() < 1 << 16 else np.uint32))
    if not rows:
        raise ValueError(f"{path}: expected at least one line")
    dtype = max((part.dtype for part in rows), key=lambda dtype: dtype.itemsize)
    tokens = np.concatenate([part.astype(dtype, copy=False) for part in rows])[:, None]
    label = np.concatenate(labels)
    if label.max() >= 1 << 20:
        raise ValueError(f"{path}: expected classes in [0, 2^20), got {label.max()}")
    classes = order_classes(map(str, range(int(label.max()) + 1)), "natural")
    return TokenSet(path, torch.from_numpy(tokens), torch.from_numpy(label), classes, {})


def _lines_of(path: Path) -> Iterator[list[list[int]]]:
    """Label and tokens of `LINES_AT_A_TIME` lines at a time."""
    numbers: list[list[int]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for count, line in enumerate(file, start=1):
                try:
                    entry = json.loads(line)
                    row = [entry["class_id"], *entry["tokens"]]
                    if not all(type(number) is int and number.bit_length() < 63 for number in row):
                        raise ValueError
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(
                        f'{path}: line {count}: expected {{"class_id": a number, "tokens": [numbers]}}, '
                        f"got {line.strip()!r:.60}"
                    ) from error
                numbers.append(row)
                if len(numbers) == LINES_AT_A_TIME:
                    yield numbers
                    numbers = []
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a readable .jsonl file ({first_line(error)})") from error
    if numbers:
        yield numbers
