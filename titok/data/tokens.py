"""Tokens on disk: one .npz or .safetensors file for many images, which tells the tokenizer that made it.

Both kinds hold the same arrays: `tokens` int32 (N, K), or of a VAE `latents` float32 (N, K, C); `signature`, a few
weights of the tokenizer; and the N names (an array in .npz, JSON under "names" in the metadata of .safetensors).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from titok.checkpoints.files import atomic_path, write_safetensors
from titok.checks import check_latents, check_tokens

if TYPE_CHECKING:
    from titok.models.tokenizer import TiTok

SUFFIXES = (".npz", ".safetensors")


class TokenFile(NamedTuple):
    """tokens (N, K) int64, or of a VAE latents (N, K, C) float32, on the CPU; one name for each row; and whether the
    file told that the tokenizer which reads it also wrote it (one made elsewhere may lack the signature)."""

    tokens: Tensor
    names: list[str]
    signed: bool


def write_tokens(path: str | os.PathLike[str], tokens: Tensor, names: Sequence[str], tokenizer: TiTok) -> None:
    """Writes what `tokenizer.encode` gave for the pictures called `names`. An existing file is replaced whole.

    Raises:
        ValueError: neither .npz nor .safetensors, tokens that are not the tokenizer's, or not one name for each.
    """
    path = _checked(path)
    _check(tokens, names, tokenizer)
    vae = tokenizer.config.bottleneck == "vae"
    values = {"latents": tokens.float()} if vae else {"tokens": tokens.to(torch.int32)}
    values["signature"] = signature(tokenizer)
    if path.suffix == ".safetensors":
        write_safetensors(path, values, {"names": json.dumps(list(names))})
        return
    arrays: dict[str, Any] = {key: value.cpu().numpy() for key, value in values.items()}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(names, dtype=np.str_), **arrays)


def read_tokens(path: str | os.PathLike[str], tokenizer: TiTok) -> TokenFile:
    """Reads a file of `write_tokens`, or one made elsewhere that holds `tokens` (or `latents`) at least; names then
    are 000000, 000001, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not readable, made by another tokenizer, or tokens that are not this tokenizer's; names the file.
    """
    path = _checked(path)
    arrays, names = _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)
    key = "latents" if tokenizer.config.bottleneck == "vae" else "tokens"
    if key not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path}: expected an array {key!r}, as this tokenizer makes, got {found}")
    tokens = arrays[key]
    if not tokens.is_floating_point() and tokens.dtype != torch.bool:
        tokens = tokens.to(torch.int64)
    try:
        _check(tokens, names or [""] * len(tokens), tokenizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    written_by = arrays.get("signature")
    if written_by is not None and not _same(written_by, signature(tokenizer)):
        raise ValueError(f"{path}: made by a tokenizer with other weights than the one given")
    return TokenFile(tokens, names or [f"{i:06}" for i in range(len(tokens))], written_by is not None)


def signature(tokenizer: TiTok) -> Tensor:
    """Eight weights that tell tokenizers apart, float32: out of the codebook, which fine-tuning of the decoder
    leaves alone, or out of a VAE decoder's first layer."""
    weight = tokenizer.decoder.embed.weight if tokenizer.quantizer is None else tokenizer.quantizer.codebook
    flat = weight.detach().flatten()
    return flat[torch.linspace(0, len(flat) - 1, 8).long().to(flat.device)].float().cpu()


def _same(a: Tensor, b: Tensor) -> bool:
    """Within what loading the weights in bfloat16 changes."""
    return a.shape == b.shape and torch.allclose(a.float(), b, rtol=0.02, atol=1e-6)


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return path


def _check(tokens: Tensor, names: Sequence[str], tokenizer: TiTok) -> None:
    c = tokenizer.config
    if c.bottleneck == "vae":
        check_latents(tokens, c.num_latent_tokens, c.code_dim)
    else:
        check_tokens(tokens, c.num_latent_tokens, c.codebook_size)
    if len(names) != len(tokens):
        raise ValueError(f"names: expected {len(tokens)}, one for each row of tokens, got {len(names)}")


def _read_npz(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = {key: file[key] for key in ("tokens", "latents", "signature") if key in file}
            names = [str(name) for name in file["names"]] if "names" in file else []
        return {key: torch.from_numpy(value) for key, value in wanted.items()}, names
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get("names", "[]"))
            return {key: file.get_tensor(key) for key in file.keys()}, [str(name) for name in names]  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error
