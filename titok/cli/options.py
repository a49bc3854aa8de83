"""Options that several commands share, and the functions that check or parse the values of options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

if TYPE_CHECKING:
    import torch

    from titok.config import Rounding

_MODEL = (
    "Folder, weights file or Hugging Face repository (also owner/name@REVISION) of the {}; preset:NAME:FILE for a "
    "weights file without config.json; preset:NAME tries one with random weights."
)
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", "-t", metavar="MODEL", help=_MODEL.format("tokenizer"))
]
GeneratorOption = Annotated[
    str, typer.Option("--generator", "-g", metavar="MODEL", help=_MODEL.format("generator"))
]
ImagesArgument = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES",
        help="A picture; a folder, searched with its sub-folders and links; .tar shards; or hf:FOLDER, hf:NAME:SPLIT.",
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="ORDER",
        help="Order of the classes: sorted, natural (2 before 10), or a file with a name on each line.",
    ),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        "--labels", metavar="FILE", help="For a folder: a file with the name and the class of each picture."
    ),
]
IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index", metavar="FILE", help="For .tar shards: a .npz that keeps their index for the next time."
    ),
]
SkipUnreadableOption = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave pictures out that cannot be read, and name them; else one stops all."
    ),
]
IgnoreOrientationOption = Annotated[
    bool,
    typer.Option(
        "--ignore-orientation", help="Do not turn photos upright by their EXIF data, as the published evaluation."
    ),
]
IgnoreTransparencyOption = Annotated[
    bool,
    typer.Option("--ignore-transparency", help="Do not lay transparency over white, as the published evaluation."),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto (CUDA where there is a device), cpu, cuda or cuda:N."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of the networks: auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16; or "
        "int8, linear layers in 8 bits on a CPU with AVX-512 VNNI: faster, less exact.",
    ),
]
_BATCH_SIZE = "Pictures at a time: a matter of memory and speed alone"
BatchSizeOption = Annotated[
    int,
    typer.Option("--batch-size", metavar="N", min=1, help=f"{_BATCH_SIZE}."),
]
AutoBatchSizeOption = Annotated[
    str,
    typer.Option("--batch-size", metavar="N", help=f"{_BATCH_SIZE}; auto finds the fastest that fits."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace outputs that exist; else one that exists is refused. Inputs never."),
]
RoundingOption = Annotated[
    str,
    typer.Option(
        "--rounding", metavar="RULE", help="To 8 bits: nearest, or truncate (as the published FID script)."
    ),
]


def parse_rounding(name: str) -> Rounding:
    """The value of --rounding."""
    if name not in ("nearest", "truncate"):
        raise ValueError(f"--rounding: expected nearest or truncate, got {name!r}")
    return cast("Rounding", name)


def parse_auto_batch_size(text: str) -> int | Literal["auto"]:
    """The value of a --batch-size that may be "auto"."""
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--batch-size: expected auto or an integer >= 1, got {text!r}")
    return int(text)


def select_device(name: str) -> torch.device:
    """The value of --device. Makes the GPU that torchrun gives this process the current one."""
    import torch

    count = torch.cuda.device_count()
    if name in ("auto", "cuda") and count:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun: one GPU for each process
        torch.cuda.set_device(local_rank % count)
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise ValueError(f"--device: expected auto or one of {', '.join(known)}, got {name!r}")
    if name == "cuda" and not count:
        raise ValueError("--device: expected cpu, because there is no CUDA device, got 'cuda'")
    return torch.device(name)


def parse_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that --dtype asks for, for models on `device`; for int8 that of what is not quantised."""
    import torch

    from titok.inference.dtypes import Dtype, choose_dtype

    if name not in ("auto", "float32", "bfloat16", "float16", "int8"):
        raise ValueError(f"--dtype: expected auto, float32, bfloat16, float16 or int8, got {name!r}")
    dtype: Dtype = "auto" if name == "auto" else "int8" if name == "int8" else getattr(torch, name)
    return choose_dtype(dtype, device)
