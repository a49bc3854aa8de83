"""What commands read: models, pictures, and the names of pictures."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from titok.cli.errors import is_quiet, note
from titok.cli.options import parse_dtype, select_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from titok import MaskGIT, TiTok
    from titok.data.folders import Pictures
    from titok.data.images import Preprocessing
    from titok.data.sources import PictureSource


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
    torch_dtype, int8 = parse_dtype(dtype, torch_device), dtype == "int8"
    name, _, weights = source.removeprefix("preset:").partition(":")
    if weights or not source.startswith("preset:"):
        options: dict[str, Any] = {"preset": name, "path_or_repo": weights}
        if not source.startswith("preset:"):
            # A path may hold an @; what exists is never read as a repository.
            repo, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
            options = {"path_or_repo": repo, "revision": revision or None}
        return model_class.from_pretrained(
            dtype=torch_dtype, device=torch_device, prepare=True, int8=int8, **options
        )
    config = config_class.preset(name)
    note(f"WARNING: {source} has random weights: its tokens mean nothing and its pictures are noise")
    # One seed, so that two commands with the same preset use the same weights.
    with torch.random.fork_rng(), torch.device(torch_device):
        torch.manual_seed(0)
        return model_class(config).to(torch_dtype).eval().prepare(int8=int8)


class SourceOptions(NamedTuple):
    """The values of the options that say how pictures are found."""

    class_order: str | None = None
    labels_file: Path | None = None
    shard_index: Path | None = None


def open_source(source: Path | str, options: SourceOptions = SourceOptions()) -> PictureSource:  # noqa: B008
    """The pictures that an argument of a command names; what is left out is said on stderr, by the first process."""
    from titok.data.opening import open_pictures
    from titok.data.sources import read_class_names
    from titok.processes import own_part

    classes: str | list[str] = options.class_order or "sorted"
    if classes not in ("sorted", "natural"):
        classes = read_class_names(Path(cast("str", classes)))
    pictures = open_pictures(source, classes=classes, labels_file=options.labels_file, index=options.shard_index)
    if pictures.left_out and own_part()[0] == 0:
        note(f"note: {source}: {pictures.left_out}")
    return pictures


def image_folder(
    source: Path | str,
    size: int | tuple[int, int],
    channels: int,
    how: Preprocessing,
    *,
    skip_unreadable: bool,
    options: SourceOptions = SourceOptions(),  # noqa: B008
) -> Pictures:
    """The pictures to train on. Every one is read once, so that a damaged one does not end the training later.

    What is left out is said on stderr. Of several processes that train together, the first reads the pictures.

    Raises:
        ValueError: a picture cannot be read and `skip_unreadable` is False, or none can be read; or some pictures are
            in sub-folders, which are classes, and others are not.
    """
    from titok.data.folders import Pictures
    from titok.processes import in_first_process, own_part

    pictures = Pictures(open_source(source, options), size, channels, preprocessing=how)
    _ = pictures.labels  # raises
    first = own_part()[0] == 0
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


def read_pictures(
    pictures: Pictures, batch_size: int, device: torch.device, *, skip_unreadable: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of pictures with a progress bar; threads read the next batches meanwhile.

    Yields:
        the indices of a batch and its images, float32 (B, channels, H, W) in [0, 1] on `device`. With
        `skip_unreadable`, damaged pictures are left out and named on stderr, and so is a batch that has no other.

    Raises:
        ValueError, OSError: a picture cannot be read and `skip_unreadable` is False.
    """
    import torch

    from titok.data.folders import ReadablePictures, read_batches

    noting = ReadablePictures(pictures)
    batches = torch.arange(len(pictures)).split(batch_size)
    with progress(len(pictures), "pictures") as bar:
        stream = read_batches(noting if skip_unreadable else pictures, batches)
        for indices, images in zip(batches, stream, strict=True):
            numbers = indices.tolist()
            readable = [row for row, index in enumerate(numbers) if index not in noting.problems]
            for index in numbers:
                if index in noting.problems:
                    note(noting.problems[index])
            if readable:
                yield [numbers[row] for row in readable], images[readable].to(device)
            bar.update(len(indices))


def tokenize_source(
    tokenizer: TiTok,
    source: PictureSource | Pictures,
    output: Path,
    augment: str,
    how: Preprocessing,
    *,
    skip_unreadable: bool = False,
    anew: bool = False,
    batch_size: int = 64,
) -> tuple[int, int]:
    """Writes a set of tokens of pictures, by all processes of the group, with a progress bar.

    Args:
        source: of the pictures; or pictures, of which those that were taken out are left out.
        augment: a key of `titok.data.crops.COPIES`.
        skip_unreadable, anew, batch_size: as for `titok.data.tokenizing.tokenize_set`.

    Returns:
        how many pictures the output holds, and how many copies of each.
    """
    from titok.data.crops import COPIES
    from titok.data.folders import Pictures
    from titok.data.tokenizing import tokenize_set
    from titok.processes import in_first_process, own_part
    from titok.training import fingerprint

    transform, copies = COPIES[augment]
    kept = source.indices if isinstance(source, Pictures) else None
    source = source.source if isinstance(source, Pictures) else source
    config = tokenizer.config
    pictures = Pictures(source, config.image_size, config.channels, preprocessing=how, transform=transform)
    pictures.indices = pictures.indices if kept is None else kept

    def made_of() -> dict[str, Any]:
        names = hashlib.sha256("\n".join(pictures.names).encode(errors="surrogateescape"))
        return {
            "pictures": fingerprint.of_images(pictures).get("pictures"),
            "names": names.hexdigest(),
            "labels": fingerprint.of_tensor(pictures.labels),
            "classes": pictures.classes,
            "augment": augment,
            "orientation": how.apply_orientation,
            "white_background": how.white_background,
            "tokenizer": fingerprint.of_weights(tokenizer.state_dict()),
            "dtype": str(tokenizer.dtype),
        }

    first = own_part()[0] == 0
    with progress(len(pictures), "pictures", show=first) as bar:
        count = tokenize_set(
            tokenizer, pictures, output, copies=copies, made_of=in_first_process(made_of), batch_size=batch_size,
            skip_unreadable=skip_unreadable, anew=anew, progress=bar.update, report=note,
        )  # fmt: skip
    return count, copies


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


def progress(total: int, name: str, *, show: bool = True) -> Any:
    """A progress bar on stderr; none where stderr is not a terminal, with --quiet, or where `show` is False."""
    from tqdm import tqdm

    hide = None if show and not is_quiet() else True  # None hides it where stderr is no terminal
    return tqdm(total=total, desc=name, unit="img", disable=hide, file=sys.stderr, leave=False)
