"""`nearest_codebook` against the official expression: `python -m benchmarks.bench_nearest_codebook`.

Peers: "official" makes the (M, V) matrix of distances from sums of squares and a product, then takes its arg min;
"plain" is titok's path in PyTorch, which holds a slice of that matrix; "compiled" is the first under
torch.compile; "faiss" is the exact search of the package faiss-cpu, where it is installed, in an index that was made
before the clock starts. Bytes: latents and codebook read once, indices written once. FLOP: those of the product,
2 M V C.

Below each table: the peak memory of a call beyond its inputs (on a CPU that of the process), and how many of
titok's indices differ from the official ones. For those, the distances to both codes are computed in float64, and
the largest excess of titok's distance is given relative to the sum of squares that the distances are computed
from.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.memory import peak_growth
from benchmarks.harness.op_report import OpReport, checked, op_parser
from titok.ops import nearest_codebook

# (latents M, codes V, channels C): tokens of many images in the presets; proxy codes of 16 images of 256 pixels;
# tokens of one image and of 64 images in titok-l-32; tokens with 64 channels
CASES = ((65_536, 4096, 12), (4096, 1024, 256), (32, 4096, 12), (2048, 4096, 12), (4096, 8192, 64))
FEW_CASES = (CASES[2], CASES[3], CASES[0])
GPU_CASES = (*CASES, (8192, 4096, 12), (16_384, 1024, 256), (1_048_576, 4096, 12))


def official(latents: Tensor, codebook: Tensor) -> Tensor:
    squares = torch.sum(latents**2, dim=1, keepdim=True) + torch.sum(codebook**2, dim=1)
    return torch.argmin(squares - 2 * torch.einsum("mc,vc->mv", latents, codebook), dim=1)


CANDIDATES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "official": official,
    "plain": partial(nearest_codebook, backend="plain"),
    "titok": nearest_codebook,
}


def case(rows: int, codes: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """latents (M, C), codebook (V, C)."""
    return torch.randn(rows, width, device=device), torch.randn(codes, width, device=device)


def other_latents(latents: Tensor, codebook: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same latents in another order, which depends on the seed, and the codebook."""
    return latents.roll(seed, 0), codebook


def faiss_search(codebook: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Exact search by faiss-cpu with as many threads as PyTorch; None on a GPU and where it is not installed."""
    if codebook.is_cuda or importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())

    def search(latents: Tensor, codebook: Tensor) -> Tensor:
        _, found = index.search(latents.numpy(), 1)
        return torch.from_numpy(found)[:, 0]

    return search


def extra_mebibytes(name: str, sizes: tuple[int, int, int], device: str) -> str:
    """Peak memory of one call beyond its inputs, in MiB; "-" where the system does not report it."""
    growth = peak_growth(partial(CANDIDATES[name], *case(*sizes, device)), device)
    return "-" if growth is None else f"{growth / 2**20:.1f}"


def differences(latents: Tensor, codebook: Tensor) -> tuple[int, float]:
    """How many of titok's indices differ from the official ones, and their largest relative excess of distance."""
    ours, theirs = (CANDIDATES[name](latents, codebook) for name in ("titok", "official"))
    where = torch.ne(ours, theirs).nonzero()[:, 0]
    if not len(where):
        return 0, 0.0
    z, e = latents[where].double(), codebook.double()
    a, b = ((z - e[indices[where]]).square().sum(1) for indices in (ours, theirs))
    return len(where), float(((a - b) / (z.square().sum(1) + e[ours[where]].square().sum(1))).max())


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("sizes", CASES[1:3], ids=str)
@pytest.mark.benchmark(group="nearest_codebook")
def test_bench(benchmark: Any, name: str, sizes: tuple[int, int, int]) -> None:
    benchmark.group += str(sizes)
    benchmark(CANDIDATES[name], *case(*sizes, "cpu"))


def parser() -> argparse.ArgumentParser:
    return op_parser(__doc__)


def main() -> None:
    arguments = parser().parse_args()
    arguments.dtype = "float32"  # the op computes in float32 whatever the dtype of the model
    report = OpReport("nearest_codebook", arguments)
    for sizes in FEW_CASES if arguments.few else GPU_CASES if report.device == "cuda" else CASES:
        rows, codes, width = sizes
        inputs = case(*sizes, report.device)
        runs = dict(CANDIDATES)
        if arguments.compile:
            runs["compiled"] = torch.compile(official, dynamic=False)
        if (search := faiss_search(inputs[1])) is not None:
            runs["faiss"] = search
        fresh = partial(other_latents, *inputs)
        num_bytes = 4 * width * (rows + codes) + 8 * rows
        flops = 2.0 * rows * codes * width
        with torch.inference_mode():
            sizes_of_case = {"M": rows, "V": codes, "C": width}
            report.case(sizes_of_case, checked(runs, fresh, "plain"), num_bytes=num_bytes, flops=flops)
        memory = ", ".join(f"{name} {extra_mebibytes(name, sizes, report.device)}" for name in CANDIDATES)
        count, excess = differences(*inputs)
        print(f"extra MiB: {memory}; {count} of {rows} indices differ, by at most {excess:.1e}")


if __name__ == "__main__":
    main()
