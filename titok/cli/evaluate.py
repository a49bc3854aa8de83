"""`titok evaluate`: the figures that papers report, of reconstructions and of generated pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titok.cli.errors import note, show_progress
from titok.cli.evaluation_record import (
    FeatureDtypeOption,
    FeaturesOption,
    FeatureWeightsOption,
    check_result_file,
    hash_of_file,
    hash_of_model,
    hash_of_pictures,
    left_out,
    load_features,
    load_in_turn,
    write_result,
)
from titok.cli.inputs import load_tokenizer, open_source, preprocessing
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
    select_device,
)

if TYPE_CHECKING:
    import torch

    from titok.evaluation.picture_sets import NpzPictures, SourcePictures
    from titok.training.losses import LPIPSDistance

app: typer.Typer = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

ResultOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .json for the result.")]


@app.command()
def reconstruction(
    images: ImagesArgument,
    tokenizer: TokenizerOption,
    output: ResultOption = Path("reconstruction.json"),
    overwrite: OverwriteOption = False,
    features: FeaturesOption = "inception",
    feature_weights: FeatureWeightsOption = None,
    feature_dtype: FeatureDtypeOption = "float32",
    lpips_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="torchvision's weights of VGG-16 for LPIPS; else a download."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave out distance (and score), ssim or lpips; may be repeated."),
    ] = None,
    skip_unreadable: SkipUnreadableOption = False,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
) -> None:
    """Measure reconstructions: rFID, Inception Score, PSNR, SSIM, LPIPS, codebook usage and entropy.

    The published rFID is that of the 50,000 validation pictures of ImageNet, with --ignore-orientation and
    --ignore-transparency.

    \b
    titok evaluate reconstruction imagenet/val -t yucornetto/tokenizer_titok_l32_imagenet
    titok evaluate reconstruction photos -t runs/tokenizer --features efficientnet --without lpips
    torchrun --nproc-per-node 8 -m titok evaluate reconstruction imagenet/val -t TOKENIZER
    """
    omitted = left_out(without, ("distance", "ssim", "lpips"))
    check_result_file(output, [images, tokenizer], overwrite=overwrite)
    torch_device = select_device(device)
    how = preprocessing(ignore_orientation, ignore_transparency)
    from titok.data.folders import Pictures
    from titok.evaluation.reconstruction import evaluate_reconstruction
    from titok.evaluation.similarity import check_ssim
    from titok.processes import in_first_process, process_group

    with process_group(gpu=torch_device.type == "cuda") as (rank, world):
        if "ssim" not in omitted:
            _or_without("ssim", check_ssim)
        perceptual = None if "lpips" in omitted else _load_lpips(lpips_weights, torch_device)
        extractor = None
        if "distance" not in omitted:
            extractor = _or_without(
                "distance", lambda: load_features(features, feature_weights, feature_dtype, torch_device)
            )
        model = load_in_turn(lambda: load_tokenizer(tokenizer, device, dtype))
        pictures = Pictures(open_source(images), model.config.image_size, model.config.channels, preprocessing=how)
        if skip_unreadable:
            problems = in_first_process(pictures.find_unreadable)
            for problem in problems.values() if rank == 0 else ():
                note(problem)
            pictures.remove(problems)
        result = evaluate_reconstruction(
            model, pictures, extractor=extractor, perceptual=perceptual, with_ssim="ssim" not in omitted,
            batch_size=batch_size, progress=show_progress(),
        )  # fmt: skip
        if rank > 0:
            return
        settings: dict[str, Any] = {
            "tokenizer": tokenizer, "images": str(images), "processes": world, "device": str(torch_device),
            "dtype": model.precision, "batch_size": batch_size,
            "features": None if extractor is None else extractor.name,
            "feature_dtype": None if extractor is None else feature_dtype,
            "inception_score_splits": None if extractor is None else 1,
            "lpips_network": None if perceptual is None else "vgg16",
            "ignore_orientation": ignore_orientation, "ignore_transparency": ignore_transparency,
            "rounding": "nearest", "without": sorted(omitted),
        }  # fmt: skip
        hashes: dict[str, Any] = {
            "tokenizer": hash_of_model(model), "reference": hash_of_pictures(pictures.paths),
            "features": getattr(extractor, "weights_hash", None),
        }  # fmt: skip
        write_result(
            output, "titok evaluate reconstruction", figures=result.figures, counts=result.counts, settings=settings,
            hashes=hashes, warnings=result.warnings,
        )  # fmt: skip


@app.command()
def samples(
    samples: Annotated[
        Path,
        typer.Argument(metavar="SAMPLES", help="A .npz of generated pictures, as `titok generate` writes it."),
    ],
    reference: Annotated[
        Path,
        typer.Option(
            "--reference", "-r", metavar="PATH", help="A .npz of ADM with pictures and statistics, or a folder."
        ),
    ],
    output: ResultOption = Path("samples.json"),
    overwrite: OverwriteOption = False,
    features: FeaturesOption = "inception",
    feature_weights: FeatureWeightsOption = None,
    feature_dtype: FeatureDtypeOption = "float32",
    without: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Leave out precision (and recall).")
    ] = None,
    ignore_orientation: IgnoreOrientationOption = False,
    ignore_transparency: IgnoreTransparencyOption = False,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Compare generated pictures with real ones: FID, sFID, Inception Score, precision and recall, as ADM does.

    Statistics in a reference .npz (mu, sigma, mu_s, sigma_s) take the place of those of its pictures.

    \b
    titok evaluate samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    titok evaluate samples samples.npz --reference photos --features efficientnet
    torchrun --nproc-per-node 8 -m titok evaluate samples samples.npz -r VIRTUAL_imagenet256_labeled.npz
    """
    omitted = left_out(without, ("precision",))
    check_result_file(output, [samples, reference], overwrite=overwrite)
    torch_device = select_device(device)
    from titok.evaluation.picture_sets import NpzPictures, SourcePictures
    from titok.evaluation.samples import NEIGHBOURS, SPLIT_SIZE, evaluate_samples
    from titok.processes import process_group

    generated = NpzPictures(samples)
    real: NpzPictures | SourcePictures
    if reference.suffix.lower() == ".npz":
        real = NpzPictures(reference)
    else:
        how = preprocessing(ignore_orientation, ignore_transparency)
        real = SourcePictures(open_source(reference), generated.size, how)
    with process_group(gpu=torch_device.type == "cuda") as (rank, world):
        extractor = load_features(features, feature_weights, feature_dtype, torch_device)
        result = evaluate_samples(
            generated, real, extractor, with_precision="precision" not in omitted, batch_size=batch_size,
            progress=show_progress(),
        )  # fmt: skip
        if rank > 0:
            return
        settings: dict[str, Any] = {
            "samples": str(samples), "reference": str(reference), "processes": world, "device": str(torch_device),
            "batch_size": batch_size, "features": extractor.name, "feature_dtype": feature_dtype,
            "reference_statistics": sorted(getattr(real, "statistics", {})), "neighbours": NEIGHBOURS,
            "inception_score_split": SPLIT_SIZE, "ignore_orientation": ignore_orientation,
            "ignore_transparency": ignore_transparency, "without": sorted(omitted),
        }  # fmt: skip
        hashes: dict[str, Any] = {
            "samples": hash_of_file(samples), "features": getattr(extractor, "weights_hash", None),
            "reference": (
                hash_of_file(reference) if isinstance(real, NpzPictures) else hash_of_pictures(real.images.paths)
            ),
        }  # fmt: skip
        write_result(
            output, "titok evaluate samples", figures=result.figures, counts=result.counts, settings=settings,
            hashes=hashes, warnings=result.warnings,
        )  # fmt: skip


def _load_lpips(weights: Path | None, device: torch.device) -> LPIPSDistance:
    """LPIPS on VGG-16, as the training uses it."""
    from titok.training.losses import lpips_distance

    return _or_without("lpips", lambda: load_in_turn(lambda: lpips_distance(weights)).to(device))


def _or_without(name: str, load: Any) -> Any:
    """The result of `load`. Where a package is missing, the error says how to do without."""
    try:
        return load()
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{error} (the extra titok-kernels[eval] has all that evaluation needs); --without {name} leaves it out",
            name=error.name,
        ) from error
