"""The sides of the comparison: each says what it costs by formula, and how its parts are run.

A part that a side repeats without change is timed once and multiplied: DiT's 250 guided steps are 250 x one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import dit, flops
from benchmarks.baselines.as_published import AsPublished
from titok import GeneratorConfig, MaskGIT, MaskGITVQGAN, Pipeline, TiTok, TokenizerConfig, sample_tokens
from titok.config import SamplingConfig
from titok.data.images import to_uint8

Run = Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One thing to time.

    Attributes:
        prepare: batch size -> the function to time, which needs no arguments.
        whole: how often an image with pixels needs it; `bare`: without the pixel decoder.
    """

    prepare: Callable[[int], Run]
    whole: int = 1
    bare: int = 0


@dataclass
class Side:
    """One row of the table.

    Attributes:
        family: rows of one family share a model: "dit", "maskgit" or a preset of titok.
        flops: of one image with pixels, by formula, at the work that this side does; `bare_flops` without pixels.
        note: how it was timed, where that needs saying.
        folded_flops: the same, where the engine may have folded the upsampling; `settle` finds out whether it did.
        counted: runs every part once, as often as an image needs it, uncaptured, for FlopCounterMode: (run, times).
    """

    name: str
    family: str
    tokens: int
    steps: int
    parameters: int
    flops: int
    bare_flops: int
    parts: dict[str, Part]
    counted: list[tuple[Run, int]]
    folded_flops: int | None = None
    note: str = ""
    paper: float | None = None
    modules: list[nn.Module] = field(default_factory=list)

    def settle(self, counted: float) -> None:
        """Of the two formulas the one that what was counted agrees with."""
        if self.folded_flops is not None and abs(self.folded_flops - counted) < abs(self.flops - counted):
            self.flops = self.folded_flops

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for m in self.modules for p in m.parameters())


# Images per second on one A100, as the paper has them (Yu et al. 2024, tables 1 and 2).
PAPER = {
    ("dit", 256): 0.6, ("dit", 512): 0.1, ("maskgit", 256): 50.5, ("maskgit", 512): 3.9,
    ("titok-l-32", 256): 101.6, ("titok-b-64", 256): 89.8, ("titok-l-64-512", 512): 41.0,
}  # fmt: skip
PRESETS = {256: ("titok-l-32", "titok-b-64", "titok-s-128"), 512: ("titok-l-64-512", "titok-b-128-512")}


