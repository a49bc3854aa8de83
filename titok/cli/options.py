"""What the commands of `titok.cli.app` share: options, error handling, loading of models, reading of pictures."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from titok import MaskGIT, TiTok


class Group(TyperGroup):
    """Turns the errors that wrong input raises into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("interrupted: no file is half-written")
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            note(f"error: {error}")
            raise typer.Exit(2) from None


# ---------------------------------------------------------------------------------------------------------------
# Options

_MODEL = "Folder, weights file or Hugging Face repository of the {}; preset:NAME tries one with random weights."
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", "-t", metavar="MODEL", help=_MODEL.format("tokenizer"))
]
GeneratorOption = Annotated[
    str, typer.Option("--generator", "-g", metavar="MODEL", help=_MODEL.format("generator"))
]
ImagesArgument = Annotated[
    Path, typer.Argument(metavar="IMAGES", help="A picture, or a folder that is searched with its sub-folders.")
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", metavar="DEVICE", help="auto (CUDA where there is a device), cpu, cuda or cuda:N."),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="Of the networks: float32, bfloat16 or float16.")
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
RoundingOption = Annotated[
    str,
    typer.Option(
        "--rounding", metavar="RULE", help="To 8 bits: nearest, or truncate (as the published FID script)."
    ),
]


def note(text: str) -> None:
    typer.echo(text, err=True)


def check_output(path: Path, *suffixes: str) -> None:
    """Finds out before the work whether its result can be written. Without suffixes a folder is wanted."""
    if not suffixes and path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder, got a file")
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")
    if suffixes and path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")


def rounding_rule(name: str) -> Literal["nearest", "truncate"]:
    if name not in ("nearest", "truncate"):
        raise ValueError(f"--rounding: expected nearest or truncate, got {name!r}")
    return cast(Literal["nearest", "truncate"], name)


def batch_size_of(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise ValueError(f"--batch-size: expected auto or an integer >= 1, got {text!r}")
    return int(text)


@contextlib.contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Joins the processes that torchrun has started, where it has: (number of this one, how many)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    import datetime

    import torch.distributed as dist

    # Only lists and barriers pass between them. They may have to wait for each other long: torchrun ends all when one
    # fails, so that nobody waits for ever.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    import torch

    count = torch.cuda.device_count()
    if name in ("auto", "cuda") and count:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % count)  # torchrun: one GPU each
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise ValueError(f"--device: expected auto or one of {', '.join(known)}, got {name!r}")
    if name == "cuda" and not count:
        raise ValueError("--device: expected cpu, because there is no CUDA device, got 'cuda'")
    return torch.device(name)


def dtype_of(name: str) -> torch.dtype:
    import torch

    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype: expected float32, bfloat16 or float16, got {name!r}")
    return cast("torch.dtype", getattr(torch, name))


# ---------------------------------------------------------------------------------------------------------------
# Models


def load_tokenizer(source: str, device: str, dtype: str) -> TiTok:
    from titok import TiTok, TokenizerConfig

    return cast("TiTok", _load(TiTok, TokenizerConfig, source, device, dtype))


def load_generator(source: str, device: str, dtype: str) -> MaskGIT:
    from titok import GeneratorConfig, MaskGIT

    return cast("MaskGIT", _load(MaskGIT, GeneratorConfig, source, device, dtype))


def _load(kind: Any, config: Any, source: str, device: str, dtype: str) -> Any:
    """A model without gradients. The weights of a preset are random, but the same every time."""
    import torch

    where, precision = device_of(device), dtype_of(dtype)
    if not source.startswith("preset:"):
        return kind.from_pretrained(source, dtype=precision, device=where).requires_grad_(False)
    settings = config.preset(source.removeprefix("preset:"))
    note(f"WARNING: {source} has random weights: its tokens mean nothing and its pictures are noise")
    with torch.random.fork_rng(), torch.device(where):
        torch.manual_seed(0)
        return kind(settings).to(precision).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Pictures and their names


def read_pictures(
    paths: Sequence[Path], tokenizer: TiTok, batch_size: int, unreadable: list[Path] | None = None
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of pictures as the tokenizer wants them, and their paths; threads read ahead. A damaged picture
    raises, or is added to `unreadable` and left out."""
    import torch

    from titok.data.folders import read_batches
    from titok.data.images import read_image

    size, channels = tokenizer.config.image_size, tokenizer.config.channels
    damaged: set[int] = set()

    class Pictures:
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Tensor:
            try:
                return read_image(paths[index], size, channels)
            except ValueError as error:
                if unreadable is None:
                    raise
                if index not in damaged:
                    note(str(error))
                damaged.add(index)
                return torch.zeros(channels, *size)

    batches = torch.arange(len(paths)).split(batch_size)
    with progress(len(paths), "pictures") as bar:
        for indices, images in zip(batches, read_batches(Pictures(), batches), strict=True):
            keep = [k for k, index in enumerate(indices.tolist()) if index not in damaged]
            if keep:
                yield [paths[indices[k]] for k in keep], images[keep].to(tokenizer.device)
            bar.update(len(indices))
    if unreadable is not None:
        unreadable += [paths[index] for index in sorted(damaged)]


def picture_name(path: Path, source: Path) -> str:
    """What a picture found in the folder `source` is called in a file of tokens."""
    return path.name if path == source else path.relative_to(source).as_posix()


def png_names(names: Sequence[str]) -> list[str]:
    """A file name for each, below the output folder: a.jpg becomes a.png, or a.jpg.png where a.png is there too."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"names: expected paths below the output folder, got {name!r}")
    files = [PurePosixPath(name).with_suffix(".png").as_posix() for name in names]
    if len(set(files)) < len(files):
        files = [f"{name}.png" for name in names]
    if len(set(files)) < len(files):
        raise ValueError("names: expected one name for each picture, got some twice")
    return files


def progress(total: int, name: str) -> Any:
    """A progress bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="img", disable=None, file=sys.stderr, leave=False)
