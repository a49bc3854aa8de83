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


ALL, AMPERE = "80 86 89 90 100 120", "80 86 89"
TILES = "the tiles are chosen for sm_90 and sm_100"
TRAINING = "in training in float32 alone, and the tiles are chosen for sm_90"
LAST_LAYER = "the last layer of an encoder, which runs once for an image"
ONE_TOKEN = "no preset launches it: a sequence of one token has no tile of 32 queries"
NO_PRESET = "no preset launches it: it has a key mask, more than 64 channels a head, or rows that are not aligned"

# fmt: off
ALLOWED_SPILLS = tuple(AllowedSpills(*row) for row in (
    ("add_layer_norm_backward", "integers 16$", "100", "3.6", 3, NO_PRESET),
    ("code_mixture_forward", "^bf16", AMPERE, "3.6 3.7", 18, TILES),
    ("code_mixture_dcodebook", "^bf16", AMPERE, "3.6 3.7", 96, TILES),
    ("code_mixture_dcodebook", "^bf16", "120", "3.6 3.7", 98, "a gradient, which generation does not compute"),
    ("code_mixture_dcodebook", "^fp32.*integers 17$", "80 100", "3.7", 2, NO_PRESET),
    ("masked_attention_backward_keys", "^bf16 D=64 N=129 key_mask$", "86 89", "3.6", 27, NO_PRESET),
    ("masked_attention_backward_keys", "^fp32 D=48", "86 89", "3.7", 17, TRAINING),
    ("masked_attention_backward_keys", "key_mask|fp32 D=48", "120", "3.7", 11, TRAINING),
    ("masked_attention_backward_queries", "^bf16 D=64 N=289 key_mask", "120", "3.6", 13, NO_PRESET),
    ("masked_attention_backward_queries", "^fp32", "100 120", "3.6", 52, TRAINING),
    ("masked_attention_backward_queries", "key_mask", "120", "3.7", 23, NO_PRESET),
    ("masked_attention_forward_tiled", "^bf16 D=72 N=321$", "80", "3.6", 2, NO_PRESET),
    ("masked_attention_forward_tiled", "^fp32 D=(72|128) ", "100 120", "3.6", 111, NO_PRESET),
    ("masked_attention_forward_tiled", "integers 1$", "80", "3.7", 6, ONE_TOKEN),
    ("masked_attention_forward_tiled", "^bf16 D=64 N=289 queries=32, integers 1$", ALL, "3.6", 104, ONE_TOKEN),
    ("masked_attention_forward_tiled", "^bf16 D=64 N=289 queries=32$", "100", "3.7", 3, LAST_LAYER),
    ("masked_attention_forward_tiled", "D=72|, integers ", "120", "3.7", 10, NO_PRESET),
    ("masked_attention_forward_whole", "^bf16 D=64 N=129 key_mask$", AMPERE, "3.7", 6, NO_PRESET),
    ("masked_decode_step_partial", "^bf16 N=32 V=128256 find$", "120", "3.7", 2, "one chunk of a position computes it"),
    ("maskgit_decode_step_draw", "^fp32", "120", "3.7", 3, TILES),
    ("maskgit_decode_step_draw", "integers 1$", ALL, "3.6 3.7", 4, NO_PRESET),
    ("maskgit_decode_step_draw", "integers 17$", "80 86 89 90", "3.6 3.7", 2, NO_PRESET),
))
# fmt: on


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
