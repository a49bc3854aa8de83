"""Which kernels may spill registers, and why; `aot.py` fails where a variant has more spill instructions."""

from __future__ import annotations

import re
from typing import NamedTuple


class AllowedSpills(NamedTuple):
    """Variants of a kernel that may spill registers.

    Attributes:
        kernel: its name.
        labels: a regular expression, searched in the labels of variants.
        archs: compute capabilities, e.g. "80 90".
        releases: of Triton, e.g. "3.6 3.7".
        most: instructions that move registers to or from memory.
        reason: why.
    """

    kernel: str
    labels: str
    archs: str
    releases: str
    most: int
    reason: str


ALLOWED_SPILLS: tuple[AllowedSpills, ...] = ()


def most_spills(kernel: str, label: str, arch: int, release: str) -> int:
    """How many spill instructions a variant may have.

    Args:
        arch: compute capability, e.g. 90.
        release: of Triton, e.g. "3.7.1".
    """
    series = ".".join(release.split(".")[:2])
    found = [
        row.most
        for row in ALLOWED_SPILLS
        if row.kernel == kernel and str(arch) in row.archs.split() and series in row.releases.split()
        if re.search(row.labels, label)
    ]
    return max(found, default=0)
