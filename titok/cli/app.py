"""The command line `titok`. PyTorch is imported inside the commands, so that `titok --help` answers at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from titok.cli import options as _cli
from titok.cli import train as _cli_train
from titok.cli.options import (
    AutoBatchSizeOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    GeneratorOption,
    ImagesArgument,
    RoundingOption,
    TokenizerOption,
)

GRID_LIMIT = 1024  # pictures in one PNG

app = typer.Typer(
    cls=_cli.Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(_cli_train.app, name="train", help="Train a tokenizer or a generator on a folder of pictures.")


def main() -> None:
    app()


@app.callback(invoke_without_command=True)
def titok(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """TiTok: pictures as short sequences of tokens, and MaskGIT to generate them.

    \b
    titok quickstart                                               train both models on digits
    titok tokenize photos -t runs/tokenizer -o tokens.npz          pictures to tokens
    titok generate -t runs/tokenizer -g runs/generator --num 16    classes to pictures

    Every command has its own --help. Wrong input ends with one line on stderr and exit code 2.
    """
    if version:
        from titok import __version__

        typer.echo(f"titok {__version__}")
        raise typer.Exit()


@app.command()
def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="For all that is written.")
    ] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of both runs and of the samples.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run was stopped; else models there are trained anew.")
    ] = False,
) -> None:
    """Train small models on handwritten digits, and generate.

    Minutes on a CPU; the digits come with scikit-learn. Writes tokenizer/, generator/, reconstructions.png,
    samples.png, metrics.json and report.html.

    \b
    titok quickstart
    titok quickstart -o runs/seed1 --seed 1
    """
    _cli.check_output(output)
    from titok.quickstart.run import run

    run(output, seed, resume=resume)


@app.command()
def tokenize(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="A .npz or .safetensors file.")
    ] = Path("tokens.npz"),
    skip_unreadable: Annotated[
        bool,
        typer.Option("--skip-unreadable", help="Leave damaged pictures out and name them; else one stops all."),
    ] = False,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Turn pictures into tokens (of a VAE: latents).

    Pictures are resized and cropped to the tokenizer's size. The file holds `tokens` int32 (N, K) or `latents`
    float32 (N, K, C), and `names`, relative to the folder.

    \b
    titok tokenize photos -t yucornetto/tokenizer_titok_l32_imagenet -o tokens.npz
    titok tokenize cat.jpg -t runs/quickstart/tokenizer -o cat.safetensors
    """
    _cli.check_output(output, ".npz", ".safetensors")
    import torch

    from titok.data.images import find_images
    from titok.data.tokens import write_tokens

    paths = find_images(images)
    model = _cli.load_tokenizer(tokenizer, device, dtype)
    unreadable: list[Path] = []
    rows, names = [], []
    for batch, pictures in _cli.read_pictures(paths, model, batch_size, unreadable if skip_unreadable else None):
        rows.append(model.encode(pictures).cpu())
        names += [_cli.picture_name(path, images) for path in batch]
    if not rows:
        raise ValueError(f"{images}: none of its pictures is readable")
    write_tokens(output, torch.cat(rows), names, model)
    left_out = f" ({len(unreadable)} left out)" if unreadable else ""
    shape = " x ".join(str(n) for n in rows[0].shape[1:])
    typer.echo(
        f"{output}: {len(names)} pictures{left_out}, {shape} {'tokens' if rows[0].ndim == 2 else 'latents'} each"
    )


@app.command()
def detokenize(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file that `titok tokenize` wrote.")],
    tokenizer: TokenizerOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PATH", help="A folder, in which PNGs of the same names are replaced."
        ),
    ] = Path("decoded"),
    rounding: RoundingOption = "nearest",
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Turn tokens back into pictures.

    Writes a PNG for each row, under the name that the file holds. The tokens of another tokenizer are refused. A file
    made elsewhere needs `tokens` (N, K) alone.

    \b
    titok detokenize tokens.npz -t yucornetto/tokenizer_titok_l32_imagenet -o decoded
    """
    _cli.check_output(output)
    rule = _cli.rounding_rule(rounding)
    from titok.data.images import to_uint8, write_png
    from titok.data.tokens import read_tokens

    model = _cli.load_tokenizer(tokenizer, device, dtype)
    rows, names, signed = read_tokens(tokens, model)
    if not signed:
        _cli.note(f"note: {tokens} does not tell which tokenizer made it")
    files = iter(_cli.png_names(names))
    with _cli.progress(len(rows), "pictures") as bar:
        for batch in rows.split(batch_size):
            for picture in to_uint8(model.decode(batch.to(model.device)), rule):
                write_png(output / next(files), picture)
            bar.update(len(batch))
    typer.echo(f"{output}: {len(rows)} pictures")


@app.command()
def reconstruct(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="One .png for all (64 pictures at most), or a folder for one each.",
        ),
    ] = Path("reconstructions.png"),
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Show originals beside reconstructions, with PSNR.

    Originals are left, after resizing and cropping. The PSNR is that of the 8-bit pictures.

    \b
    titok reconstruct cat.jpg -t yucornetto/tokenizer_titok_l32_imagenet -o cat_twice.png
    titok reconstruct photos -t runs/quickstart/tokenizer -o reconstructions
    """
    one_file = output.suffix == ".png"
    _cli.check_output(output, *([".png"] if one_file else []))
    import torch

    from titok.data.images import find_images, grid, psnr, to_uint8, write_png

    paths = find_images(images)
    if one_file and len(paths) > 64:
        raise ValueError(
            f"{output}: expected a folder, because {len(paths)} pictures are too many for one PNG (64)"
        )
    files = iter(_cli.png_names([_cli.picture_name(path, images) for path in paths]))
    model = _cli.load_tokenizer(tokenizer, device, dtype)
    ratios, pairs = [], []
    for batch, pictures in _cli.read_pictures(paths, model, batch_size):
        originals, copies = to_uint8(pictures).cpu(), to_uint8(model.decode(model.encode(pictures))).cpu()
        ratios += psnr(copies, originals).tolist()
        for path, original, copy, ratio in zip(batch, originals, copies, ratios[-len(batch) :], strict=True):
            typer.echo(f"{ratio:6.2f} dB  {_cli.picture_name(path, images)}")
            pair = grid(torch.stack([original, copy]), columns=2)
            if one_file:
                pairs.append(pair)
            else:
                write_png(output / next(files), pair)
    if one_file:
        write_png(output, grid(torch.stack(pairs), gap=8))
    typer.echo(f"{sum(ratios) / len(ratios):6.2f} dB  mean of {len(ratios)}")
    typer.echo(f"{output}: originals left, reconstructions right")


