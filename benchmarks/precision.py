"""How far 16-bit and 8-bit models are from exact ones: `python -m benchmarks.precision --preset titok-l-32`.

With random weights, on a CPU:

- the generator's logits and the pictures of random tokens, as the l2 norm of the difference from float64, divided by
  that of the float64 result;
- the share of tokens that are those of float32 in greedy decoding with guidance;
- the share of tokens that are those of the official code in greedy decoding, over all runs of the golden data of the
  tests. Its models are small and have made-up weights.

With `--quickstart FOLDER`, also the figures of the models that `titok quickstart` trained into that folder, in each
precision. Its models are small, and the only trained ones here.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness import tables
from benchmarks.harness.models import Models, half_masked, random_tokens
from benchmarks.harness.options import add_out, add_preset, command_parser, start
from benchmarks.harness.results import Results
from benchmarks.harness.sides import class_labels
from titok import MaskGIT, Pipeline, TiTok, engine, sample_tokens
from titok.inference.int8 import why_no_int8

ROOT = Path(__file__).parents[1]
GOLDEN_CASES = ("generator_vit", "generator_uvit")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}


def parser() -> argparse.ArgumentParser:
    p = command_parser("precision", __doc__)
    add_preset(p)
    p.add_argument("--batch", type=int, default=4, help="samples (default: %(default)s)")
    p.add_argument("--quickstart", type=Path, help="a folder of `titok quickstart`, such as runs/quickstart")
    add_out(p)
    return p


def available() -> list[str]:
    """Those that this machine computes."""
    return [name for name in PRECISIONS if name != "int8" or why_no_int8("cpu") is None]


def prepared(model: Any, precision: str) -> Any:
    """A copy of a float32 model in a precision, prepared for inference."""
    return copy.deepcopy(model).to(PRECISIONS[precision]).prepare(int8=precision == "int8")


def distance(result: Tensor, exact: Tensor) -> float:
    """The l2 norm of the difference, divided by that of the exact result."""
    return float((result.double() - exact).norm() / exact.norm())


@torch.no_grad()
def of_generator(generator: MaskGIT, batch: int) -> dict[str, dict[str, float]]:
    """Errors of the logits at half the tokens masked, and equal tokens of greedy decoding, by precision."""
    labels, tokens = class_labels(batch), half_masked(generator).repeat(batch, 1)
    classes = torch.tensor(labels)
    greedy = dataclasses.replace(generator.config.sampling, temperature=0.0)
    with engine.plain():
        exact = copy.deepcopy(generator).double()(tokens, classes)
    want = sample_tokens(prepared(generator, "float32"), labels, greedy)
    found = {}
    for name in available():
        model = prepared(generator, name)
        same = sample_tokens(model, labels, greedy) == want
        found[name] = {
            "logits": distance(model(tokens, classes), exact), "equal_tokens": float(same.double().mean())
        }  # fmt: skip
    return found


@torch.no_grad()
def of_tokenizer(tokenizer: TiTok, tokens: Tensor) -> dict[str, dict[str, float]]:
    """Errors of the ViT decoder's prediction and of the pictures, by precision."""
    with engine.plain():
        exact_model = copy.deepcopy(tokenizer).double()
        exact_head = exact_model.decode_head(tokens)
        exact = exact_model.decode(tokens)
    found = {}
    for name in available():
        model = prepared(tokenizer, name)
        head, pictures = model.decode_head(tokens), model.decode(tokens)
        found[name] = {"head": distance(head, exact_head), "pictures": distance(pictures, exact)}
    return found


@torch.no_grad()
def of_golden() -> dict[str, dict[str, float]]:
    """Tokens of the official code's greedy runs that each precision decodes as well, in `GOLDEN_CASES`."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from golden import Case, recipe_state
        from models.test_parity import sampling_of
    finally:
        sys.path.remove(str(ROOT / "tests"))
    shares: dict[str, list[Tensor]] = {name: [] for name in available()}
    for name in GOLDEN_CASES:
        case = Case(name)
        with tempfile.TemporaryDirectory() as folder:
            save_file(recipe_state(name), Path(folder, "model.safetensors"))
            Path(folder, "config.json").write_text(json.dumps(case.entry["config"]))
            exact = MaskGIT.from_pretrained(folder)
        for precision, equal in shares.items():
            model = prepared(exact, precision)
            for run, variant in case.entry["generate_variants"].items():
                if variant.get("randomize_temperature") == 0:
                    tokens = sample_tokens(model, case["in.labels"], sampling_of(variant))
                    equal.append((tokens == case[f"out.{run}.ids"]).double().mean())
    return {name: {"golden_tokens": float(torch.stack(equal).mean())} for name, equal in shares.items()}


class _Images:
    """A tokenizer that takes and returns float32 pictures, whatever it computes in."""

    def __init__(self, tokenizer: TiTok) -> None:
        self._tokenizer = tokenizer

    def encode(self, images: Tensor) -> Tensor:
        tokens: Tensor = self._tokenizer.encode(images.to(self._tokenizer.dtype))
        return tokens

    def decode(self, tokens: Tensor) -> Tensor:
        return self._tokenizer.decode(tokens).float()


def of_quickstart(folder: Path) -> dict[str, dict[str, float]]:
    """The figures of the quickstart's report, by precision."""
    from titok.data.digits import load_digits
    from titok.quickstart.metrics import measure

    digits, labels = load_digits(), torch.arange(10).repeat_interleave(100)
    tokenizer, generator = (
        TiTok.from_pretrained(folder / "tokenizer"),
        MaskGIT.from_pretrained(folder / "generator"),
    )
    first, found = None, {}
    for name in available():
        coder = prepared(tokenizer, name)
        samples = Pipeline(coder, prepared(generator, name))(labels).permute(0, 3, 1, 2).float() / 255
        figures = measure(_Images(coder), digits, samples, labels)  # type: ignore[arg-type]
        tokens = _Images(coder).encode(digits.test_images)
        first = tokens if first is None else first
        found[name] = {**figures, "equal_tokens": float((tokens == first).double().mean())}
    return found


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    results = Results(start(arguments))
    models = Models(arguments.preset, torch.float32, "cpu")
    tokens = random_tokens(models.generator, arguments.batch, 0)
    found: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
        "generator": lambda: of_generator(models.generator, arguments.batch),
        "tokenizer": lambda: of_tokenizer(models.tokenizer, tokens),
        "golden": of_golden,
    }
    if arguments.quickstart:
        found["quickstart"] = lambda: of_quickstart(arguments.quickstart)
    for part, measure in found.items():
        case = {"part": part, "preset": arguments.preset, "batch": arguments.batch, "device": "cpu"}
        row = results.row("precision", case, {}, figures=measure())
        tables.show(*tables.precision_table(row), part)


if __name__ == "__main__":
    main()
