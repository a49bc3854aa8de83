"""`titok train`: every model of TiTok, on a folder of pictures.

The output folder is locked first. Every picture is read once before training starts, so that a damaged one is found
then. Without `--preset` and `--config`, the settings describe small models for small pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titok.cli.errors import is_quiet, say
from titok.cli.inputs import load_tokenizer, tokenize_source
from titok.cli.options import select_device
from titok.cli.outputs import check_apart, check_files, check_output
from titok.cli.training_options import (
    Common,
    Folder,
    Output,
    ProxyOption,
    Width,
    with_common_options,
)

if TYPE_CHECKING:
    import torch

    from titok import MaskGIT, TiTok
    from titok.training.folder import RunFolder

RUN_FILES = ("training.safetensors", "model.safetensors", "config.json")  # the first is the checkpoint of the run

app: typer.Typer = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
@with_common_options()
def vqgan(
    images: Folder,
    output: Output = Path("runs/vqgan"),
    *,
    common: Common,
) -> None:
    """Train a MaskGIT-VQGAN, the 2D tokenizer that the two stages of TiTok start from.

    \b
    titok train vqgan photos -o runs/vqgan --held-out others
    """

    def train(settings: Any, folder: RunFolder, torch_device: torch.device) -> str:
        from titok import MaskGITVQGAN
        from titok.training import train_vqgan

        size, channels = settings.image_size, settings.model.channels
        initial = None if common.init is None else MaskGITVQGAN.from_pretrained(common.init)
        pictures, options = common.data(images, output, size, channels)
        train_vqgan(pictures, settings, folder, initial=initial, device=torch_device, **options)
        return f"a MaskGIT-VQGAN of {len(pictures)} pictures"

    _run(common, output, "vqgan", [images], train)


@app.command()
@with_common_options()
def proxy(
    images: Folder,
    proxy: ProxyOption,
    output: Output = Path("runs/proxy"),
    *,
    common: Common,
) -> None:
    """Train stage 1 of a tokenizer: tokens to the codes of a MaskGIT-VQGAN.

    \b
    titok train proxy photos -p runs/vqgan -o runs/proxy
    """

    def train(settings: Any, folder: RunFolder, torch_device: torch.device) -> str:
        from titok import MaskGITVQGAN, TiTok
        from titok.training import train_proxy

        size, channels = settings.model.image_size, settings.model.channels
        initial = None if common.init is None else TiTok.from_pretrained(common.init)
        vqgan = MaskGITVQGAN.from_pretrained(proxy)
        pictures, options = common.data(images, output, size, channels)
        train_proxy(pictures, vqgan, settings, folder, initial=initial, device=torch_device, **options)
        return f"stage 1 of a tokenizer of {len(pictures)} pictures"

    _run(common, output, "proxy", [images, proxy], train)


@app.command()
@with_common_options("init")
def decoder(
    images: Folder,
    proxy: ProxyOption,
    first: Annotated[
        str, typer.Option("--first", "-f", metavar="MODEL", help="Stage 1, or a whole tokenizer to be fine-tuned.")
    ],
    output: Output = Path("runs/tokenizer"),
    *,
    common: Common,
) -> None:
    """Train stage 2 of a tokenizer: its decoder and the decoder of the MaskGIT-VQGAN together.

    \b
    titok train decoder photos -f runs/proxy -p runs/vqgan -o runs/tokenizer
    """

    def train(settings: Any, folder: RunFolder, torch_device: torch.device) -> str:
        from titok import MaskGITVQGAN, TiTok
        from titok.training import train_decoder

        size, channels = settings.model.image_size, settings.model.channels
        stage, vqgan = TiTok.from_pretrained(first), MaskGITVQGAN.from_pretrained(proxy)
        pictures, options = common.data(images, output, size, channels)
        train_decoder(pictures, stage, vqgan, settings, folder, device=torch_device, measure=_figures, **options)
        return f"a tokenizer of {len(pictures)} pictures, {settings.model.num_latent_tokens} tokens each"

    _run(common, output, "decoder", [images, proxy, first], train)


@app.command()
@with_common_options()
def tokenizer(
    images: Folder,
    output: Output = Path("runs/tokenizer"),
    image_size: Annotated[
        int | None, typer.Option(metavar="N", help="Side of the pictures in pixels (64).")
    ] = None,
    patch_size: Annotated[int | None, typer.Option(metavar="N", help="Side of a patch in pixels (8).")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a picture (32).")] = None,
    codebook_size: Annotated[
        int | None, typer.Option(metavar="N", help="Codes that a token can be (1024).")
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="One channel in place of three.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror pictures at random.")] = False,
    width: Width = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Of the encoder and of the decoder (4).")] = None,
    *,
    common: Common,
) -> None:
    """Train a single-stage tokenizer: pixels to tokens to pixels.

    \b
    titok train tokenizer photos -o runs/tokenizer --image-size 64 --tokens 32
    titok train tokenizer photos -o runs/tokenizer --image-size 64 --tokens 32 --resume
    torchrun --nproc-per-node 8 -m titok train tokenizer photos --preset titok-bl-64-vq8k
    """

    def train(settings: Any, folder: RunFolder, torch_device: torch.device) -> str:
        from titok import TiTok
        from titok.training import train_tokenizer

        model = settings.model
        initial = None if common.init is None else TiTok.from_pretrained(common.init)
        pictures, options = common.data(images, output, model.image_size, model.channels)
        train_tokenizer(
            pictures, settings, folder, initial=initial, device=torch_device, measure=_figures, **options
        )
        return f"a tokenizer of {len(pictures)} pictures, {model.num_latent_tokens} tokens each"

    sizes = {
        "image_size": image_size, "patch_size": patch_size, "tokens": tokens, "codebook_size": codebook_size,
        "grey": grey or None, "width": width, "layers": layers,
    }  # fmt: skip
    _run(common, output, "tokenizer", [images], train, sizes, {"random_flip": flip or None})


@app.command()
@with_common_options("held_out", "hold_out")
def generator(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="TOKENS|IMAGES",
            help="What `titok tokenize` wrote (.tokens or .jsonl); or pictures to tokenise first.",
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", "-t", metavar="MODEL", help="Of the tokens; for pictures, and to show samples."
        ),
    ] = None,
    output: Output = Path("runs/generator"),
    flip: Annotated[bool, typer.Option("--flip", help="Learn from mirrored pictures too.")] = False,
    width: Width = None,
    layers: Annotated[int | None, typer.Option(metavar="N", help="Of the transformer (8).")] = None,
    *,
    common: Common,
) -> None:
    """Train a MaskGIT on a tokenizer's tokens. Sub-folders, sorted, are classes 0, 1, 2, ...: see classes.json.

    Pictures are tokenised first, into the folder `training.tokens` of the run.

    \b
    titok train generator photos -t runs/tokenizer -o runs/generator
    titok train generator photos.tokens -o runs/generator
    """

    def train(settings: Any, folder: RunFolder, torch_device: torch.device) -> str:
        from titok import MaskGIT
        from titok.checkpoints.files import write_json
        from titok.data.token_sets import is_token_set, open_tokens
        from titok.processes import in_first_process
        from titok.training import train_generator

        model = None if tokenizer is None else load_tokenizer(tokenizer, str(torch_device), "float32")
        if is_token_set(images):
            if flip:
                raise ValueError(f"--flip: expected pictures, got tokens: {images}")
            tokens = open_tokens(images)
        elif model is None:
            raise ValueError(f"--tokenizer: expected the tokenizer for the pictures in {images}, got none")
        else:
            pictures = common.pictures(images, model.config.image_size, model.config.channels)
            place, copies = output / "training.tokens", "evaluation-and-mirror" if flip else "none"
            tokenize_source(model, pictures, place, copies, pictures.preprocessing)
            tokens = open_tokens(place)
        if model is not None:
            tokens.check(model)
        # What the tokens decide. A .jsonl does not tell the size of the codebook.
        of_data: dict[str, Any] = {
            "num_latent_tokens": tokens.tokens.shape[-1],
            "num_classes": len(tokens.classes),
        }
        codes = tokens.info.get("codebook_size") or (model and model.config.codebook_size)
        of_data |= {"codebook_size": codes} if codes else {}
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **of_data))
        initial = None if common.init is None else MaskGIT.from_pretrained(common.init)
        train_generator(
            tokens.tokens, tokens.labels, settings, folder, initial=initial,
            samples=None if model is None else _samples_of(model),
            device=torch_device, trackers=common.trackers(output), progress=not is_quiet(),
        )  # fmt: skip
        in_first_process(lambda: write_json(output / "classes.json", tokens.classes))
        return f"a generator of {len(tokens.classes)} classes"

    inputs: list[Path | str] = [images] if tokenizer is None else [images, tokenizer]
    _run(common, output, "generator", inputs, train, {"width": width, "layers": layers})


def _figures(tokenizer: TiTok, images: Any) -> dict[str, float]:
    """The figures of a tokenizer on images, which all processes share."""
    from titok.evaluation.reconstruction import evaluate_reconstruction

    return evaluate_reconstruction(tokenizer, images, progress=False).figures


def _samples_of(tokenizer: TiTok) -> Callable[[MaskGIT], torch.Tensor]:
    """A function that generates images of the first classes, one row each, always from the same seed."""

    def samples(generator: MaskGIT) -> torch.Tensor:
        import torch

        from titok import sample_tokens

        classes = torch.arange(min(8, generator.config.num_classes))
        tokens = sample_tokens(generator, classes.repeat_interleave(8).to(generator.device), seed=0)
        return tokenizer.decode(tokens).float().clamp(0, 1).unflatten(0, (len(classes), 8))

    return samples


def _run(
    common: Common,
    output: Path,
    recipe: str,
    inputs: list[Path | str],
    train: Callable[[Any, RunFolder, torch.device], str],
    model: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> None:
    """Trains by a recipe in the locked output folder, in all processes that a launcher has started.

    Args:
        inputs: folders and models that are read, which the output must be apart from.
        train: takes the settings, the folder and the device, and returns what was made, in words.
        model, more: changes of the settings, see `Common.settings`.
    """
    if common.print_config:
        say(json.dumps(common.settings(recipe, model or {}, more).to_dict(), indent=2))
        return
    check_output(output)
    check_apart(output, inputs)
    check_files([output / name for name in RUN_FILES], overwrite=True)
    models = [output / name for name in RUN_FILES[1:] if (output / name).exists()]
    if models and not (output / RUN_FILES[0]).exists():
        raise ValueError(
            f"{models[0]}: exists already, and no training run is there: remove it, or choose another folder"
        )
    settings = common.settings(recipe, model or {}, more)
    device = select_device(common.device)
    from titok.processes import process_group
    from titok.training.folder import RunFolder

    with process_group(gpu=device.type == "cuda") as (rank, _), RunFolder(output, resume=common.resume) as folder:
        made = train(settings, folder, device)
        figures = _last_figures(output)
    if rank == 0:
        say(f"{output}: {made}, {figures}")


def _last_figures(folder: Path) -> str:
    """The last entry of `metrics.jsonl` in `folder`, as text."""
    from titok.training.metrics import SPEED, read_metrics

    entries = read_metrics(folder)
    if not entries:
        return "no figures yet"
    return ", ".join(f"{name} {value:.4g}" for name, value in entries[-1].items() if name not in SPEED)
