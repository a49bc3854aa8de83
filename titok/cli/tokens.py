"""`titok tokenize` and `titok detokenize`: pictures to a file of tokens, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from titok.cli.errors import note, say
from titok.cli.inputs import (
    find_pictures,
    load_tokenizer,
    picture_name,
    png_names,
    preprocessing,
    progress,
    read_pictures,
)
from titok.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    ImagesArgument,
    OverwriteOption,
    RoundingOption,
    SkipUnreadableOption,
    TokenizerOption,
    parse_rounding,
)
from titok.cli.outputs import check_apart, check_files, check_output


def tokenize(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="A .npz or .safetensors file.")
    ] = Path("tokens.npz"),
    overwrite: OverwriteOption = False,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Turn pictures into tokens (of a VAE: latents).

    Pictures are turned upright as their EXIF data say, laid over white where they are transparent, resized and
    cropped to the tokenizer's size. The file holds `tokens` int32 (N, K) or `latents`
    float32 (N, K, C), and `names`, relative to the folder.

    \b
    titok tokenize photos -t yucornetto/tokenizer_titok_l32_imagenet -o tokens.npz
    titok tokenize cat.jpg -t runs/quickstart/tokenizer -o cat.safetensors
    """
    check_output(output, ".npz", ".safetensors")
    check_apart(output, [images, tokenizer])
    import torch

    from titok.data.tokens import write_tokens

    paths = find_pictures(images)
    check_files([output], paths, overwrite=overwrite)
    model = load_tokenizer(tokenizer, device, dtype)
    encoded, names = [], []
    how = preprocessing(ignore_orientation, ignore_transparency)
    for batch_paths, pictures in read_pictures(paths, model, batch_size, how, skip_unreadable=skip_unreadable):
        encoded.append(model.encode(pictures).cpu())
        names += [picture_name(path, images) for path in batch_paths]
    if not encoded:
        raise ValueError(f"{images}: none of its pictures is readable")
    tokens = torch.cat(encoded)
    write_tokens(output, tokens, names, model)
    left_out = f" ({len(paths) - len(names)} left out)" if len(names) < len(paths) else ""
    shape = " x ".join(str(side) for side in tokens.shape[1:])
    kind = "tokens" if tokens.ndim == 2 else "latents"
    say(f"{output}: {len(names)} pictures{left_out}, {shape} {kind} each")


def detokenize(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file that `titok tokenize` wrote.")],
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
    file made elsewhere needs `tokens` (N, K) alone.

    \b
    titok detokenize tokens.npz -t yucornetto/tokenizer_titok_l32_imagenet -o decoded
    """
    check_output(output)
    check_apart(output, [tokens, tokenizer])
    rule = parse_rounding(rounding)
    from titok.data.images import to_uint8, write_image
    from titok.data.tokens import read_tokens

    model = load_tokenizer(tokenizer, device, dtype)
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
