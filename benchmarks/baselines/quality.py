"""Published FIDs on ImageNet (50,000 samples), with their sources. Nothing here was measured by titok.

A row whose model is only a stand-in for the work of a published one says so in `of`.
"""

from __future__ import annotations

from typing import NamedTuple


class Quality(NamedTuple):
    """A published FID.

    Attributes:
        fid: Fréchet inception distance to ImageNet's training images; lower is better.
        source: paper and table.
        of: the published model, where the row only has its work; empty where the row is the model itself.
    """

    fid: float
    source: str
    of: str = ""


_TITOK = "Yu et al. 2024, arXiv:2406.07550, tables 1 and 2"
_DIT = "Peebles and Xie 2023, arXiv:2212.09748, tables 2 and 3"
_MASKGIT = "Chang et al. 2022, arXiv:2202.04200, table 1"
_PMF = "Lu et al. 2026, arXiv:2601.22158"

PUBLISHED = {
    "titok-l-32": Quality(2.77, _TITOK),
    "titok-b-64": Quality(2.48, _TITOK),
    "titok-s-128": Quality(1.97, _TITOK),
    "titok-l-64-512": Quality(2.74, _TITOK),
    "titok-b-128-512": Quality(2.13, _TITOK),
    "DiT 256": Quality(2.27, _DIT),
    "DiT 512": Quality(3.04, _DIT),
    "MaskGIT 256": Quality(6.18, _MASKGIT),
    "MaskGIT 512": Quality(7.32, _MASKGIT),
    "one latent step 256": Quality(3.43, "Geng et al. 2025, arXiv:2505.13447", "MeanFlow-XL/2"),
    "one pixel step 256": Quality(2.52, _PMF, "pMF-L/16"),
    "one pixel step 512": Quality(2.75, _PMF, "pMF-L/32"),
}
