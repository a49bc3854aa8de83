"""What a GPU machine has, as one JSON object: `python -m benchmarks.harness.machine`.

`benchmarks.gpu` runs this in a process of its own, so that it holds no memory of the GPU itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from typing import Any

PACKAGES = ("torch", "triton", "numpy", "diffusers", "pytest", "pytest-xdist", "rich", "einops", "typer")
TOOLS = ("compute-sanitizer", "ncu", "nsys")


def describe() -> dict[str, Any]:
    """Card, driver, versions and tools; "reasons" lists why the benchmarks cannot run, and is empty if they can."""
    import torch

    import titok
    from titok import ops

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["titok"] = titok.__version__
    found["nvcc"] = _nvcc()
    found |= {name: shutil.which(name) or "not found" for name in TOOLS}
    reasons = []
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["cards"] = [
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors"
            for card in cards
        ]
        found["driver"] = _driver()
        found["CUDA of torch"] = torch.version.cuda
    else:
        reasons.append("torch finds no CUDA device")
    back_ends = ops.backends()
    found["back ends"] = back_ends
    reasons += [f"{name}: {back_ends[name]}" for name in ("cuda", "triton") if back_ends[name] != "available"]
    found["reasons"] = reasons
    return found


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for path in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if (tool := shutil.which(path)) is not None:
            text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
            release = re.search(r"release ([\d.]+)", text)
            return f"{release[1] if release else 'unknown release'} ({tool})"
    return "not found"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


if __name__ == "__main__":
    print(json.dumps(describe()))
