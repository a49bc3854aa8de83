"""`nearest_codebook` against the official expression: `python -m benchmarks.bench_nearest_codebook`.

Peers: sums of squares and a product in one (M, V) matrix of distances, then its arg min, as the official quantizer
writes it; our plain path, which holds a slice of that matrix; torch.compile of the first. Bytes: latents and codebook
read once, indices written. FLOPs: the product, 2 M V C. Under each table: the peak of memory beyond the
inputs (of the process, on the CPU), and how many indices differ from the official ones, with the largest excess of
their float64 distance over the other's, relative to the sum of squares that both come from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._report import Report, options
from titok.ops import nearest_codebook

# latents, codes, channels: many images' tokens of the l2 presets, and the proxy codes of 16 images of 256 pixels;
# one image and a batch of 64 of the presets
CASES = ((65_536, 4096, 12), (4096, 1024, 256), (32, 4096, 12), (2048, 4096, 12), (4096, 8192, 64))
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
    return torch.randn(rows, width, device=device), torch.randn(codes, width, device=device)


def extra_megabytes(name: str, sizes: tuple[int, int, int], device: str) -> float:
    """Peak memory of one call beyond its inputs."""
    inputs = case(*sizes, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        CANDIDATES[name](*inputs)
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _resident("VmRSS")
    CANDIDATES[name](*inputs)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.partition(f"{field}:")[2].split()[0]) / 2**10


def differences(latents: Tensor, codebook: Tensor) -> tuple[int, float]:
    """How many indices differ from the official ones, and the largest relative excess of ours in float64."""
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


def main() -> None:
    arguments = options(__doc__)
    arguments.dtype = "float32"  # whatever the model's precision
    report = Report("nearest_codebook", arguments)
    for sizes in GPU_CASES if report.device == "cuda" else CASES:
        rows, codes, width = sizes
        inputs = case(*sizes, report.device)
        runs = {name: partial(function, *inputs) for name, function in CANDIDATES.items()}
        if arguments.compile:
            runs["compiled"] = partial(torch.compile(official, dynamic=False), *inputs)
        num_bytes = 4 * width * (rows + codes) + 8 * rows
        flops = 2.0 * rows * codes * width
        with torch.inference_mode():
            report.case({"M": rows, "V": codes, "C": width}, runs, num_bytes=num_bytes, flops=flops)
        memory = ", ".join(f"{name} {extra_megabytes(name, sizes, report.device):.1f}" for name in CANDIDATES)
        count, excess = differences(*inputs)
        print(f"extra MiB: {memory}; {count} of {rows} indices differ, by at most {excess:.1e}")


if __name__ == "__main__":
    main()
