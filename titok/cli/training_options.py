"""The options of `titok train`, and the settings of a run that they describe."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titok.cli.errors import is_quiet
from titok.cli.inputs import SourceOptions, image_folder, preprocessing
from titok.cli.options import (
    ClassesOption,
    DeviceOption,
    IgnoreOrientationOption,
    IgnoreTransparencyOption,
    IndexOption,
    LabelsOption,
    SkipUnreadableOption,
)

if TYPE_CHECKING:
    from titok.data.folders import Pictures
    from titok.training import TrainingConfig
    from titok.training.metrics import Tracker

Folder = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES", help="A folder whose sub-folders are classes; .tar shards; hf:FOLDER, hf:NAME:SPLIT."
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="For the model and the checkpoint of the run.")
]
Width = Annotated[
    int | None, typer.Option(metavar="N", help="Of the transformer, a multiple of 64 (the width of a head).")
]
Steps = Annotated[int | None, typer.Option(metavar="N", min=2, help="Optimizer steps.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", min=1, help="Pictures in a step.")]
LearningRate = Annotated[
    float | None, typer.Option(metavar="X", help="The highest: a warm-up leads to it, a cosine down.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Same seed and pictures, same model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in the output folder was stopped.")]
Preset = Annotated[
    str,
    typer.Option(
        "--preset", metavar="NAME", help="small, or a published model, such as titok-l-32: see the docs."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings, as --print-config prints them.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, such as ema_decay=0.99; repeatable."),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the settings as JSON, and end.")]
HeldOut = Annotated[
    Path | None,
    typer.Option("--held-out", metavar="FOLDER", help="Pictures to show and to measure while training."),
]
HoldOut = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Hold out this share of the pictures instead, by a hash of their names."),
]
Init = Annotated[
    str | None,
    typer.Option("--init", metavar="MODEL", help="Start from the weights of a model, ours or official."),
]
Log = Annotated[
    list[str] | None,
    typer.Option("--log", metavar="TRACKER", help="tensorboard or wandb, beside metrics.jsonl; repeatable."),
]
ProxyOption = Annotated[
    str, typer.Option("--proxy", "-p", metavar="MODEL", help="The MaskGIT-VQGAN whose codes are predicted.")
]


@dataclasses.dataclass(frozen=True)
class Common:
    """The options that every command has. The names of the fields are those of the options."""

    preset: Preset = "small"
    config: ConfigFile = None
    changes: Changes = None
    print_config: PrintConfig = False
    init: Init = None
    steps: Steps = None
    batch_size: BatchSize = None
    learning_rate: LearningRate = None
    seed: Seed = 0
    resume: Resume = False
    held_out: HeldOut = None
    hold_out: HoldOut = None
    log: Log = None
    skip_unreadable: SkipUnreadableOption = False
    ignore_orientation: IgnoreOrientationOption = False
    ignore_transparency: IgnoreTransparencyOption = False
    classes: ClassesOption = None
    labels: LabelsOption = None
    index: IndexOption = None
    device: DeviceOption = "auto"

    def settings(self, recipe: str, model: dict[str, Any], more: dict[str, Any] | None = None) -> TrainingConfig:
        """The settings of a run: of the preset or the file, with the changes that the options make.

        Args:
            model: changes of the model's settings, by options that describe a small one.
            more: further changes of settings.
        """
        from titok.checkpoints.files import read_json
        from titok.training.presets import RECIPES, SMALL, preset, with_changes

        if self.config is not None:
            config = RECIPES[recipe].from_dict(read_json(self.config))
        else:
            config = preset(recipe, self.preset)
        named = {name: value for name, value in model.items() if value is not None}
        if named and (self.config is not None or self.preset != SMALL):
            raise ValueError(
                f"--{next(iter(named)).replace('_', '-')}: expected a small model; change a preset or file by --set"
            )
        changes: dict[str, Any] = {"seed": self.seed} if self.seed or self.config is None else {}
        changes |= {name: value for name, value in (more or {}).items() if value is not None}
        if self.batch_size is not None:
            changes |= {"batch_size": self.batch_size, "micro_batch_size": None}
        if self.steps is not None:
            changes |= {"steps": self.steps, "warmup_steps": min(config.warmup_steps, self.steps // 20)}
        if self.learning_rate is not None:
            changes |= {
                "learning_rate": self.learning_rate,
                "final_learning_rate": self.learning_rate
                * (config.final_learning_rate / config.learning_rate if config.learning_rate else 0),
            }
        config = dataclasses.replace(config, **changes)
        if named:
            config = dataclasses.replace(config, model=small_model(recipe, config, named))  # type: ignore[call-arg]
        return with_changes(config, self.changes or [])

    def pictures(self, images: Path, size: Any, channels: int) -> Pictures:
        """The pictures to train on, each of which was read once."""
        how = preprocessing(self.ignore_orientation, self.ignore_transparency)
        options = SourceOptions(self.classes, self.labels, self.index)
        return image_folder(images, size, channels, how, skip_unreadable=self.skip_unreadable, options=options)

    def data(self, images: Path, output: Path, size: Any, channels: int) -> tuple[Pictures, dict[str, Any]]:
        """The pictures to train on, and the options of a training function that show what it does."""
        if self.held_out is not None and self.hold_out is not None:
            raise ValueError("--hold-out: expected it without --held-out, which names the pictures already")
        pictures = self.pictures(images, size, channels)
        held_out = None
        if self.held_out is not None:
            # The options that say how the pictures are found are those of the training pictures.
            plain = dataclasses.replace(self, classes=None, labels=None, index=None)
            held_out = plain.pictures(self.held_out, size, channels)
        if self.hold_out is not None:
            from titok.evaluation.held_out import held_out_by_name

            is_held_out, held_out = held_out_by_name(pictures.names, self.hold_out), copy.copy(pictures)
            if not is_held_out.any():
                raise ValueError(f"--hold-out: expected a share of at least one picture, got {self.hold_out}")
            held_out.remove((~is_held_out).nonzero()[:, 0].tolist())
            pictures.remove(is_held_out.nonzero()[:, 0].tolist())
        return pictures, {"held_out": held_out, "trackers": self.trackers(output), "progress": not is_quiet()}

    def trackers(self, output: Path) -> list[Tracker]:
        """The trackers of --log, in the first process."""
        from titok.processes import own_part
        from titok.training.metrics import TensorBoard, WeightsAndBiases

        made: list[Tracker] = []
        for name in self.log or []:
            if name not in ("tensorboard", "wandb"):
                raise ValueError(f"--log: expected tensorboard or wandb, got {name!r}")
            if own_part()[0] > 0:
                continue
            try:
                made.append(
                    TensorBoard(output / "tensorboard")
                    if name == "tensorboard"
                    else WeightsAndBiases(project="titok", name=output.name, dir=str(output))
                )
            except ImportError as error:
                raise ValueError(f"--log {name}: the package {name} is not installed") from error
        return made


def small_model(recipe: str, config: Any, options: dict[str, Any]) -> Any:
    """The model of the "small" settings, with the sizes that options give."""
    model = config.model
    sizes = dict(options)
    width, layers = sizes.pop("width", None), sizes.pop("layers", None)
    if width is not None and (width < 64 or width % 64):
        raise ValueError(f"--width: expected a multiple of 64, got {width}")
    if recipe == "generator":
        wide = {} if width is None else {"width": width, "heads": width // 64, "mlp_width": 4 * width}
        return dataclasses.replace(model, **wide, **({} if layers is None else {"layers": layers}))
    changes: dict[str, Any] = {} if width is None else {"width": width, "heads": width // 64}
    changes |= {} if layers is None else {"layers": layers}
    if (patch := sizes.pop("patch_size", None)) is not None:
        changes["patch_size"] = patch
    vit = dataclasses.replace(model.encoder, **changes)
    if (side := sizes.pop("image_size", None)) is not None:
        sizes["image_size"] = (side, side)
    if (tokens := sizes.pop("tokens", None)) is not None:
        sizes["num_latent_tokens"] = tokens
    if sizes.pop("grey", None):
        sizes["channels"] = 1
    return dataclasses.replace(model, encoder=vit, decoder=vit, **sizes)


def with_common_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command whose last parameter is `common: Common`: it gets the options of `Common` in its place.

    Args:
        left_out: fields of `Common` that the command has no option for, because they mean nothing to it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
        options = dict(inspect.signature(Common, eval_str=True).parameters)
        for name in left_out:
            del options[name]

        @functools.wraps(command)
        def with_options(**values: Any) -> None:
            common = Common(**{name: values.pop(name) for name in options})
            command(**values, common=common)

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in (*own, *options.values())]
        # What Typer reads.
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate
