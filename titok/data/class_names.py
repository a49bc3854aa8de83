"""Names of ImageNet's 1,000 classes, and the numbers by which generators know them."""

from __future__ import annotations

import difflib
from importlib.resources import files

NUM_CLASSES = 1000


def read_imagenet_names() -> list[list[str]]:
    """The names of each class of ImageNet, in the order of the classes: `[["tench", "Tinca tinca"], ...]`.

    The source is named at the top of `titok/data/imagenet_classes.txt`.
    """
    text = files("titok.data").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [line.partition(" ")[2].split(", ") for line in lines]


def parse_labels(text: str, num_classes: int) -> list[int]:
    """Class numbers from a list with commas between, such as "207, 360" or "golden retriever, otter".

    An item is the number of a class, one of its names, or the beginning of a name that no other class shares. Upper
    and lower case, hyphens and underscores make no difference. Names are those of ImageNet, and are known only if
    `num_classes` is 1000. Numbers are not compared with `num_classes`.

    Raises:
        ValueError: an item is neither an integer nor a name, or several classes have that name or beginning.
    """
    items = [item.strip() for item in text.split(",")]
    try:
        return [int(item) for item in items]
    except ValueError:
        if num_classes != NUM_CLASSES or not all(items):
            names = f" or names of ImageNet's {NUM_CLASSES:,} classes" if num_classes == NUM_CLASSES else ""
            raise ValueError(f"--labels: expected integers{names} with commas between, got {text!r}") from None
    known = read_imagenet_names()
    return [_number(item, known) for item in items]


def _number(item: str, names: list[list[str]]) -> int:
    """The class that one item of a list names."""
    try:
        return int(item)
    except ValueError:
        pass
    wanted = _normalized(item)
    known = [[_normalized(name) for name in own] for own in names]
    found = [number for number, own in enumerate(known) if wanted in own]
    found = found or [number for number, own in enumerate(known) if any(n.startswith(wanted) for n in own)]
    if len(found) == 1:
        return found[0]
    if not found:
        close = difflib.get_close_matches(wanted, [name for own in known for name in own], n=3)
        hint = f"; similar names are {', '.join(close)}" if close else ""
        raise ValueError(f"--labels: expected a class of ImageNet, got {item!r}{hint}")
    listed = ", ".join(f"{number} ({names[number][0]})" for number in found[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise ValueError(f"--labels: expected the name of one class, got {item!r}, which fits {listed}{more}")


def _normalized(name: str) -> str:
    return " ".join(name.casefold().replace("-", " ").replace("_", " ").split())
