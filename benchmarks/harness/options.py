"""Options that the commands for whole models share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.harness.results import default_file
from titok.config import GENERATOR_PRESETS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


def command_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.<command>` that knows `--device` and `--dtype`."""
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="of weights and activations")
    return p


def add_preset(p: argparse.ArgumentParser) -> None:
    p.add_argument("--preset", default="titok-l-32", choices=list(GENERATOR_PRESETS))


def add_out(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out",
        metavar="FILE",
        help="results file to append to; default benchmarks/results/<machine>-<device>-<date>.jsonl",
    )


def start(arguments: argparse.Namespace) -> Path:
    """Seeds the run, sets whether a GPU multiplies float32 as TF32, and returns the results file."""
    if arguments.device == "cpu" and arguments.dtype == "tf32":
        print("tf32 is a format of GPUs; a CPU computes fp32")
        arguments.dtype = "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.dtype == "tf32"
    torch.manual_seed(0)
    return Path(arguments.out) if arguments.out else default_file(arguments.device)


def matching(names: Iterable[str], words: str) -> list[str]:
    """The names that contain one of the comma-separated words in any case, word by word; all names if there is no word.

    A word after "=" stands for the name that equals it.
    """
    names, wanted = list(names), [word.strip().lower() for word in words.split(",") if word.strip()]
    found = [
        name
        for word in wanted
        for name in names
        if (name.lower() == word[1:] if word.startswith("=") else word in name.lower())
    ]
    return list(dict.fromkeys(found)) if wanted else names
