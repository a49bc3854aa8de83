"""Tokenises the pictures of a training set, by one process or several; a run that was killed goes on later.

Pictures are tokenised in blocks of `BLOCK`. Each finished block is a file in the folder `parts`, which gets its name
when all of it is written. A run that is started again makes the blocks that are missing. When none is, the first
process joins them, block by block, into the output. No process holds more than some batches and one block.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from titok.checkpoints.files import read_json, write_json
from titok.checkpoints.writing import atomic_path, lock, remove_abandoned
from titok.data.folders import Pictures, ReadablePictures, read_batches
from titok.data.npz import read_arrays
from titok.data.token_sets import INFO, JSONL, LABELS, NAMES, TOKENS
from titok.data.tokens import signature
from titok.processes import in_first_process, own_part, wait_for_all

if TYPE_CHECKING:
    from titok.models.tokenizer import TiTok

BLOCK = 512  # pictures
FINISHED, SETTINGS, LOCK = "finished", "settings.json", "lock"


def parts_folder(output: Path) -> Path:
    """The folder that holds what an unfinished run has made."""
    return output.with_name(f"{output.name}.parts") if output.suffix.lower() == JSONL else output / "parts"


@torch.no_grad()
def tokenize_set(
    tokenizer: TiTok,
    pictures: Pictures,
    output: str | os.PathLike[str],
    *,
    copies: int,
    made_of: Mapping[str, Any],
    batch_size: int = 64,
    skip_unreadable: bool = False,
    anew: bool = False,
    progress: Callable[[int], Any] | None = None,
    report: Callable[[str], Any] | None = None,
) -> int:
    """Writes the tokens of all pictures, with labels and names, for `titok.data.token_sets.open_tokens`.

    Every process of a group calls this with the same arguments. Each makes a share of the blocks. All return when the
    output is in place.

    Args:
        tokenizer: with a vector quantizer.
        pictures: whose transform makes copies (copies, C, H, W) of a picture.
        output: a folder, or a file .jsonl. A folder that holds finished tokens of the same settings stays as it is.
        copies: of each picture.
        made_of: what the tokens depend on beside the weights of the tokenizer, as JSON can hold it. A run goes on only
            with equal settings.
        batch_size: images that are encoded at a time; at least one picture with all its copies.
        skip_unreadable: True leaves pictures out that cannot be read.
        anew: True discards what an earlier run has made with other settings.
        progress: called with numbers of pictures that are done, by this process and about as many by each other one.
        report: called with what is wrong with each picture that is left out.

    Returns:
        the number of pictures in the output, in every process.

    Raises:
        TypeError, ValueError: the tokenizer is a VAE; pictures cannot be read; tokens of other settings are there; or
            another run is at work.
        ConnectionError: another process has ended.
    """
    if tokenizer.quantizer is None:
        raise ValueError("tokenizer: expected a vector-quantised one, got a VAE: generators are trained on codes")
    settings = json.loads(json.dumps({"copies": copies, "block": BLOCK, **made_of}))
    work = _Work(Path(output), settings, pictures, tokenizer)
    rank, world = own_part()
    with contextlib.closing(work):
        missing = in_first_process(lambda: work.claim(anew))
        if missing is not None:
            own = missing[rank::world]
            if progress is not None:
                progress(len(pictures) - sum(len(work.block(number)) for number in missing))
            encode = _Encoder(tokenizer, pictures, copies, batch_size, skip_unreadable, report)
            for number, (kept, tokens) in zip(
                own, encode.blocks([work.block(n) for n in own], progress), strict=True
            ):
                work.write(number, kept, tokens)
            wait_for_all()
            return in_first_process(work.join)
        return in_first_process(work.count)


class _Encoder:
    """Reads and encodes blocks of pictures."""

    def __init__(
        self,
        tokenizer: TiTok,
        pictures: Pictures,
        copies: int,
        batch_size: int,
        skip_unreadable: bool,
        report: Callable[[str], Any] | None,
    ) -> None:
        self.tokenizer, self.batch_size, self.report = tokenizer, max(1, batch_size // copies), report
        self.images = ReadablePictures(pictures, copies=copies) if skip_unreadable else pictures

    def blocks(
        self, blocks: Sequence[range], progress: Callable[[int], Any] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each block, the indices of its readable pictures (n,) int64, and their tokens (n, copies, K) int64."""
        batches = [list(torch.tensor(block, device="cpu").split(self.batch_size)) for block in blocks]
        stream = read_batches(self.images, [batch for block in batches for batch in block])
        problems = getattr(self.images, "problems", {})
        device = self.tokenizer.device
        for block in batches:
            kept, tokens = [], []
            for indices in block:
                images = next(stream)
                readable = torch.tensor([index not in problems for index in indices.tolist()], device="cpu")
                for index in indices[~readable].tolist():
                    if self.report is not None:
                        self.report(problems[index])
                images, indices = images[readable], indices[readable]
                if len(images):
                    codes = self.tokenizer.encode(images.flatten(0, 1).to(device)).cpu()
                    tokens.append(codes.unflatten(0, images.shape[:2]))
                kept.append(indices)
                if progress is not None:
                    progress(len(readable) * own_part()[1])
            length = self.tokenizer.config.num_latent_tokens
            empty = torch.zeros(0, images.shape[1], length, dtype=torch.int64, device="cpu")
            yield torch.cat(kept), torch.cat([empty, *tokens])


