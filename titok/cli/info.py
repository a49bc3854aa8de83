"""`titok info`: versions, devices, back ends and presets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from titok.cli.waiting import describe_waiting


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, back ends and presets.

    A back end that cannot run here has its reason beside it.

    \b
    titok info
    titok info --json
    """
    import json

    facts = collect_facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        typer.echo(section)
        if not values:
            typer.echo("  nothing")
        for name, value in values.items():
            typer.echo(f"  {name:<12} {' '.join(value) if isinstance(value, list) else value}")


def collect_facts() -> dict[str, dict[str, Any]]:
    """What `titok info` prints: values (strings or lists of strings) by section and name."""
    from titok import ops
    from titok.config import GENERATOR_PRESETS, TOKENIZER_PRESETS
    from titok.ops.core.available import left_out

    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": dict(ops.backends()),
        "left out of the build": dict(line.partition(": ")[::2] for line in left_out()),
        "presets": {"tokenizers": list(TOKENIZER_PRESETS), "generators": list(GENERATOR_PRESETS)},
    }


def _versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    import torch

    from titok import __version__

    # The package's metadata leaves out for which CUDA a torch of PyPI is.
    versions = {"titok": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    import torch

    from titok.inference.dtypes import choose_dtype
    from titok.inference.int8 import why_no_int8
    from titok.ops.core.available import extension

    try:
        kernels = f"kernels for {extension().cpu_isa()}"
    except RuntimeError:
        kernels = "no compiled kernels"
    devices = {"cpu": f"{torch.get_num_threads()} threads, {kernels}", "waiting": describe_waiting()}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute {gpu.major}.{gpu.minor}"
    chosen = {device: choose_dtype("auto", device) for device in devices if device != "waiting"}
    reason = why_no_int8("cpu")
    names = (f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in chosen.items())
    devices["dtype auto"] = ", ".join(names)
    devices["dtype int8"] = "on cpu" if reason is None else f"not here: {reason}"
    return devices
