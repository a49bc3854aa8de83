"""`titok probe`: how well a linear classifier reads classes from a tokenizer's frozen features."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titok.cli.errors import show_progress
from titok.cli.evaluation_record import (
    check_result_file,
    hash_of_model,
    hash_of_pictures,
    load_in_turn,
    write_result,
)
from titok.cli.inputs import image_folder, load_tokenizer, preprocessing
from titok.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    OverwriteOption,
    SkipUnreadableOption,
    TokenizerOption,
    select_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from titok import TiTok
    from titok.data.folders import Pictures


def probe(
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures; every sub-folder is a class.")],
    tokenizer: TokenizerOption,
    held_out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|SHARE",
            help="Pictures to test on, in the same sub-folders; or a share such as 0.1, chosen by a hash of names.",
        ),
    ] = "0.1",
    features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="latents, last_block (mean over the tokens) or last_block_tokens (K times the memory); may be "
            "repeated. [default: the first two]",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .json for the result.")] = Path(
        "probe.json"
    ),
    overwrite: OverwriteOption = False,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Of the classifier.")] = 90,
    warmup_epochs: Annotated[int, typer.Option(metavar="N", min=0, help="In which its learning rate rises.")] = 10,
    probe_batch_size: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Pictures in a step of the classifier; all where there are fewer."),
    ] = 16384,
    base_rate: Annotated[
        float, typer.Option(metavar="X", help="Learning rate of LARS for a batch of 256, scaled with the batch.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the classifier.")] = 0,
    flip: Annotated[bool, typer.Option(help="Learn from mirrored pictures too.")] = True,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Train a linear classifier on frozen features of a tokenizer, after the protocol of MAE.

    By default two features are tried: the latents (K x C values), and the encoder's last block, averaged over the
    latent tokens. Which the paper used is not known. Small sets of pictures need a higher --base-rate.

    \b
    titok probe imagenet/train -t TOKENIZER --held-out imagenet/val
    titok probe photos -t runs/tokenizer --held-out 0.2 --base-rate 10
    torchrun --nproc-per-node 8 -m titok probe imagenet/train -t TOKENIZER --held-out imagenet/val
    """
    share = _as_share(held_out)
    inputs: list[Path | str] = [images, tokenizer, *([held_out] if share is None else [])]
    check_result_file(output, inputs, overwrite=overwrite)
    torch_device = select_device(device)
    how = preprocessing(ignore_orientation, ignore_transparency)
    from titok.data.folders import ImageFolder
    from titok.evaluation.probe import (
        FEATURES,
        USUAL_FEATURES,
        ProbeData,
        ProbeSettings,
        encode_for_probe,
        train_probe,
    )
    from titok.processes import in_first_process, process_group

    settings = ProbeSettings(
        epochs=epochs, warmup_epochs=warmup_epochs, batch_size=probe_batch_size, base_rate=base_rate, seed=seed
    )

    def pictures_of(folder: Path, model: TiTok) -> Pictures:
        size, channels = model.config.image_size, model.config.channels
        if skip_unreadable:  # reads every picture once more
            return image_folder(folder, size, channels, how, skip_unreadable=True)
        return ImageFolder(folder, size, channels, preprocessing=how)

    with process_group(gpu=torch_device.type == "cuda") as (rank, world):
        model = load_in_turn(lambda: load_tokenizer(tokenizer, device, dtype))
        folder = pictures_of(images, model)
        common: dict[str, Any] = {"batch_size": batch_size, "progress": show_progress()}
        names = tuple(dict.fromkeys(features or USUAL_FEATURES))
        encoded = encode_for_probe(model, folder, folder.labels, features=names, flip=flip, **common)
        tested: dict[str, ProbeData] | None = None
        paths = list(folder.paths)
        if share is None:
            others = pictures_of(Path(held_out), model)
            if others.classes != folder.classes:
                raise ValueError(
                    f"--held-out: expected the sub-folders of {images} in {held_out}, got other names"
                )
            tested = encode_for_probe(model, others, others.labels, features=names, flip=False, **common)
            paths += others.paths
        elif encoded is not None:
            encoded, tested = _split(encoded, folder, share)

        def train() -> dict[str, float]:
            figures = {}
            for name in names:
                result = train_probe(
                    (encoded or {})[name], (tested or {})[name], settings,
                    device=torch_device, progress=show_progress(),
                )  # fmt: skip
                figures[f"{name}_top1"], figures[f"{name}_top5"] = result
            return figures

        figures = in_first_process(train)
        if rank > 0 or encoded is None or tested is None:
            return
        one, other = encoded[names[0]], tested[names[0]]
        counts = {"training": len(one.labels), "held_out": len(other.labels), "classes": len(folder.classes)}
        described: dict[str, Any] = {
            "tokenizer": tokenizer, "images": str(images), "held_out": held_out, "processes": world,
            "device": str(torch_device), "dtype": model.precision, "flip": flip,
            "features": {name: FEATURES[name] for name in names}, "ignore_orientation": ignore_orientation,
            "ignore_transparency": ignore_transparency, **dataclasses.asdict(settings),
        }  # fmt: skip
        found = []
        steps = epochs * max(1, len(one.labels) // probe_batch_size)
        if steps < 1000 and base_rate <= 0.1:
            found.append(
                f"{steps} steps at MAE's learning rate are few: the classifier may not have learnt to the end"
            )
        write_result(
            output, "titok probe", figures=figures, counts=counts, settings=described, warnings=found,
            hashes={"tokenizer": hash_of_model(model), "pictures": hash_of_pictures(paths)},
        )  # fmt: skip


def _as_share(text: str) -> float | None:
    """The value of --held-out as a number, or None where it is a folder.

    Raises:
        ValueError: a number that is not between 0 and 1.
    """
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(f"--held-out: expected a folder, or a share between 0 and 1, got {text}")
    return share


def _split(encoded: dict[str, Any], folder: Pictures, share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features to train on and to be tested on. Raises `ValueError` where one of the two would be empty."""
    from titok.evaluation.held_out import held_out_by_name

    chosen = held_out_by_name(folder.names, share)
    if chosen.all() or not chosen.any():
        raise ValueError(f"--held-out: expected a share that leaves pictures on both sides, got {share}")
    training, tested = {}, {}
    for name, data in encoded.items():

        def rows(tensor: Tensor | None, which: Tensor) -> Tensor | None:
            return None if tensor is None else tensor[which]

        training[name] = data._replace(
            features=data.features[~chosen], mirrored=rows(data.mirrored, ~chosen), labels=data.labels[~chosen]
        )
        tested[name] = data._replace(features=data.features[chosen], mirrored=None, labels=data.labels[chosen])
    return training, tested
