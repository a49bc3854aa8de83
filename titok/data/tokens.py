"""Tokens on disk: one .npz or .safetensors file for many images, with a signature of the tokenizer that made it.

Both kinds of file hold the same arrays: `tokens` (N, K) int32, or `latents` (N, K, C) float32 of a VAE;
`signature`, eight weights of the tokenizer; and N names. The names are an array of an .npz file, and JSON under
"names" in the metadata of a .safetensors file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from titok.checkpoints.files import first_line, write_safetensors
from titok.checkpoints.writing import atomic_path
from titok.checks import check_latents, check_tokens
from titok.data.npz import read_arrays

if TYPE_CHECKING:
    from titok.models.tokenizer import TiTok

SUFFIXES = (".npz", ".safetensors")
ARRAYS = ("tokens", "latents", "signature")


class TokenFile(NamedTuple):
    """The contents of a file of tokens."""

    tokens: Tensor  # (N, K) int64, or latents (N, K, C) float32 of a VAE; on the CPU
    names: list[str]  # one for each row
    signed: bool  # True if the file has the signature of the tokenizer that reads it, False if it has none


def write_tokens(path: str | os.PathLike[str], tokens: Tensor, names: Sequence[str], tokenizer: TiTok) -> None:
    """Writes tokens and names of pictures. An existing file is replaced once the new one is complete.

    Args:
        path: ends in .npz or .safetensors, in any case.
        tokens: what `tokenizer.encode` returned: (N, K) of any integer dtype, or latents (N, K, C) of a VAE.
        names: N names of pictures.

    Raises:
        TypeError, ValueError: another suffix, tokens that do not fit the tokenizer, or another number of names.
        OSError: the file cannot be written, for example because the disk is full. The message names it.
    """
    path = _check_suffix(path)
    tokens = _integers_as_int64(tokens)
    _check_contents(tokens, names, tokenizer)
    values = {_key(tokenizer): tokens.float() if tokens.is_floating_point() else tokens.to(torch.int32)}
    values["signature"] = signature(tokenizer)
    try:
        if path.suffix.lower() == ".safetensors":
            write_safetensors(path, values, {"names": json.dumps(list(names))})
        else:
            arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in values.items()}
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, names=np.array(names, dtype=np.str_), **arrays)
    except (OSError, safetensors.SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise OSError(f"{path}: cannot be written ({reason})") from error


def read_tokens(path: str | os.PathLike[str], tokenizer: TiTok) -> TokenFile:
    """Reads a file that `write_tokens` wrote, or one that holds only `tokens` (or `latents`) of any integer dtype.

    Where the file has no names, they are 000000, 000001 and so on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, another tokenizer made it, or its tokens do not fit this tokenizer. The
            message names the file.
    """
    path = _check_suffix(path)
    arrays, names = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_npz(path)
    key = _key(tokenizer)
    if key not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path}: expected an array {key!r}, as this tokenizer makes, got {found}")
    tokens = _integers_as_int64(arrays[key])
    try:
        _check_contents(tokens, names or [""] * len(tokens), tokenizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    written = arrays.get("signature")
    if written is not None and not same_signature(written, signature(tokenizer)):
        raise ValueError(f"{path}: made by a tokenizer with other weights than the one given")
    return TokenFile(tokens, names or [f"{i:06}" for i in range(len(tokens))], signed=written is not None)


def signature(tokenizer: TiTok) -> Tensor:
    """Eight weights that tell tokenizers apart, (8,) float32 on the CPU.

    They are taken from the codebook, which does not change when only the decoder is trained further. A VAE has no
    codebook, so they are taken from the first layer of its decoder.
    """
    weight = tokenizer.decoder.embed.weight if tokenizer.quantizer is None else tokenizer.quantizer.codebook
    flat = weight.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, 8).long().to(flat.device)].float().cpu()


def same_signature(written: Tensor, expected: Tensor) -> bool:
    """True for the same weights, also when one of the two models was loaded in bfloat16."""
    return written.shape == expected.shape and torch.allclose(written.float(), expected, rtol=0.02, atol=1e-6)


def _key(tokenizer: TiTok) -> str:
    """The name of the array that holds what the tokenizer encodes to."""
    return "latents" if tokenizer.config.bottleneck == "vae" else "tokens"


def _check_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return path


def _integers_as_int64(tokens: Tensor) -> Tensor:
    """A tensor of an integer dtype as int64; any other as it is."""
    other = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    return tokens if other else tokens.to(torch.int64)


def _check_contents(tokens: Tensor, names: Sequence[str], tokenizer: TiTok) -> None:
    config = tokenizer.config
    if config.bottleneck == "vae":
        check_latents(tokens, config.num_latent_tokens, config.code_dim)
    else:
        check_tokens(tokens, config.num_latent_tokens, config.codebook_size)
    if len(names) != len(tokens):
        raise ValueError(f"names: expected {len(tokens)}, one for each row of tokens, got {len(names)}")


def _read_npz(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The arrays of the file by name, and the names of the pictures; no names where the file has none."""
    arrays = read_arrays(path, (*ARRAYS, "names"))
    names = arrays.pop("names", np.empty(0, dtype=np.str_))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"{path}: names: expected a list of texts, got {names.dtype} of shape {names.shape}")
    try:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}, names.tolist()
    except TypeError as error:  # a dtype that PyTorch does not have
        raise ValueError(f"{path}: not a readable .npz file ({first_line(error)})") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """As `_read_npz`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Copied, because these tensors stay mapped: truncating the file would kill the process.
            arrays = {key: file.get_tensor(key).clone() for key in ARRAYS if key in file.keys()}  # noqa: SIM118
            names = json.loads((file.metadata() or {}).get("names", "[]"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # safetensors and PyTorch each raise their own kinds on damaged files
        raise ValueError(f"{path}: not a readable .safetensors file ({first_line(error)})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: names: expected a list of texts")
    return arrays, names
