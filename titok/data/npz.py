"""Reading .npz files that may be damaged or made to harm."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from titok.checkpoints.files import first_line

# A compressed entry may become a thousand times as large in memory. Larger ones than `SMALL_BYTES` may become this many
# times as large, which is more than tokens and pictures reach.
MAX_COMPRESSION = 100
SMALL_BYTES = 1 << 20


def read_arrays(path: str | os.PathLike[str], names: Collection[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz file holds, in the byte order of this machine.

    It takes memory for these arrays alone, whatever sizes the file claims.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or is damaged, or an array holds Python objects.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            return {
                name: _read(archive, entries[f"{name}.npy"], size) for name in names if f"{name}.npy" in entries
            }
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, its decompressors and NumPy each raise their own kinds
        raise ValueError(f"{path}: not a readable .npz file ({first_line(error)})") from error


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, archive_size: int) -> np.ndarray:
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("expected entries that are stored or deflated, got another or encrypted one")
    largest = max(SMALL_BYTES, MAX_COMPRESSION * entry.compress_size)
    if entry.compress_size > archive_size or entry.file_size > largest:
        raise ValueError(f"expected an entry of at most {largest} bytes, got {entry.file_size}")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"expected an array of version 1 or 2, got {version}")
        read_header = (
            np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        if dtype.hasobject or dtype.itemsize == 0:
            raise ValueError(f"expected numbers or text, got {dtype!s:.60}")
        expected = file.tell() + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or expected != entry.file_size:
            raise ValueError(
                f"expected {expected} bytes for an array of shape {shape!s:.100}, got {entry.file_size}"
            )
    with archive.open(entry) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading to the end also compares the checksum of the entry
            raise ValueError("expected nothing after the array")
    return array.astype(dtype.newbyteorder("="), copy=False)
