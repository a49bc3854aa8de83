"""What commands read: models, pictures, and the names of pictures."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from titok.cli.errors import note
from titok.cli.options import parse_dtype, select_device

if TYPE_CHECKING:
    from torch import Tensor

    from titok import MaskGIT, TiTok
    from titok.data.folders import ImageFolder
    from titok.data.images import Preprocessing


def load_tokenizer(source: str, device: str, dtype: str) -> TiTok:
    """The tokenizer that --tokenizer, --device and --dtype ask for, prepared for inference."""
    from titok import TiTok, TokenizerConfig

    return cast("TiTok", _load(TiTok, TokenizerConfig, source, device, dtype))


def load_generator(source: str, device: str, dtype: str) -> MaskGIT:
    """The generator that --generator, --device and --dtype ask for, prepared for inference."""
    from titok import GeneratorConfig, MaskGIT

    return cast("MaskGIT", _load(MaskGIT, GeneratorConfig, source, device, dtype))


def _load(model_class: Any, config_class: Any, source: str, device: str, dtype: str) -> Any:
    import torch

    torch_device = select_device(device)
    torch_dtype = parse_dtype(dtype, torch_device)
    if not source.startswith("preset:"):
        return model_class.from_pretrained(source, dtype=torch_dtype, device=torch_device, prepare=True)
    config = config_class.preset(source.removeprefix("preset:"))
    note(f"WARNING: {source} has random weights: its tokens mean nothing and its pictures are noise")
    # One seed, so that two commands with the same preset use the same weights.
    with torch.random.fork_rng(), torch.device(torch_device):
        torch.manual_seed(0)
        return model_class(config).to(torch_dtype).eval().prepare()


def find_pictures(source: Path) -> list[Path]:
    """The pictures that the argument IMAGES of a command names; what is left out is said on stderr."""
    from titok.data.images import list_images

    images = list_images(source)
    if text := images.describe_left_out():
        note(f"note: {source}: {text}")
    return images.paths


def image_folder(
    source: Path, size: tuple[int, int], channels: int, how: Preprocessing, *, skip_unreadable: bool
) -> ImageFolder:
    """The pictures to train on. Every one is read once, so that a damaged one does not end the training later.

    What is left out is said on stderr. Of several processes that train together, the first reads the pictures.

    Raises:
        ValueError: a picture cannot be read and `skip_unreadable` is False, or none can be read.
    """
    from titok.data.folders import ImageFolder
    from titok.processes import in_first_process, own_part

    pictures = ImageFolder(source, size, channels, preprocessing=how)
    first = own_part()[0] == 0
    if first and (text := pictures.found.describe_left_out()):
        note(f"note: {source}: {text}")
    problems = in_first_process(pictures.find_unreadable)
    if problems and not skip_unreadable:
        others = f" (and {len(problems) - 1} other pictures)" if len(problems) > 1 else ""
        raise ValueError(f"{next(iter(problems.values()))}{others}; --skip-unreadable leaves such pictures out")
    for problem in problems.values() if first else ():
        note(problem)
    pictures.remove(problems)
    return pictures


def preprocessing(ignore_orientation: bool, ignore_transparency: bool) -> Preprocessing:
    """The values of --ignore-orientation and --ignore-transparency."""
    from titok.data.images import Preprocessing

    return Preprocessing(apply_orientation=not ignore_orientation, white_background=not ignore_transparency)


class _Pictures:
    """The pictures at `paths` by index, as the tokenizer takes them, for `titok.data.folders.read_batches`.

    A picture that cannot be read raises `ValueError` or `OSError`. With `skip_unreadable` it is reported on stderr,
    its index is added to `damaged`, and a black picture takes its place in the batch.
    """

    def __init__(
        self, paths: Sequence[Path], tokenizer: TiTok, how: Preprocessing, *, skip_unreadable: bool
    ) -> None:
        self.paths, self.how, self.skip_unreadable = paths, how, skip_unreadable
        self.size, self.channels = tokenizer.config.image_size, tokenizer.config.channels
        self.damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        import torch

        from titok.data.images import read_image

        try:
            return read_image(self.paths[index], self.size, self.channels, preprocessing=self.how)
        except (OSError, ValueError) as error:
            if not self.skip_unreadable:
                raise
            if index not in self.damaged:  # `read_batches` reads the first picture twice
                note(str(error))
            self.damaged.add(index)
            return torch.zeros(self.channels, *self.size)


def read_pictures(
    paths: Sequence[Path], tokenizer: TiTok, batch_size: int, how: Preprocessing, *, skip_unreadable: bool = False
) -> Iterator[tuple[list[Path], Tensor]]:
    """Batches of pictures with a progress bar; threads read the next batches meanwhile.

    Yields:
        the paths of a batch and its pictures, float32 (B, channels, H, W) in [0, 1] on the tokenizer's device.
        With `skip_unreadable`, damaged pictures are left out, and so is a batch that has no other.

    Raises:
        ValueError, OSError: a picture cannot be read and `skip_unreadable` is False.
    """
    import torch

    from titok.data.folders import read_batches

    pictures = _Pictures(paths, tokenizer, how, skip_unreadable=skip_unreadable)
    batches = torch.arange(len(paths)).split(batch_size)
    with progress(len(paths), "pictures") as bar:
        for indices, images in zip(batches, read_batches(pictures, batches), strict=True):
            readable = [row for row, index in enumerate(indices.tolist()) if index not in pictures.damaged]
            if readable:
                yield [paths[indices[row]] for row in readable], images[readable].to(tokenizer.device)
            bar.update(len(indices))


def picture_name(path: Path, source: Path) -> str:
    """The name that a token file gives a picture: relative to `source`, the IMAGES argument of a command."""
    return path.name if path == source else path.relative_to(source).as_posix()


def png_names(names: Sequence[str]) -> list[str]:
    """One PNG file name for each picture name, relative to the output folder.

    "a.jpg" becomes "a.png". Where two names differ in their suffix only, or a file would have the name of a folder,
    all suffixes are kept: "a.jpg.png". The end of a name that a file system does not take is replaced by a hash.

    Raises:
        ValueError: a name leads out of the output folder, or two pictures have the same name.
    """
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise ValueError(f"names: expected paths below the output folder, got {name!r}")
    for files in (
        [_shortened(PurePosixPath(name).with_suffix(".png")) for name in names],
        [_shortened(PurePosixPath(f"{name}.png")) for name in names],
    ):
        folders = {folder for file in files for folder in file.parents}
        if len(set(files)) == len(files) and folders.isdisjoint(files):
            return [file.as_posix() for file in files]
    raise ValueError("names: expected one name for each picture, got some twice or as a folder too")


def _shortened(file: PurePosixPath) -> PurePosixPath:
    """The path of a PNG with a name of at most 255 bytes, which is what Linux and macOS take."""
    encoded = file.name.encode(errors="surrogateescape")
    if len(encoded) <= 255:
        return file
    end = f"~{hashlib.sha256(encoded).hexdigest()[:16]}.png"
    return file.with_name(encoded[: 255 - len(end)].decode(errors="ignore") + end)


def progress(total: int, name: str) -> Any:
    """A progress bar on stderr; none where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="img", disable=None, file=sys.stderr, leave=False)
