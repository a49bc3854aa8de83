"""`titok train`: a tokenizer or a generator from scratch, on a folder of pictures.

The output folder is locked first. Every picture is read once before training starts, so that a damaged one is found
then. The defaults describe small
models for small pictures, trained as the quickstart trains its models.
`titok.training` has settings that these commands do not offer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from titok.cli.errors import say
from titok.cli.inputs import image_folder, load_tokenizer, preprocessing
from titok.cli.options import (
    DeviceOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    SkipUnreadableOption,
    TokenizerOption,
    select_device,
)
from titok.cli.outputs import check_apart, check_files, check_output

RUN_FILES = ("training.safetensors", "model.safetensors", "config.json")  # the first is the checkpoint of the run

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures; every sub-folder is a class.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="For the model and the checkpoint of the run.")
]
Width = Annotated[
    int, typer.Option(metavar="N", help="Of the transformer, a multiple of 64 (the width of a head).")
]
Steps = Annotated[int, typer.Option(metavar="N", min=2, help="Optimizer steps.")]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Pictures in a step.")]
LearningRate = Annotated[
    float, typer.Option(metavar="X", help="The highest: a warm-up leads to it, a cosine down.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Same seed and pictures, same model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in the output folder was stopped.")]


def _num_heads(width: int) -> int:
    """Attention heads of 64 channels each; `ValueError` where `width` is not a multiple of 64."""
    if width < 64 or width % 64:
        raise ValueError(f"--width: expected a multiple of 64, got {width}")
    return width // 64


@app.command()
def tokenizer(
    images: Folder,
    output: Output = Path("runs/tokenizer"),
    image_size: Annotated[int, typer.Option(metavar="N", help="Side of the pictures in pixels.")] = 64,
    patch_size: Annotated[int, typer.Option(metavar="N", help="Side of a patch in pixels.")] = 8,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a picture.")] = 32,
    codebook_size: Annotated[int, typer.Option(metavar="N", help="Codes that a token can be.")] = 1024,
    grey: Annotated[bool, typer.Option("--grey", help="One channel in place of three.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror pictures at random.")] = False,
    width: Width = 256,
    layers: Annotated[int, typer.Option(metavar="N", help="Of the encoder and of the decoder.")] = 4,
    steps: Steps = 10_000,
    batch_size: BatchSize = 32,
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    resume: Resume = False,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a single-stage tokenizer: pixels to tokens to pixels.

    \b
    titok train tokenizer photos -o runs/tokenizer --image-size 64 --tokens 32
    titok train tokenizer photos -o runs/tokenizer --image-size 64 --tokens 32 --resume
    """
    _check_run_folder(output, [images])
    heads = _num_heads(width)
    from titok import TokenizerConfig, ViTConfig
    from titok.training import TokenizerTraining, train_tokenizer
    from titok.training.folder import RunFolder

    transformer = ViTConfig(width, layers, heads, patch_size)
    model = TokenizerConfig(
        image_size=(image_size, image_size),
        encoder=transformer,
        decoder=transformer,
        num_latent_tokens=tokens,
        code_dim=12,
        codebook_size=codebook_size,
        channels=1 if grey else 3,
        l2_normalize=True,
        signed_pixels=True,
    )
    training = TokenizerTraining(
        model=model,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        final_learning_rate=learning_rate / 50,
        warmup_steps=steps // 20,
        seed=seed,
        random_flip=flip,
    )
    how = preprocessing(ignore_orientation, ignore_transparency)
    torch_device = select_device(device)
    with RunFolder(output, resume=resume) as folder:
        pictures = image_folder(images, model.image_size, model.channels, how, skip_unreadable=skip_unreadable)
        train_tokenizer(pictures, training, folder, device=torch_device)
        figures = _last_figures(output)
    say(f"{output}: a tokenizer of {len(pictures)} pictures, {tokens} tokens each, {figures}")


@app.command()
def generator(
    images: Folder,
    tokenizer: TokenizerOption,
    output: Output = Path("runs/generator"),
    flip: Annotated[bool, typer.Option("--flip", help="Learn from mirrored pictures too.")] = False,
    width: Width = 256,
    layers: Annotated[int, typer.Option(metavar="N", help="Of the transformer.")] = 8,
    steps: Steps = 10_000,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    resume: Resume = False,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Train a MaskGIT on a tokenizer's tokens. Sub-folders, sorted, are classes 0, 1, 2, ...: see classes.json.

    \b
    titok train generator photos -t runs/tokenizer -o runs/generator
    """
    _check_run_folder(output, [images, tokenizer])
    heads = _num_heads(width)
    from titok import GeneratorConfig, SamplingConfig
    from titok.checkpoints.files import write_json
    from titok.training import GeneratorTraining, tokenize_images, train_generator
    from titok.training.folder import RunFolder

    how = preprocessing(ignore_orientation, ignore_transparency)
    with RunFolder(output, resume=resume) as folder:
        model = load_tokenizer(tokenizer, device, "float32")
        size, channels = model.config.image_size, model.config.channels
        pictures = image_folder(images, size, channels, how, skip_unreadable=skip_unreadable)
        config = GeneratorConfig(
            num_latent_tokens=model.config.num_latent_tokens,
            codebook_size=model.config.codebook_size,
            num_classes=len(pictures.classes),
            width=width,
            layers=layers,
            heads=heads,
            mlp_width=4 * width,
            sampling=SamplingConfig(
                guidance_scale=0.0,
                guidance_schedule="constant",
                temperature=4.5,
                softmax_annealing=False,
                confidence="maskgit",
            ),
        )
        training = GeneratorTraining(
            model=config,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            final_learning_rate=learning_rate / 50,
            warmup_steps=steps // 20,
            seed=seed,
        )
        rows = tokenize_images(model, pictures, flip=flip)
        train_generator(rows, pictures.labels, training, folder, device=model.device)
        write_json(output / "classes.json", pictures.classes)
        figures = _last_figures(output)
    say(f"{output}: a generator of {len(pictures.classes)} classes, {figures}")


def _check_run_folder(output: Path, inputs: list[Path | str]) -> None:
    """Checks that a run may write into the folder `output`, which must be apart from `inputs`.

    Raises:
        ValueError, OSError: it may not, or `output` holds a model of which no run is there.
    """
    check_output(output)
    check_apart(output, inputs)
    check_files([output / name for name in RUN_FILES], overwrite=True)
    models = [output / name for name in RUN_FILES[1:] if (output / name).exists()]
    if models and not (output / RUN_FILES[0]).exists():
        raise ValueError(
            f"{models[0]}: exists already, and no training run is there: remove it, or choose another folder"
        )
    from titok.processes import check_one_process

    check_one_process()


def _last_figures(folder: Path) -> str:
    """The last entry of `metrics.jsonl` in `folder`, as text."""
    from titok.training.metrics import SPEED, read_metrics

    entries = read_metrics(folder)
    if not entries:
        return "no figures yet"
    return ", ".join(f"{name} {value:.4g}" for name, value in entries[-1].items() if name not in SPEED)
