"""What `titok evaluate` and `titok probe` have in common: loading in several processes, and the JSON of results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from titok.cli.errors import note, say
from titok.cli.outputs import check_apart, check_files, check_output

if TYPE_CHECKING:
    import torch

    from titok.evaluation.features import FeatureExtractor

T = TypeVar("T")

PACKAGES = ("torch", "numpy", "pillow", "torchvision", "torchmetrics", "lpips", "efficientnet-lite-pytorch")

FeaturesOption = Annotated[
    str,
    typer.Option(
        "--features",
        metavar="NAME",
        help="inception (for FID), efficientnet (a distance of another name), or MODULE:FUNCTION of your own.",
    ),
]
FeatureWeightsOption = Annotated[
    Path | None,
    typer.Option("--feature-weights", metavar="FILE", help="Weights of --features; else its own, or a download."),
]
FeatureDtypeOption = Annotated[
    str,
    typer.Option(
        "--feature-dtype", metavar="DTYPE", help="float32 or float64, in which the features are computed."
    ),
]


def check_result_file(path: Path, inputs: list[Path | str], *, overwrite: bool) -> None:
    """Checks --output before the work: a .json that does not exist, or may be replaced, apart from all inputs."""
    check_output(path, ".json")
    check_apart(path, inputs)
    check_files([path], overwrite=overwrite)


def load_in_turn(load: Callable[[], T]) -> T:
    """Calls `load` in the first process, which may download something, and then in the others."""
    from titok.processes import in_first_process, own_part

    loaded: list[T] = []
    in_first_process(lambda: loaded.append(load()))
    return loaded[0] if own_part()[0] == 0 else load()


def load_features(name: str, weights: Path | None, dtype: str, device: torch.device) -> FeatureExtractor:
    """The extractor that --features, --feature-weights and --feature-dtype ask for.

    Raises:
        ValueError: there is no such extractor or dtype.
        ModuleNotFoundError: a package is missing.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"--feature-dtype: expected float32 or float64, got {dtype!r}")
    import torch

    from titok.evaluation.features import load_extractor

    return load_in_turn(lambda: load_extractor(name, weights, device=device, dtype=getattr(torch, dtype)))


def left_out(names: list[str] | None, known: tuple[str, ...]) -> set[str]:
    """The values of --without.

    Raises:
        ValueError: an unknown one.
    """
    for name in names or ():
        if name not in known:
            raise ValueError(f"--without: expected {' or '.join(known)}, got {name!r}")
    return set(names or ())


def hash_of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of_pictures(paths: list[Path]) -> dict[str, str]:
    """Hashes of picture files, as a training run records them."""
    from types import SimpleNamespace

    from titok.training.fingerprint import of_images

    return of_images(SimpleNamespace(paths=paths))


def hash_of_model(model: Any) -> str:
    """A hash of a model's weights, which does not depend on how they are prepared for inference."""
    from titok.evaluation.features import hash_of_tensors
    from titok.inference.prepared_weights import readable

    return hash_of_tensors({name: readable(weight) for name, weight in model.named_parameters()})


def write_result(
    path: Path,
    command: str,
    *,
    figures: Mapping[str, Any],
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    hashes: Mapping[str, Any],
    warnings: list[str],
) -> None:
    """Prints the figures and warnings, and writes the JSON file. The first process calls it, when all is done."""
    from titok.checkpoints.files import write_json

    for warning in warnings:
        note(f"WARNING: {warning}")
    for name, value in figures.items():
        say(f"{name:<28} {value:.6g}" if isinstance(value, float) else f"{name:<28} {value}")
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in figures.items()}
    write_json(
        path,
        {
            "command": command,
            "figures": finite,
            "counts": dict(counts),
            "settings": dict(settings),
            "warnings": warnings,
            "hashes": dict(hashes),
            "versions": _versions(),
        },
    )
    say(f"{path}: figures, settings, versions and hashes")


def _versions() -> dict[str, str]:
    """Of titok, Python and those of the packages that are installed."""
    import importlib.metadata
    import platform

    from titok import __version__

    versions = {"titok": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
