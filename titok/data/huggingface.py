"""Pictures in a dataset of the Hugging Face library `datasets` (extra `titok-kernels[hf]`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titok.checkpoints.files import first_line
from titok.data.sources import Picture, check_picture_bytes, order_classes, read_file

PREFIX = "hf:"
LABEL_COLUMNS = ("label", "labels", "cls", "class")


class HuggingFaceSource:
    """The pictures of a dataset. They are read encoded, as they were stored.

    The pictures are in the first column of the type `Image`. The labels are in the first column of the type
    `ClassLabel`, or else in a column of integers that is called as `LABEL_COLUMNS` says; without one, all pictures are
    of one class. A picture is called by its number.

    Args:
        name: NAME or NAME:SPLIT. NAME is a folder that `save_to_disk` wrote, or a dataset on the hub, which is
            downloaded once. The split may be left out where there is one only.

    Raises:
        ModuleNotFoundError: the library is not installed; the message says what to install.
        FileNotFoundError, ValueError: there is no such dataset or split, or it has no pictures.
    """

    labels: torch.Tensor
    classes: list[str]

    def __init__(self, name: str) -> None:
        self.where: str = f"{PREFIX}{name}"
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "datasets, which reads the data, is not installed: pip install 'titok-kernels[hf]'"
            ) from error
        dataset = _split_of(self.where, *_load(name))
        features = dataset.features
        image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"{self.where}: expected a column of images, got {', '.join(features)}")
        label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
        if label is None:
            integers = [key for key, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
            label = next((key for key in LABEL_COLUMNS if key in integers), None)
        if len(dataset) == 0:
            raise ValueError(f"{self.where}: no picture here")
        self._column = image
        self._rows = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        if label is None:
            self.labels, self.classes = torch.zeros(len(dataset), dtype=torch.int64), [""]
        else:
            values = np.asarray(dataset.select_columns([label]).with_format("numpy")[:][label], dtype=np.int64)
            if values.min() < 0:
                raise ValueError(f"{self.where}: expected a label for each picture, got {values.min()}")
            self.labels = torch.from_numpy(values)
            names = getattr(features[label], "names", None)
            self.classes = names or order_classes(map(str, range(int(values.max()) + 1)), "natural")
        others = [key for key in features if key not in (image, label)]
        self.left_out = f"left out: the columns {', '.join(others)}" if others else ""
        self._files = [Path(file["filename"]) for file in dataset.cache_files]
        self.names: Sequence[str] = [f"{number:08}" for number in range(len(dataset))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Picture:
        value = self._rows[int(index)][self._column]
        if value is None:
            raise ValueError(f"{self.describe(index)}: not a readable picture (the row is empty)")
        content = value["bytes"]
        if content is None:
            content = read_file(Path(value["path"]))
        check_picture_bytes(self.describe(index), len(content))
        return Picture(content, int(self.labels[index]), self.names[index])

    def describe(self, index: int) -> str:
        """See `PictureSource.describe`."""
        return f"{self.where}: row {index}"

    def files(self, indices: Sequence[int]) -> list[Path]:
        """See `PictureSource.files`."""
        return self._files


def _load(name: str) -> tuple[Any, str]:
    """What the library loads, and the name of the split, which may be empty."""
    import datasets

    place, _, split = name.rpartition(":") if ":" in name else (name, "", "")
    try:
        if os.path.isdir(place):
            return datasets.load_from_disk(place), split
        return datasets.load_dataset(place), split
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{PREFIX}{name}: no such dataset ({first_line(error)})") from error
    except Exception as error:  # of the library, the hub and PyArrow
        raise ValueError(f"{PREFIX}{name}: not a readable dataset ({first_line(error)})") from error


def _split_of(name: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        if split:
            raise ValueError(f"{name}: expected no split, because this dataset has none")
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise ValueError(
            f"{name}: expected a split, as in {name.rpartition(':')[0] if split else name}:"
            f"{next(iter(loaded))}; there are {', '.join(loaded)}"
        )
    return loaded[split]