def _labels(batch: int, classes: int = 1000) -> list[int]:
    return [(207 + 31 * i) % classes for i in range(batch)]


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def build(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    """A model with random weights. Drawn on the device, in its dtype, cheaply: speed does not depend on them."""
    with torch.device("meta"):
        model = make()
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
                module.weight.fill_(1)
    return model.eval()


def _only_decoder(tokenizer: TiTok) -> list[nn.Module]:
    """What generation needs of a tokenizer."""
    assert tokenizer.quantizer is not None
    assert tokenizer.pixel_decoder is not None
    return [tokenizer.quantizer, tokenizer.decoder, tokenizer.pixel_decoder]


class Models:
    """A preset's tokenizer and generator, shared by its sides.

    Args:
        whole: always run all steps of the generator; else, on a CPU, one of many is timed and multiplied.
    """

    def __init__(self, preset: str, dtype: torch.dtype, device: str, *, whole: bool = False) -> None:
        self.preset, self.dtype = preset, dtype
        self.tokenizer: TiTok = build(lambda: TiTok(TokenizerConfig.preset(preset)), dtype, device)
        self.generator: MaskGIT = build(lambda: MaskGIT(GeneratorConfig.preset(preset)), dtype, device)
        self.modules = [*_only_decoder(self.tokenizer), self.generator]
        self.resolution = self.tokenizer.config.image_size[0]
        self.one_step = device == "cpu" and self.generator.config.sampling.steps > 16 and not whole

    def side(
        self,
        name: str,
        generate: Callable[[list[int]], Any],
        sample: Callable[..., Tensor],
        decode: Callable[[Tensor], Any],
        to_logits: Callable[[Tensor], Any],
        work: flops.Work,
        *,
        folded: bool = False,
        counted: Callable[[list[int]], Any] | None = None,
    ) -> Side:
        """One way of running the models.

        Args:
            generate: labels to pictures.
            sample: labels to tokens; with a `SamplingConfig` and tokens to start from, a single step.
            decode, to_logits: tokens to pictures, and to proxy logits alone.
            work: what generator and ViT decoder cost together.
            folded: the upsampling may be folded; what is counted decides.
            counted: what to count in place of `generate`, where that replays a graph.
        """
        g, t = self.generator.config, self.tokenizer.config
        steps, note = g.sampling.steps, ""
        tokens = torch.zeros(1, g.num_latent_tokens, dtype=torch.int64, device=self.generator.device)
        pixels = flops.pixel_decoder(t).flops
        parts = {
            "generate": Part(lambda batch: partial(generate, _labels(batch))),
            "to logits": Part(lambda batch: lambda: to_logits(sample(_labels(batch))), 0, 1),
        }
        if self.one_step:  # in the middle: half of the tokens known, both guidance passes
            one = dataclasses.replace(g.sampling, steps=1, guidance_schedule="constant", guidance_scale=2.0)
            half = tokens.clone()
            half[:, ::2] = self.generator.mask_token
            note = f"{steps} x one step"
            parts = {
                "step": Part(
                    lambda batch: lambda: sample(_labels(batch), one, half.repeat(batch, 1)), steps, steps
                ),
                "to pictures": Part(lambda batch: lambda: decode(tokens.repeat(batch, 1))),
                "to logits": Part(lambda batch: lambda: to_logits(tokens.repeat(batch, 1)), 0, 1),
            }
        return Side(
            name=name, family=self.preset, tokens=g.num_latent_tokens, steps=steps,
            parameters=_count(*self.modules), flops=work.flops + pixels, bare_flops=work.flops, parts=parts,
            counted=[(partial(counted or generate, _labels(1)), 1)],
            folded_flops=work.flops + flops.pixel_decoder(t, folded=True).flops if folded else None,
            note=note, paper=PAPER.get((self.preset, self.resolution)), modules=self.modules,
        )  # fmt: skip

    def published(self, name: str, change: Callable[[AsPublished], Any] | None = None, **ways: Any) -> Side:
        """As the official code computes it, or with a `change` of that; `ways` are arguments of `AsPublished`."""
        rival = AsPublished(self.tokenizer, self.generator, **ways)
        if change is not None:
            change(rival)

        def sample(
            labels: list[int], sampling: SamplingConfig | None = None, start: Tensor | None = None
        ) -> Tensor:
            return rival.sample(labels, sampling)  # from all masked: every step costs the same

        return self.side(
            name,
            rival,
            sample,
            lambda tokens: rival.pictures(rival.logits(tokens)),
            rival.logits,
            flops.generate(self.generator.config, as_written=True).plus(
                flops.decoder(self.tokenizer.config, all_rows=True)
            ),
            folded=change is not None,
        )

    def ours(self, name: str) -> Side:
        pipe = Pipeline(self.tokenizer, self.generator)
        tokenizer, generator = pipe.tokenizer, pipe.generator
        g = generator.config

        def sample(
            labels: list[int], sampling: SamplingConfig | None = None, start: Tensor | None = None
        ) -> Tensor:
            return sample_tokens(generator, labels, sampling, init_tokens=start)

        def uncaptured(
            labels: list[int],
        ) -> Any:  # a start that is given, all masked: the same work without a graph
            start = torch.full((1, g.num_latent_tokens), generator.mask_token, device=generator.device)
            return tokenizer.decode(sample(labels, start=start))

        return self.side(
            name,
            pipe,
            sample,
            torch.no_grad()(lambda tokens: to_uint8(tokenizer.decode(tokens))),
            torch.no_grad()(tokenizer.decode_logits),
            flops.generate(g).plus(flops.decoder(tokenizer.config)),
            folded=True,
            counted=torch.no_grad()(uncaptured) if generator.device.type == "cuda" else None,
        )


def maskgit(resolution: int, dtype: torch.dtype, device: str) -> Side:
    """The 2D rival in our code, so with our ops: the same generator over (resolution / 16)^2 tokens, and the VQGAN."""
    side = resolution // 16
    vqgan: MaskGITVQGAN = build(MaskGITVQGAN, dtype, device)
    config = GeneratorConfig(side * side, vqgan.config.codebook_size)
    generator: MaskGIT = build(lambda: MaskGIT(config), dtype, device)

    @torch.no_grad()
    def pictures(tokens: Tensor) -> Any:
        return to_uint8(vqgan.decode(tokens.view(-1, side, side)))

    def decode(batch: int) -> Run:
        return partial(pictures, torch.zeros(batch, side * side, dtype=torch.int64, device=device))

    generate = flops.generate(config).flops
    start = torch.full((1, side * side), generator.mask_token, device=device)
    return Side(
        name="MaskGIT + MaskGIT-VQGAN",
        family="maskgit",
        tokens=side * side,
        steps=config.sampling.steps,
        parameters=_count(generator, vqgan.decoder),
        flops=generate + flops.vqgan_decoder(vqgan.config, 1, side, side).flops,
        bare_flops=generate,
        parts={
            "tokens": Part(lambda batch: partial(sample_tokens, generator, _labels(batch)), 1, 1),
            "pixels": Part(decode),
        },
        counted=[(partial(sample_tokens, generator, _labels(1), init_tokens=start), 1), (decode(1), 1)],
        note="titok's code",
        paper=PAPER["maskgit", resolution],
        modules=[generator, vqgan.decoder],
    )


def dit_side(
    name: str,
    resolution: int,
    dtype: torch.dtype,
    device: str,
    *,
    steps: int,
    compile_mode: str | None,
    whole: bool,
) -> Side:
    """DiT-XL/2 of diffusers. `whole` runs all steps; else one is timed and multiplied."""
    model = dit.DiT(resolution, dtype, device, steps=steps, compile_mode=compile_mode)
    work = flops.dit_pass(2, resolution // 16).flops * steps

    def denoise(batch: int) -> Run:
        latents = model.noise(batch)
        return partial(model.sample, batch) if whole else partial(model.step, latents, steps // 2)

    times = 1 if whole else steps
    return Side(
        name=name,
        family="dit",
        tokens=(resolution // 16) ** 2,
        steps=steps,
        parameters=model.parameters(),
        flops=work + flops.vae_decoder(1, resolution // 8).flops,
        bare_flops=work,
        parts={
            "denoise": Part(denoise, times, times),
            "pixels": Part(lambda batch: partial(model.decode, model.noise(batch))),
        },
        counted=[(partial(model.step, model.noise(1), 0), steps), (partial(model.decode, model.noise(1)), 1)],
        note="" if whole else f"{steps} x one step",
        paper=PAPER["dit", resolution] if steps == 250 else None,
        modules=[model.transformer, model.vae.decoder],
    )


def fewer_steps(side: dict[str, Any], steps: int) -> dict[str, Any]:
    """The row of a side that differs from a measured one in its number of steps alone, from the same samples."""
    ratio = steps / side["case"]["steps"]
    numbers = {**side, "case": {**side["case"], "steps": steps, "note": f"{steps} x one step"}}
    numbers["whole"] = {part: steps if n > 1 else n for part, n in side["whole"].items()}
    numbers["bare"] = {part: steps if n > 1 else n for part, n in side["bare"].items()}
    pixels = side["flops"] - side["bare_flops"]
    numbers["bare_flops"] = side["bare_flops"] * ratio
    numbers["flops"] = numbers["bare_flops"] + pixels
    numbers["flops_counted"] = (side["flops_counted"] - pixels) * ratio + pixels
    numbers["case"]["paper"] = None
    return numbers


def chosen(names: Iterable[str], wanted: str) -> list[str]:
    """Names that contain one of the comma-separated words of `wanted`; all where that is empty."""
    words = [word.strip().lower() for word in wanted.split(",") if word.strip()]
    return [name for name in names if not words or any(word in name.lower() for word in words)]
