"""What a comparison compares: a `Side` knows its cost by formula and how to run each of its parts.

A part that a side repeats without change is timed once and multiplied: of DiT's 250 guided steps one is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.quality import Quality

Run = Callable[[], Any]

# Images per second on one A100 by the paper's tables 1 and 2 (Yu et al. 2024), by model and resolution.
PAPER = {
    ("dit", 256): 0.6,
    ("dit", 512): 0.1,
    ("maskgit", 256): 50.5,
    ("maskgit", 512): 3.9,
    ("titok-l-32", 256): 101.6,
    ("titok-b-64", 256): 89.8,
    ("titok-l-64-512", 512): 41.0,
}
PRESETS = {256: ("titok-l-32", "titok-b-64", "titok-s-128"), 512: ("titok-l-64-512", "titok-b-128-512")}


def counted_flops(run: Run) -> int:
    """FLOP of one call as `torch.utils.flop_counter` counts them.

    The call prepares no weights, so it must not be the one whose memory is measured. What `torch.compile` returned runs
    as it was written: if its first call were made under the counter, it would stay uncompiled in all later calls.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Part:
    """One thing to time.

    Attributes:
        prepare: batch size -> what is timed: a function without arguments, or a `Checked` one.
        calls: how many calls an image needs, pixel decoder included.
        calls_without_pixels: how many calls an image needs up to, and without, the pixel decoder.
        probe: for a part that takes minutes: batch size -> a step of it, and how many such steps it has. The step is
            called once for the peak of memory and the counted FLOP. None calls the part itself.
    """

    prepare: Callable[[int], Run]
    calls: int = 1
    calls_without_pixels: int = 0
    probe: Callable[[int], tuple[Run, int]] | None = None


@dataclass
class Side:
    """One row of a comparison.

    Attributes:
        name: shown in tables.
        family: the model: "dit", "maskgit" or a preset of titok.
        tokens: tokens of one image in the generator.
        steps: sampling steps of one image.
        parameters: number of weights that generation uses.
        flops: FLOP of one image by formula, pixel decoder included.
        flops_without_pixels: the same without the pixel decoder.
        parts: what is timed, by name.
        counted: what FlopCounterMode counts for one image: (function without arguments, how many calls).
        folded_flops: `flops` with upsampling folded; None where a side never folds it.
        note: how the side was timed, shown in tables; empty for whole images.
        paper: images per second on one A100 by the TiTok paper, or None.
        quality: the published FID of the model, or None.
        modules: the modules whose weights generation reads.
        batches: the batch sizes to try in place of those of the command; empty takes those of the command.
        must_be_compiled: whether a part that does not run what `torch.compile` made is an error.
        prepares_weights: whether a call needs other memory while its FLOP are counted, so that it is called once more.
    """

    name: str
    family: str
    tokens: int
    steps: int
    parameters: int
    flops: int
    flops_without_pixels: int
    parts: dict[str, Part]
    counted: list[tuple[Run, int]]
    folded_flops: int | None = None
    note: str = ""
    paper: float | None = None
    quality: Quality | None = None
    modules: list[nn.Module] = field(default_factory=list)
    batches: tuple[int, ...] = ()
    must_be_compiled: bool = False
    prepares_weights: bool = False

    def count_flops(self) -> float:
        """FLOP of one image as `torch.utils.flop_counter` counts them."""
        return sum(calls * counted_flops(run) for run, calls in self.counted)

    def choose_formula(self, counted: float) -> None:
        """Sets `flops` to `folded_flops` if that is closer to the counted FLOP.

        Whether upsampling is folded depends on device and dtype.
        """
        if self.folded_flops is not None and abs(self.folded_flops - counted) < abs(self.flops - counted):
            self.flops = self.folded_flops

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for m in self.modules for p in m.parameters())


def class_labels(batch: int, classes: int = 1000, *, seed: int = 0) -> list[int]:
    """Labels that all differ, up to `classes` of them, and others for another seed."""
    return [(207 + seed + 31 * i) % classes for i in range(batch)]


def count_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def build(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    """The model of `make()` in evaluation mode with random weights, which do not affect speed.

    The weights are drawn on the device in their dtype, which is faster than the model's own initialisation. Their
    spread keeps activations near 1 from layer to layer, so that results depend on inputs far more than on rounding.
    """
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                fan_in = tensor.numel() / max(1, tensor.shape[0]) if tensor.dim() > 1 else 2500
                tensor.normal_(std=max(1.0, fan_in) ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
                module.weight.fill_(1)
    return model.eval()


def fewer_steps(row: dict[str, Any], steps: int) -> dict[str, Any]:
    """A row for another number of steps, from the samples of a row whose single step was timed."""
    case = {**row["case"], "steps": steps, "note": f"{steps} x one step", "paper": None}
    case |= {"fid": None, "fid_source": None, "fid_of": None}  # published for the full number of steps only
    pixel_flops = row["flops"] - row["flops_without_pixels"]
    ratio = steps / row["case"]["steps"]

    def calls(key: str) -> dict[str, int]:
        return {part: steps if count > 1 else count for part, count in row[key].items()}

    return {
        **row,
        "case": case,
        "calls": calls("calls"),
        "calls_without_pixels": calls("calls_without_pixels"),
        "flops": row["flops_without_pixels"] * ratio + pixel_flops,
        "flops_without_pixels": row["flops_without_pixels"] * ratio,
        "flops_counted": (row["flops_counted"] - pixel_flops) * ratio + pixel_flops,
    }
