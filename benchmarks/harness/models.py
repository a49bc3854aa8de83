"""titok's models as sides: as titok runs them, and as the official code computes them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.baselines.as_published import AsPublished
from benchmarks.baselines.quality import PUBLISHED
from benchmarks.harness import flops
from benchmarks.harness.checks import Checked
from benchmarks.harness.sides import PAPER, Part, Side, build, class_labels, count_parameters
from titok import GeneratorConfig, MaskGIT, Pipeline, TiTok, TokenizerConfig, engine, sample_tokens
from titok.config import SamplingConfig
from titok.data.images import to_uint8
from titok.inference import int8
from titok.models.layers import BlockLinear
from titok.profiling import annotate

M = TypeVar("M", bound=nn.Module)

# The random weights of a proxy's head are multiplied by this, so that pictures of two samples differ by far more than
# rounding changes them.
PROXY_LOGITS = 8.0
# Share of the tokens of a single step that plain mode draws as well. Rounding in bfloat16 changes some of them, and in
# later steps most. Tokens that are drawn from other logits agree by chance only.
EQUAL_TOKENS = 0.5
TOLERANCE = 0.4  # of whole pictures: bfloat16 rounding alone gives up to 0.2
# The same in 8 bits: where bfloat16 rounds otherwise, so do some of the inputs to 8 bits. Models without 8 bits are 0.8
# off.
TOLERANCE_INT8 = 0.7
MANY_STEPS = 16  # above, on a CPU, one step of the generator is timed and multiplied


@dataclasses.dataclass(frozen=True)
class Way:
    """The parts of generation, computed in one way.

    Attributes:
        generate: (labels, seed) -> pictures.
        sample: (labels, seed, settings, tokens to start from) -> tokens; the last two may be left out.
        decode: tokens -> pictures.
        to_logits: tokens -> logits over the proxy's codes, which the pixel decoder would turn into pictures.
    """

    generate: Callable[..., Any]
    sample: Callable[..., Tensor]
    decode: Callable[[Tensor], Any]
    to_logits: Callable[[Tensor], Any]


class Models:
    """The tokenizer and generator of a preset, with random weights, shared by all of its sides.

    Args:
        all_steps: always run every step of the generator. Otherwise, on a CPU, a preset of more than `MANY_STEPS`
            steps is timed by one step in the middle of the schedule.
    """

    def __init__(self, preset: str, dtype: torch.dtype, device: str, *, all_steps: bool = False) -> None:
        self.preset, self.dtype = preset, dtype
        self.tokenizer: TiTok = build(lambda: TiTok(TokenizerConfig.preset(preset)), dtype, device)
        with torch.no_grad():
            self.tokenizer.decoder.head[-1].weight.mul_(PROXY_LOGITS)
        self.generator: MaskGIT = build(lambda: MaskGIT(GeneratorConfig.preset(preset)), dtype, device)
        self.modules = [*decoding_modules(self.tokenizer), self.generator]
        self.resolution = self.tokenizer.config.image_size[0]
        self.one_step = device == "cpu" and self.generator.config.sampling.steps > MANY_STEPS and not all_steps

    def side(
        self,
        name: str,
        way: Way,
        work: flops.Work,
        *,
        expected: Way | None = None,
        tolerance: float = TOLERANCE,
        may_fold: bool = False,
        counted: Callable[[list[int]], Any] | None = None,
    ) -> Side:
        """One way of running the models.

        Args:
            way: what is timed.
            work: cost of generator and ViT decoder together, for one image.
            expected: what computes the results that those of `way` are compared with; None takes `way` itself, which
                finds results that are stale or late, and no wrong ones.
            tolerance: of pictures, as of `Checked`.
            may_fold: this way may fold upsampling; the counted FLOP decide which formula is right.
            counted: labels -> pictures, counted in place of `way.generate` where that replays a CUDA graph.
        """
        g, t = self.generator.config, self.tokenizer.config
        steps, note = g.sampling.steps, ""
        expected = expected or way

        def from_labels(run: Callable[[Way], Callable[..., Any]]) -> Callable[[int], Checked]:
            return lambda batch: Checked(
                run(way), lambda seed: (class_labels(batch, seed=seed), seed), run(expected), tolerance=tolerance
            )

        def from_tokens(run: Callable[[Way], Callable[..., Any]]) -> Callable[[int], Checked]:
            return lambda batch: Checked(
                run(way), lambda seed: (random_tokens(self.generator, batch, seed),), run(expected)
            )

        def to_logits(way: Way) -> Callable[..., Any]:
            return lambda labels, seed: way.to_logits(way.sample(labels, seed))

        parts = {
            "generate": Part(from_labels(lambda way: way.generate)),
            "to logits": Part(from_labels(to_logits), 0, 1),
        }
        if self.one_step:
            note = f"{steps} x one step"
            step, half = middle_step(g.sampling), half_masked(self.generator)

            def one_step(way: Way) -> Callable[..., Any]:
                return lambda labels, seed: way.sample(labels, seed, step, half.repeat(len(labels), 1))

            parts = {
                "step": Part(from_labels(one_step), steps, steps),
                "to pictures": Part(from_tokens(lambda way: way.decode)),
                "to logits": Part(from_tokens(lambda way: way.to_logits), 0, 1),
            }
        return Side(
            name=name,
            family=self.preset,
            tokens=g.num_latent_tokens,
            steps=steps,
            parameters=count_parameters(*self.modules),
            flops=work.flops + flops.pixel_decoder(t).flops,
            flops_without_pixels=work.flops,
            parts=parts,
            counted=[(partial(counted or partial(way.generate, seed=0), class_labels(1)), 1)],
            folded_flops=work.flops + flops.pixel_decoder(t, folded=True).flops if may_fold else None,
            note=note,
            paper=PAPER.get((self.preset, self.resolution)),
            quality=PUBLISHED.get(self.preset),
            modules=self.modules,
            prepares_weights=may_fold,
        )

    def published(self, name: str, change: Callable[[AsPublished], Any] | None = None, **ways: Any) -> Side:
        """As the official code computes it.

        Args:
            change: applied to the `AsPublished` before it runs, for a rung of the ladder.
            ways: keyword arguments of `AsPublished`.
        """
        rival = AsPublished(self.tokenizer, self.generator, **ways)
        if change is not None:
            change(rival)

        def sample(
            labels: list[int], seed: int, sampling: SamplingConfig | None = None, start: Tensor | None = None
        ) -> Tensor:
            torch.manual_seed(seed)  # the official code draws from PyTorch's global generator
            return rival.sample(labels, sampling)  # ignores `start`: here every step costs the same

        def decode(tokens: Tensor) -> Tensor:
            return rival.pictures(rival.logits(tokens))

        generator_work = flops.generate(self.generator.config, as_written=True)
        return self.side(
            name,
            Way(lambda labels, seed: decode(sample(labels, seed)), sample, decode, rival.logits),
            generator_work.plus(flops.decoder(self.tokenizer.config, all_rows=True)),
            may_fold=change is not None,
        )

    @functools.cached_property
    def prepared(self) -> tuple[TiTok, MaskGIT]:
        """Copies of the models that are prepared for inference. Other sides share the weights of the originals."""
        return copy.deepcopy(self.tokenizer).prepare(), copy.deepcopy(self.generator).prepare()

    @functools.cached_property
    def quantized(self) -> tuple[TiTok, MaskGIT]:
        """As `prepared`, with the linear layers of the transformers in 8 bits."""
        return copy.deepcopy(self.tokenizer).prepare(int8=True), copy.deepcopy(self.generator).prepare(int8=True)

    def ours(self, name: str, *, prepare: bool = True, quantize: bool = False) -> Side:
        """As titok computes it, with or without prepared weights, or with 8-bit layers."""
        prepared = self.quantized if quantize else self.prepared if prepare else (self.tokenizer, self.generator)
        tokenizer, generator = prepared
        pipe = Pipeline(tokenizer, generator, prepare=prepare)

        @torch.no_grad()
        def without_graph(labels: list[int]) -> Any:
            """The same work: where every step is returned, no CUDA graph is replayed."""
            return tokenizer.decode(sample_tokens(generator, labels, trace=True)[0])

        reference = quantized_reference if quantize else lambda model: model
        plain_models = reference(self.tokenizer), reference(self.generator)
        plain = titok_way(Pipeline(*plain_models, engine="plain"), plain=True)
        self.check_a_step(titok_way(pipe), plain)

        @torch.no_grad()
        def step_by_step(
            labels: list[int], seed: int, sampling: SamplingConfig | None = None, start: Tensor | None = None
        ) -> Tensor:
            return sample_tokens(generator, labels, sampling, seed=seed, init_tokens=start, trace=True)[0]

        counted: Callable[[list[int]], Any] | None = None
        if generator.device.type == "cuda":
            counted = without_graph
        elif quantize:  # the FLOP counter does not see products of integers
            counted = partial(Pipeline(*self.prepared), seed=0)
        # With random weights, a token that rounding changes in an early step changes most of the later ones. So the
        # pictures are compared with those that plain mode makes of the tokens that titok draws without a CUDA graph.
        expected = Way(
            lambda labels, seed: plain.decode(step_by_step(labels, seed)),
            step_by_step,
            plain.decode,
            plain.to_logits,
        )
        return self.side(
            name,
            titok_way(pipe),
            flops.generate(generator.config).plus(flops.decoder(tokenizer.config)),
            expected=expected,
            tolerance=TOLERANCE_INT8 if quantize else TOLERANCE,
            may_fold=prepare,
            counted=counted,
        )

    def check_a_step(self, way: Way, plain: Way) -> None:
        """Compares the tokens of a single step, drawn in one way, with those of plain mode.

        Raises:
            RuntimeError: more of them differ than rounding explains.
        """
        sampling, labels = dataclasses.replace(self.generator.config.sampling, steps=1), class_labels(4)
        equal = way.sample(labels, 1, sampling) == plain.sample(labels, 1, sampling)
        if (share := float(equal.double().mean())) < EQUAL_TOKENS:
            raise RuntimeError(
                f"{self.preset}: expected {EQUAL_TOKENS:.0%} of the tokens of a step to be those of plain mode, "
                f"got {share:.0%}"
            )


class QuantizedLinear(nn.Module):
    """An 8-bit layer written in PyTorch: what `csrc/int8_linear` computes, in float32 and without its kernel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = int8.quantize(layer.weight), layer.bias

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x (..., C) -> (..., O), with the GELU of it when `gelu` is set."""
        rows = x.float()
        low, high = rows.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 255
        rounded = low + step * ((rows - low) / step.clamp(min=1e-37)).round()
        bias = None if self.bias is None else self.bias.float()
        y = torch.nn.functional.linear(rounded, int8.dequantize(self.weight), bias)
        return (torch.nn.functional.gelu(y) if gelu else y).to(x.dtype)

    def add_norm(self, *_: Any) -> None:
        """Like `Linear.add_norm` without a kernel for it."""


def quantized_reference(model: M) -> M:
    """A copy of a model in which `QuantizedLinear` stands for each layer that `prepare(int8=True)` quantises."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BlockLinear):
                setattr(module, name, QuantizedLinear(child))
    return model