class _Work:
    """The output of a run and its folder of parts. The first process holds a lock on it."""

    def __init__(self, output: Path, settings: dict[str, Any], pictures: Pictures, tokenizer: TiTok) -> None:
        self.output, self.settings, self.pictures, self.tokenizer = output, settings, pictures, tokenizer
        self.folder, self.is_file = parts_folder(output), output.suffix.lower() == JSONL
        self.dtype = np.dtype(np.uint16 if tokenizer.config.codebook_size <= 1 << 16 else np.uint32)
        self._made: list[Path] = []
        self._lock: int | None = None

    def block(self, number: int) -> range:
        """The indices of the pictures of a block."""
        return range(number * BLOCK, min((number + 1) * BLOCK, len(self.pictures)))

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:08}.npz"

    def claim(self, anew: bool) -> list[int] | None:
        """Locks the folder and records the settings.

        Returns:
            the numbers of the blocks that are to be made, or None where the output is finished.
        """
        finished = self.output / INFO
        if not self.is_file and finished.is_file() and not (self.folder / SETTINGS).exists() and not anew:
            self._compare(finished, read_json(finished).get("settings"))
            if self.folder.exists():  # the run that finished it was killed while it removed its parts
                self._clear()
            return None
        self._made = [f for f in (self.folder, *self.folder.parents) if not f.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            (self.folder / LOCK).touch()
            self._lock = lock(self.folder / LOCK)
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"{self.folder}: another process is at work here") from None
        for folder in (self.folder, self.folder.parent):
            remove_abandoned(folder)
        if (self.folder / FINISHED).exists():
            self._clear()
            return None
        if (file := self.folder / SETTINGS).exists():
            before = read_json(file)
            if before != self.settings and anew:
                self._remove_parts()
            else:
                self._compare(file, before)
        if not self.is_file:
            finished.unlink(
                missing_ok=True
            )  # before the settings, whose presence tells that the work is unfinished
        write_json(file, self.settings)
        blocks = range(-(-len(self.pictures) // BLOCK))
        return [number for number in blocks if self._read(number) is None]

    def _compare(self, file: Path, before: Any) -> None:
        before = before if isinstance(before, dict) else {}
        differing = [name for name in {**self.settings, **before} if self.settings.get(name) != before.get(name)]
        if differing:
            raise ValueError(
                f"{file}: what is there was made with another value of {', '.join(map(repr, differing))!s:.300}: "
                "finish it with the same command, remove it, or choose another place"
            )

    def write(self, number: int, kept: Tensor, tokens: Tensor) -> None:
        """Writes a finished block."""
        with atomic_path(self._part(number), durable=True) as temporary, temporary.open("wb") as file:
            np.savez(file, kept=kept.numpy(), tokens=tokens.numpy().astype(self.dtype))

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The indices of the pictures of a block, and their tokens; None where it is missing or damaged."""
        try:
            arrays = read_arrays(self._part(number), ("kept", "tokens"))
            kept, tokens = arrays["kept"], arrays["tokens"]
        except (FileNotFoundError, ValueError, KeyError):
            return None
        shape = (len(kept), self.settings["copies"], self.tokenizer.config.num_latent_tokens)
        fits = kept.dtype == np.int64 and tokens.dtype == self.dtype and tokens.shape == shape
        return (kept, tokens) if fits else None

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(-(-len(self.pictures) // BLOCK)):
            block = self._read(number)
            if block is None:
                raise ValueError(f"{self._part(number)}: damaged since it was written: start the command again")
            yield block

    def join(self) -> int:
        """Writes the output, removes the parts, and returns the number of pictures."""
        kept = np.concatenate([indices for indices, _ in self._blocks()])
        if not len(kept):
            self._remove_parts()
            raise ValueError(f"{self.pictures.source.where}: none of its pictures is readable")
        labels = self.pictures.labels.numpy()[kept]
        if self.is_file:
            self._write_jsonl(labels)
        else:
            self._write_folder(kept, labels)
        (self.folder / FINISHED).touch()
        self._clear()
        return len(kept)

    def _write_jsonl(self, labels: np.ndarray) -> None:
        unused = iter(labels.tolist())
        with atomic_path(self.output, durable=True) as temporary, temporary.open("w") as file:
            for _, tokens in self._blocks():
                for copies in tokens.tolist():
                    label = next(unused)
                    for row in copies:
                        file.write(json.dumps({"class_id": label, "tokens": row}) + "\n")

    def _write_folder(self, kept: np.ndarray, labels: np.ndarray) -> None:
        length = self.tokenizer.config.num_latent_tokens
        shape = (len(kept), self.settings["copies"], length)
        with atomic_path(self.output / TOKENS, durable=True) as temporary, temporary.open("wb") as file:
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _, tokens in self._blocks():
                file.write(tokens.tobytes())
        content = io.BytesIO()
        np.save(content, labels)
        with atomic_path(self.output / LABELS, durable=True) as temporary:
            temporary.write_bytes(content.getvalue())
        names = self.pictures.names
        with atomic_path(self.output / NAMES, durable=True) as temporary, temporary.open("w") as file:
            file.writelines(json.dumps(names[index]) + "\n" for index in kept.tolist())
        write_json(
            self.output / INFO,
            {
                "pictures": len(kept),
                "codebook_size": self.tokenizer.config.codebook_size,
                "signature": signature(self.tokenizer).tolist(),
                "classes": self.pictures.classes,
                "settings": self.settings,
            },
        )

    def count(self) -> int:
        """The number of pictures in a finished output."""
        if self.is_file:
            with self.output.open("rb") as file:
                return sum(1 for _ in file) // self.settings["copies"]
        return int(np.load(self.output / LABELS, mmap_mode="r").shape[0])

    def _remove_parts(self) -> None:
        for part in self.folder.glob("*.npz"):
            part.unlink()

    def _clear(self) -> None:
        """Removes the parts of a finished run; the mark that it is finished goes last."""
        self._remove_parts()
        for name in (SETTINGS, LOCK, FINISHED):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's file is in the folder
            self.folder.rmdir()

    def close(self) -> None:
        """Releases the lock. Where no block was made, nothing stays."""
        if self._lock is None:
            return
        if self.folder.exists() and not any(self.folder.glob("*.npz")):
            self._clear()
            for folder in self._made[1:]:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()
        os.close(self._lock)
        self._lock = None
