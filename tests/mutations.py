"""Seeded damage of files, and what a reader may do with a damaged file."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

COUNT = int(os.environ.get("TITOK_MUTATIONS", "200"))
MEMORY_BYTES = 256 << 20  # that reading one damaged file may take
VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**6, 10**8, 10**30, 0.5, 1e400, float("nan"), "", "text", "\n", [], {}, [[]], [0],
    {"a": None}, "x" * 10_000, [1] * 1000,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within JSON, as a container and a key."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def mutate_json(rng: random.Random, text: str) -> str:
    value = json.loads(text)
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(places(value))
        if rng.random() < 0.2:
            del container[key]
        elif isinstance(container, dict) and rng.random() < 0.2:
            container[rng.choice(["extra", "", "format", "a\nb"])] = copy.deepcopy(rng.choice(VALUES))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            return bytes(changed[: rng.randrange(len(changed))])
        case 1:
            start = rng.randrange(len(changed))
            del changed[start : start + rng.randint(1, 64)]
        case 2:  # near the beginning, where the headers are
            for _ in range(rng.randint(1, 8)):
                changed[rng.randrange(min(len(changed), 600))] = rng.randrange(256)
        case 3:
            for _ in range(rng.randint(1, 32)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


SHAPES: list[Any] = [
    (),
    (0,),
    (3,),
    (-1, 3),
    (10**12, 3),
    (0, 10**18),
    (10**30,),
    (2, 2, 2),
    (4, 3, 1),
    "text",
    (2.5, 3),
]
DTYPES = [
    "|O",
    "<U0",
    "|V0",
    "<U8",
    "<i8",
    ">i4",
    "<f8",
    "<c16",
    "|b1",
    "|S3",
    "<M8[s]",
    "<f16",
    "[('a', '<i4')]",
    "x",
]
ARRAYS: list[Any] = [
    np.zeros(0), np.array(5), np.zeros((3, 3)), np.full((4, 3), 10**6), np.full((4, 3), -1), np.array(["a", "b"]),
    np.array(["\n", "..", "", "a/b", "/etc"] * 2), np.zeros((2, 3), np.uint16), np.array([object()], dtype=object),
    np.full((4, 3, 4), np.nan, np.float32), np.array([b"a", b"b"]), np.zeros((2, 3), np.complex64),
]  # fmt: skip


def npy(array: Any, rng: random.Random | None = None) -> bytes:
    """An array as a .npy file; with `rng`, its header tells another shape, dtype or order."""
    buffer = io.BytesIO()
    if rng is None:
        np.lib.format.write_array(buffer, array)
        return buffer.getvalue()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    key = rng.choice(list(header))
    header[key] = rng.choice({"descr": DTYPES, "fortran_order": [True, 3, None], "shape": SHAPES}[key])
    text = (
        repr(header).encode()
        if rng.random() < 0.9
        else rng.choice([b"(" * 9000, b"{", b"\xff", b"[" * 90 + b"]" * 90])
    )
    version = rng.choice([b"\x01\x00"] * 8 + [b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    length = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + text + array.tobytes()


def mutate_npz(rng: random.Random, data: bytes) -> bytes:
    """An archive with other entries: other arrays, headers that lie, other compressions, sizes that are not true."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    chosen = rng.choice(list(arrays))
    entries = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    buffer = io.BytesIO()
    method = rng.choice([*([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED] * 4), zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    match rng.randrange(6):
        case 0:
            entries[f"{chosen}.npy"] = npy(arrays[chosen], rng)
        case 1:
            entries[f"{chosen}.npy"] = npy(rng.choice(ARRAYS)) if rng.random() < 0.9 else rng.randbytes(100)
        case 2:
            del entries[f"{chosen}.npy"]
        case 3:  # 64 MiB in 64 kB, with the header of an array that is as large
            zeros = np.zeros(rng.choice([1 << 20, 1 << 26]), np.uint8)
            method = zipfile.ZIP_DEFLATED
            entries[f"{chosen}.npy"] = npy(zeros)
        case 4:
            entries[f"{chosen}.npy"] += rng.randbytes(rng.randint(1, 50))
        case 5:
            entries[f"../{chosen}.npy"] = entries.pop(f"{chosen}.npy")
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    changed = bytearray(buffer.getvalue())
    if rng.random() < 0.3:  # sizes, checksum, flags and compression in the list of entries at the end
        start = changed.rfind(b"PK\x01\x02")
        for _ in range(rng.randint(1, 3)):
            changed[start + rng.randrange(8, 30)] = rng.randrange(256)
    return bytes(changed)


@contextlib.contextmanager
def one_clear_line_or_success(seed: int, folder: Path, *, seconds: float = 10.0) -> Iterator[None]:
    """Lets the block succeed or raise what commands report in one line that names a file of `folder`.

    It may take `seconds` of CPU time, far more than it takes on an idle machine, and `MEMORY_BYTES` of memory.
    """
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the memory back
    before, began = peak(), time.process_time()
    failure: Exception | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights that are not finite
            yield
    except AssertionError:
        raise
    except Exception as error:
        failure = error
    if failure is not None:
        message = str(failure)
        if type(failure) not in (ValueError, FileNotFoundError):
            raise AssertionError(f"seed {seed}: {type(failure).__name__}: {message}") from failure
        assert "\n" not in message, f"seed {seed}: {message}"
        assert str(folder) in message, f"seed {seed}: {message}"
        assert "weights_only" not in message, f"seed {seed}: {message}"
        assert len(message) < 4000, f"seed {seed}: {message}"
    took = time.process_time() - began
    assert took < seconds, f"seed {seed} took {took:.1f} s"
    assert peak() - before < MEMORY_BYTES, f"seed {seed} took {(peak() - before) >> 20} MiB"


def peak() -> int:
    """The largest memory of the process in bytes."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