def titok_way(pipe: Pipeline, *, plain: bool = False) -> Way:
    """Every part of generation as a pipeline of titok runs it, in plain mode or not."""
    tokenizer, generator = pipe.tokenizer, pipe.generator

    def within_mode(run: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def call(*arguments: Any) -> Any:
            with engine.plain() if plain else contextlib.nullcontext():
                return run(*arguments)

        return call

    def sample(
        labels: list[int], seed: int, sampling: SamplingConfig | None = None, start: Tensor | None = None
    ) -> Tensor:
        return sample_tokens(generator, labels, sampling, seed=seed, init_tokens=start)

    return Way(
        lambda labels, seed: pipe(labels, seed=seed),
        within_mode(sample),
        within_mode(lambda tokens: to_uint8(tokenizer.decode(tokens))),
        within_mode(tokenizer.decode_logits),
    )


def decoding_modules(tokenizer: TiTok) -> list[nn.Module]:
    """The modules of a tokenizer that generation uses.

    Raises:
        ValueError: the tokenizer cannot decode tokens to pixels through a proxy.
    """
    if tokenizer.quantizer is None or tokenizer.pixel_decoder is None:
        raise ValueError("tokenizer: expected one with a quantizer and a pixel decoder")
    return [tokenizer.quantizer, tokenizer.decoder, tokenizer.pixel_decoder]


def random_tokens(generator: MaskGIT, batch: int, seed: int) -> Tensor:
    """Samples whose tokens are all decided: (batch, K) int64."""
    config, noise = generator.config, torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.codebook_size, (batch, config.num_latent_tokens), generator=noise)
    return tokens.to(generator.device)


def half_masked(generator: MaskGIT) -> Tensor:
    """One sample with every other token masked: (1, K) int64."""
    tokens = torch.zeros(1, generator.config.num_latent_tokens, dtype=torch.int64, device=generator.device)
    tokens[:, ::2] = generator.mask_token
    return tokens


def middle_step(sampling: SamplingConfig) -> SamplingConfig:
    """Settings for a single decoding step with guidance, which makes two passes."""
    return dataclasses.replace(sampling, steps=1, guidance_schedule="constant", guidance_scale=2.0)


def train_step(generator: MaskGIT, batch: int) -> Callable[[], None]:
    """One training step of a generator on random tokens: forward, backward, AdamW."""
    config, device = generator.config, generator.device
    generator.train()
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-4)
    tokens = torch.randint(config.codebook_size, (batch, config.num_latent_tokens), device=device)
    masked = tokens.clone()
    masked[:, ::2] = generator.mask_token
    labels = torch.tensor(class_labels(batch), device=device)

    def step() -> None:
        with annotate("forward"):
            logits = generator(masked, labels).float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, tokens.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        with annotate("backward"):
            loss.backward()
        with annotate("optimizer"):
            optimizer.step()

    return step
