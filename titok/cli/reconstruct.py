"""`titok reconstruct`: originals beside what the tokenizer makes of them, with PSNR."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from titok.cli.errors import say
from titok.cli.inputs import load_tokenizer, open_source, png_names, preprocessing, read_pictures
from titok.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    ImagesArgument,
    OverwriteOption,
    SkipUnreadableOption,
    TokenizerOption,
)
from titok.cli.outputs import check_apart, check_files, check_output

PAIRS_LIMIT = 64  # pairs of pictures in one file
ONE_FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # those of `titok.data.images.WRITTEN_FORMATS`


def reconstruct(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help=f"One .png, .jpg or .webp for all ({PAIRS_LIMIT} pictures at most), or a folder for a PNG of each.",
        ),
    ] = Path("reconstructions.png"),
    overwrite: OverwriteOption = False,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Show originals beside reconstructions, with PSNR.

    Originals are left, after turning them upright as their EXIF data say, laying transparency over white, resizing
    and cropping. The PSNR is that of the 8-bit pictures.

    \b
    titok reconstruct cat.jpg -t yucornetto/tokenizer_titok_l32_imagenet -o cat_twice.png
    titok reconstruct photos -t runs/quickstart/tokenizer -o reconstructions
    """
    one_file = output.suffix.lower() in ONE_FILE_SUFFIXES
    check_output(output, *(ONE_FILE_SUFFIXES if one_file else ()))
    check_apart(output, [images, tokenizer])
    import torch

    from titok.data.folders import Pictures
    from titok.data.images import grid, psnr, to_uint8, write_image

    source = open_source(images)
    if one_file and len(source) > PAIRS_LIMIT:
        raise ValueError(
            f"{output}: expected a folder, because {len(source)} pictures are too many for one file ({PAIRS_LIMIT})"
        )
    names = source.names
    files = [output / file for file in png_names(names)]
    check_files([output] if one_file else files, source.files(range(len(source))), overwrite=overwrite)
    model = load_tokenizer(tokenizer, device, dtype)
    how = preprocessing(ignore_orientation, ignore_transparency)
    pictures = Pictures(source, model.config.image_size, model.config.channels, preprocessing=how)
    ratios: list[float] = []
    pairs = []
    for numbers, batch in read_pictures(pictures, batch_size, model.device, skip_unreadable=skip_unreadable):
        originals = to_uint8(batch).cpu()
        copies = to_uint8(model.decode(model.encode(batch))).cpu()
        values = psnr(copies, originals).tolist()
        for number, original, copy, ratio in zip(numbers, originals, copies, values, strict=True):
            say(f"{ratio:6.2f} dB  {names[number]}")
            pair = grid(torch.stack([original, copy]), columns=2)
            if one_file:
                pairs.append(pair)
            else:
                write_image(files[number], pair)
            ratios.append(ratio)
    if not ratios:
        raise ValueError(f"{images}: none of its pictures is readable")
    if one_file:
        write_image(output, grid(torch.stack(pairs), gap=8))
    left_out = f" ({len(names) - len(ratios)} left out)" if len(ratios) < len(names) else ""
    say(f"{sum(ratios) / len(ratios):6.2f} dB  mean of {len(ratios)}{left_out}")
    say(f"{output}: originals left, reconstructions right")
