"""`titok tokenize` and `titok detokenize`: pictures to a file of tokens, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titok.cli.errors import note, say
from titok.cli.inputs import (
    SourceOptions,
    load_tokenizer,
    open_source,
    png_names,
    preprocessing,
    progress,
    read_pictures,
    tokenize_source,
)
from titok.cli.options import (
    BatchSizeOption,
    ClassesOption,
    DeviceOption,
    DtypeOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    ImagesArgument,
    IndexOption,
    LabelsOption,
    OverwriteOption,
    RoundingOption,
    SkipUnreadableOption,
    TokenizerOption,
    parse_rounding,
    select_device,
)
from titok.cli.outputs import check_apart, check_files, check_output

if TYPE_CHECKING:
    from titok.data.images import Preprocessing
    from titok.data.sources import PictureSource

FOLDER_SUFFIX = ".tokens"
SET_SUFFIXES = (".jsonl", FOLDER_SUFFIX)  # of sets of tokens for training


def tokenize(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PATH", help="A file .npz, .safetensors or .jsonl, or a folder .tokens."
        ),
    ] = Path("tokens.npz"),
    augment: Annotated[
        str,
        typer.Option(
            "--augment", metavar="COPIES", help="Of each picture: none, flip or ten-crop (.tokens, .jsonl)."
        ),
    ] = "none",
    overwrite: OverwriteOption = False,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    classes: ClassesOption = None,
    labels: LabelsOption = None,
    index: IndexOption = None,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Turn pictures into tokens (of a VAE: latents).

    Pictures are turned upright as their EXIF data say, laid over white where they are transparent, resized and
    cropped to the tokenizer's size. A .npz or .safetensors holds `tokens` int32 (N, K) or `latents`
    float32 (N, K, C), and `names`, relative to the folder.

    A folder .tokens is for the training of generators: it has labels too, it is not read into memory, a run that was
    stopped goes on when the same command is given again, and processes under torchrun share the work. So it is with a
    .jsonl, in the format of the official code. Only these two take copies of each picture: flip is its crop and the
    mirror image, ten-crop five crops and their mirror images.

    \b
    titok tokenize photos -t yucornetto/tokenizer_titok_l32_imagenet -o tokens.npz
    titok tokenize cat.jpg -t runs/quickstart/tokenizer -o cat.safetensors
    torchrun --nproc-per-node 8 -m titok tokenize imagenet/train -t runs/l32 -o l32.tokens --augment ten-crop
    """
    check_suffix(output)
    check_apart(output, [images, tokenizer])
    options = SourceOptions(classes, labels, index)
    how = preprocessing(ignore_orientation, ignore_transparency)
    if output.suffix.lower() in SET_SUFFIXES:
        from titok.processes import process_group

        torch_device = select_device(device)
        with process_group(gpu=torch_device.type == "cuda") as (rank, _):
            source = open_source(images, options)
            made = write_set(
                source, tokenizer, output, augment, how,
                overwrite=overwrite, skip_unreadable=skip_unreadable, batch_size=batch_size,
                device=str(torch_device), dtype=dtype,
            )  # fmt: skip
        if rank == 0:
            say(f"{output}: {made}")
        return
    if augment != "none":
        raise ValueError(
            f"{output}: expected a name that ends in {' or '.join(SET_SUFFIXES)}, which take --augment"
        )
    import torch

    from titok.data.folders import Pictures
    from titok.data.tokens import write_tokens

    source = open_source(images, options)
    check_files([output], source.files(range(len(source))), overwrite=overwrite)
    model = load_tokenizer(tokenizer, device, dtype)
    pictures = Pictures(source, model.config.image_size, model.config.channels, preprocessing=how)
    encoded, names = [], []
    for numbers, batch in read_pictures(pictures, batch_size, model.device, skip_unreadable=skip_unreadable):
        encoded.append(model.encode(batch).cpu())
        names += [source.names[number] for number in numbers]
    if not encoded:
        raise ValueError(f"{images}: none of its pictures is readable")
    tokens = torch.cat(encoded)
    write_tokens(output, tokens, names, model)
    left_out = f" ({len(source) - len(names)} left out)" if len(names) < len(source) else ""
    shape = " x ".join(str(side) for side in tokens.shape[1:])
    kind = "tokens" if tokens.ndim == 2 else "latents"
    say(f"{output}: {len(names)} pictures{left_out}, {shape} {kind} each")


def check_suffix(output: Path) -> None:
    """Raises `ValueError` where `output` cannot be what `titok tokenize` writes."""
    if output.suffix.lower() != FOLDER_SUFFIX:
        check_output(output, ".npz", ".safetensors", *SET_SUFFIXES)
    elif output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a folder, got a file")


def write_set(
    source: PictureSource,
    tokenizer: str,
    output: Path,
    augment: str,
    how: Preprocessing,
    *,
    overwrite: bool,
    skip_unreadable: bool,
    batch_size: int,
    device: str,
    dtype: str,
) -> str:
    """Writes a set of tokens, by all processes of the group, and returns in words what it holds."""
    from titok.data.crops import COPIES
    from titok.data.token_sets import INFO
    from titok.data.tokenizing import parts_folder
    from titok.processes import in_first_process

    if augment not in COPIES:
        raise ValueError(f"--augment: expected {', '.join(COPIES)}, got {augment!r:.80}")

    def check() -> None:
        going_on = parts_folder(output).exists()
        written = output / INFO if output.suffix.lower() == FOLDER_SUFFIX else output
        check_files([written], source.files(range(len(source))), overwrite=overwrite or going_on)

    in_first_process(check)
    model = load_tokenizer(tokenizer, device, dtype)
    count, copies = tokenize_source(
        model, source, output, augment, how, skip_unreadable=skip_unreadable, anew=overwrite, batch_size=batch_size
    )
    left_out = f" ({len(source) - count} left out)" if count < len(source) else ""
    times = f"{copies} x " if copies > 1 else ""
    return f"{count} pictures{left_out}, {times}{model.config.num_latent_tokens} tokens each"


def detokenize(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="What `titok tokenize` wrote.")],
    tokenizer: TokenizerOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="For a PNG of each row."),
    ] = Path("decoded"),
    overwrite: OverwriteOption = False,
    rounding: RoundingOption = "nearest",
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Turn tokens back into pictures.

    Writes a PNG for each row, under the name that the file holds. The tokens of another tokenizer are refused. A
    file .npz or .safetensors made elsewhere needs `tokens` (N, K) alone.

    \b
    titok detokenize tokens.npz -t yucornetto/tokenizer_titok_l32_imagenet -o decoded
    """
    check_output(output)
    check_apart(output, [tokens, tokenizer])
    rule = parse_rounding(rounding)
    from titok.data.images import to_uint8, write_image
    from titok.data.token_sets import is_token_set, open_tokens
    from titok.data.tokens import read_tokens

    model = load_tokenizer(tokenizer, device, dtype)
    if is_token_set(tokens):
        opened = open_tokens(tokens)
        signed = opened.check(model)
        rows, names = opened.rows()
    else:
        rows, names, signed = read_tokens(tokens, model)
    files = [output / file for file in png_names(names)]
    check_files(files, overwrite=overwrite)
    if not signed:
        note(f"note: {tokens} does not tell which tokenizer made it")
    unwritten = iter(files)
    with progress(len(rows), "pictures") as bar:
        for batch in rows.split(batch_size):
            for picture in to_uint8(model.decode(batch.to(model.device)), rule):
                write_image(next(unwritten), picture)
            bar.update(len(batch))
    say(f"{output}: {len(rows)} pictures")