@app.command()
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
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Classes, such as 207,360; one past the last is no class. [default: all]"
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
    dtype: DtypeOption = "float32",
) -> None:
    """Generate pictures of classes.

    Writes a PNG grid, or a .npz with `arr_0` uint8 (N, H, W, C) and `arr_1` int64 labels (N,), or both. A .npz that
    was stopped goes on when the same command is given again; under torchrun, processes share the work.

    \b
    titok generate -t yucornetto/tokenizer_titok_l32_imagenet \\
        -g yucornetto/generator_titok_l32_imagenet --labels 207,360 --per-class 4
    titok generate -t runs/quickstart/tokenizer -g runs/quickstart/generator --num 50000 -o samples.npz
    torchrun --nproc-per-node 8 -m titok generate -t TOKENIZER -g GENERATOR -n 50000 -o samples.npz
    """
    outputs = output or [Path("samples.png")]
    for path in outputs:
        _cli.check_output(path, ".png", ".npz")
    sets = [path for path in outputs if path.suffix == ".npz"]
    grids = [path for path in outputs if path.suffix == ".png"]
    if len(sets) > 1:
        raise ValueError(f"--output: expected one .npz at most, got {len(sets)}")
    rule, size = _cli.rounding_rule(rounding), _cli.batch_size_of(batch_size)
    given = {
        "steps": steps, "guidance_scale": guidance_scale, "guidance_schedule": guidance_schedule,
        "guidance_power": guidance_power, "temperature": temperature, "softmax_annealing": softmax_annealing,
        "mask_schedule": mask_schedule, "confidence": confidence,
    }  # fmt: skip
    import numpy as np
    import torch

    from titok import Pipeline
    from titok.checks import check_labels
    from titok.data.images import grid, write_png
    from titok.generation.sample_sets import generate_set

    decoder = _cli.load_tokenizer(tokenizer, device, dtype)
    pipe = Pipeline(decoder, _cli.load_generator(generator, device, dtype))
    config = pipe.generator.config
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    sampling = dataclasses.replace(config.sampling, **settings)
    wanted = torch.tensor(_classes(labels, per_class, num, config.num_classes))
    check_labels(wanted, config.num_classes)

    if grids and len(wanted) > GRID_LIMIT:
        raise ValueError(f"{grids[0]}: expected {GRID_LIMIT} pictures at most, got {len(wanted)}: write a .npz")
    options: dict[str, Any] = {
        "batch_size": size, "seed": seed, "first_sample": first_sample, "sampling": sampling, "rounding": rule,
    }  # fmt: skip
    with _cli.processes() as (rank, world):
        if world > 1 and not sets:
            raise ValueError("--output: expected a .npz, because several processes generate, got none")
        for path in sets:
            generate_set(pipe, path, wanted, **options)
    if rank > 0:
        return
    if grids and sets:
        pictures = torch.from_numpy(np.load(sets[0])["arr_0"])
    elif grids:
        pictures = torch.stack(list(pipe.generate_many(wanted, **options)))
    for path in grids:
        write_png(path, grid(pictures, columns=per_class))
    for path in outputs:
        typer.echo(f"{path}: {len(wanted)} pictures of {len(wanted.unique())} classes, seed {seed}")


def _classes(labels: str | None, per_class: int | None, num: int | None, num_classes: int) -> list[int]:
    """The class of each picture."""
    if per_class is not None and num is not None:
        raise ValueError("--per-class, --num: expected one of them, got both")
    classes = list(range(num_classes))
    if labels is not None:
        try:
            classes = [int(part) for part in labels.split(",")]
        except ValueError:
            raise ValueError(f"--labels: expected integers with commas between, got {labels!r}") from None
    if per_class is None and num is None:
        num = 16 if labels is None else len(classes)
    if num is not None:
        return [classes[i % len(classes)] for i in range(num)]
    return [label for label in classes for _ in range(per_class or 1)]


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, back ends and presets.

    A back end that cannot run here has its reason beside it.

    \b
    titok info
    titok info --json
    """
    import json

    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        typer.echo(section)
        for name, value in values.items():
            typer.echo(f"  {name:<12} {' '.join(value) if isinstance(value, list) else value}")


def _facts() -> dict[str, dict[str, Any]]:
    import importlib.metadata
    import platform

    import torch

    from titok import __version__, ops
    from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
    from titok.ops.core.available import extension

    versions = {"titok": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    try:
        kernels = f"kernels for {extension().cpu_isa()}"
    except RuntimeError:
        kernels = "no compiled kernels"
    devices = {"cpu": f"{torch.get_num_threads()} threads, {kernels}"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
    presets = {"tokenizers": list(TOKENIZER_PRESETS), "generators": list(GENERATOR_PRESETS)}
    return {"versions": versions, "devices": devices, "backends": dict(ops.backends()), "presets": presets}
