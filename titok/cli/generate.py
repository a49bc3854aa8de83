"""`titok generate`: classes to pictures, as a PNG grid or as the .npz that FID tools read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from titok.cli.errors import say, show_progress
from titok.cli.inputs import load_generator, load_tokenizer
from titok.cli.options import (
    AutoBatchSizeOption,
    DeviceOption,
    DtypeOption,
    GeneratorOption,
    OverwriteOption,
    RoundingOption,
    TokenizerOption,
    parse_auto_batch_size,
    parse_rounding,
)
from titok.cli.outputs import check_apart, check_files, check_output
from titok.data.class_names import parse_labels

GRID_LIMIT = 1024  # pictures in one PNG


def generate(
    tokenizer: TokenizerOption,
    generator: GeneratorOption,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help=f"A .png (a grid of {GRID_LIMIT} at most) or a .npz (ADM's layout, for FID); -o may be repeated. "
            "[default: samples.png]",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Classes by number, such as 207,360 (one past the last is no class), or by ImageNet's names, such as "
            "'golden retriever, otter'; the beginning of a name will do. [default: all]",
        ),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pictures of each class. [default: 1 with --labels]")
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            "--num",
            "-n",  # for torchrun, which before Python 3.12 takes --num for its own --numa-binding
            metavar="N",
            min=1,
            help="Pictures in all, classes in turn. [default: 16 without --labels]",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Same seed, same pictures, whatever the batch size.")
    ] = 0,
    first_sample: Annotated[
        int, typer.Option(metavar="N", min=0, help="Number of the first picture, to cut a long run into several.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Decoding steps. [default of this and the next seven: the generator's own]"
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(metavar="X", help="Of classifier-free guidance.")] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="constant, linear or power-cosine.")
    ] = None,
    guidance_power: Annotated[float | None, typer.Option(metavar="X", help="Exponent of power-cosine.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Of the noise in the choice of tokens.")
    ] = None,
    softmax_annealing: Annotated[bool | None, typer.Option(help="Sharpen predictions from step to step.")] = None,
    mask_schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="arccos, cosine, linear, root or square.")
    ] = None,
    confidence: Annotated[str | None, typer.Option(metavar="RULE", help="titok or maskgit.")] = None,
    rounding: RoundingOption = "nearest",
    batch_size: AutoBatchSizeOption = "16",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Generate pictures of classes.

    Writes a PNG grid, or a .npz with `arr_0` uint8 (N, H, W, 3) and `arr_1` int64 labels (N,), or both. A .npz
    that was stopped goes on when the same command is given again; under torchrun, processes share the work.

    \b
    titok generate -t yucornetto/tokenizer_titok_l32_imagenet \\
        -g yucornetto/generator_titok_l32_imagenet --labels "golden retriever, otter" --per-class 4
    titok generate -t runs/quickstart/tokenizer -g runs/quickstart/generator --num 50000 -o samples.npz
    torchrun --nproc-per-node 8 -m titok generate -t TOKENIZER -g GENERATOR -n 50000 -o samples.npz
    """
    outputs = output or [Path("samples.png")]
    for path in outputs:
        check_output(path, ".png", ".npz")
        check_apart(path, [tokenizer, generator])
    npz_files = [path for path in outputs if path.suffix.lower() == ".npz"]
    png_files = [path for path in outputs if path.suffix.lower() == ".png"]
    if len(npz_files) > 1:
        raise ValueError(f"--output: expected one .npz at most, got {len(npz_files)}")
    check_files([path for path in outputs if not _was_stopped(path)], overwrite=overwrite)
    check_files([_parts(path) / "lock" for path in npz_files], overwrite=True)
    rule, size = parse_rounding(rounding), parse_auto_batch_size(batch_size)
    import torch

    from titok import Pipeline
    from titok.checks import check_labels
    from titok.data.images import grid, write_image
    from titok.data.npz import read_arrays
    from titok.generation.sample_sets import generate_set
    from titok.processes import process_group

    decoder = load_tokenizer(tokenizer, device, dtype)
    pipe = Pipeline(decoder, load_generator(generator, device, dtype))
    config = pipe.generator.config
    options: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule,
        "guidance_power": guidance_power,
        "temperature": temperature,
        "softmax_annealing": softmax_annealing,
        "mask_schedule": mask_schedule,
        "confidence": confidence,
    }
    given = {name: value for name, value in options.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **given)
    classes = torch.tensor(choose_classes(labels, per_class, num, config.num_classes))
    check_labels(classes, config.num_classes)
    if png_files and len(classes) > GRID_LIMIT:
        raise ValueError(
            f"{png_files[0]}: expected {GRID_LIMIT} pictures at most, got {len(classes)}: write a .npz"
        )

    settings: dict[str, Any] = {
        "batch_size": size,
        "seed": seed,
        "first_sample": first_sample,
        "sampling": sampling,
        "rounding": rule,
        "progress": show_progress(),
    }
    with process_group() as (rank, world_size):
        if world_size > 1 and not npz_files:
            raise ValueError("--output: expected a .npz, because several processes generate, got none")
        for path in npz_files:
            generate_set(pipe, path, classes, **settings)
    if rank > 0:
        return
    if png_files:
        if npz_files:
            pictures = torch.from_numpy(
                read_arrays(npz_files[0], ["arr_0"])["arr_0"][..., : decoder.config.channels]
            )
        else:
            pictures = torch.stack(list(pipe.generate_many(classes, **settings)))
        for path in png_files:
            write_image(path, grid(pictures, columns=per_class))
    for path in outputs:
        say(f"{path}: {len(classes)} pictures of {len(classes.unique())} classes, seed {seed}")


def _was_stopped(path: Path) -> bool:
    """True where a run that wrote `path` was stopped, so that the same command goes on with it.

    Such a run may have been stopped after the file was in place.
    """
    parts = _parts(path)
    if path.suffix.lower() != ".npz" or not parts.is_dir():
        return False
    return not parts.is_symlink() or any(parts.iterdir())  # a link of the user stays when its run is finished


def _parts(path: Path) -> Path:
    """The folder in which `generate_set` keeps the finished batches of a .npz."""
    return path.with_name(f"{path.name}.parts")


def choose_classes(labels: str | None, per_class: int | None, num: int | None, num_classes: int) -> list[int]:
    """The class of each picture, from the options --labels, --per-class and --num.

    Raises:
        ValueError: both --per-class and --num are given, or --labels is refused by `parse_labels`.
    """
    if per_class is not None and num is not None:
        raise ValueError("--per-class, --num: expected one of them, got both")
    classes = list(range(num_classes))
    if labels is not None:
        classes = parse_labels(labels, num_classes)
    if per_class is not None:
        return [label for label in classes for _ in range(per_class)]
    if num is None:
        num = 16 if labels is None else len(classes)
    return [classes[i % len(classes)] for i in range(num)]
