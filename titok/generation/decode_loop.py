"""The loop of all decoding steps of MaskGIT (Chang et al. 2022), which a GPU may capture as a CUDA graph.

It computes less than the definition and returns the same tokens:

- The head runs at masked positions only.
- The conditional and the unconditional pass are one batch. There is no unconditional pass where the guidance
  weight is 1.
- Where every token of every sample is masked (the first step), a pass depends on its label alone: samples with the
  same label share their logits, and all samples share the unconditional ones.
- A step that would draw tokens and mask all of them again is left out (with more steps than tokens).

Shapes: B samples, K tokens of a sample, V codes, U distinct labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titok.config import SamplingConfig
from titok.generation.request import GenerationRequest
from titok.generation.schedules import Step, masked_counts, schedule
from titok.models.generator import MaskGIT
from titok.ops import maskgit_decode_step_packed, pack_step_params
from titok.ops.maskgit_decode_plain import masked_first_order
from titok.profiling import annotate


class StepResult(NamedTuple):
    """What one step returns.

    Attributes:
        tokens: (B, K) int64 after the step.
        confidences: (B, K) float32 of the step's draws, +inf where the token was decided before.
    """

    tokens: Tensor
    confidences: Tensor


class HostInputs(NamedTuple):
    """What one run of the loop reads from the host, packed into one tensor, so that a GPU receives it in one copy.

    Attributes:
        packed: (n,) int64 on the CPU, in pinned memory where the generator is on a GPU.
        shapes: name -> shape in int64 elements of each part of `packed`, in order.
        masked_counts: as of `DecodeBatch`.
    """

    packed: Tensor
    shapes: dict[str, tuple[int, ...]]
    masked_counts: list[list[int]]

    @classmethod
    def pack(
        cls,
        generator: MaskGIT,
        request: GenerationRequest,
        init_tokens: Tensor | None = None,
        *,
        num_distinct: int | None = None,
    ) -> HostInputs:
        """The inputs of a request.

        Args:
            init_tokens: (B, K) int64 to start from, codes or `generator.mask_token`; None starts with every token
                masked. The tokens are packed if they are on the CPU.
            num_distinct: the distinct labels are filled up to as many, with copies of the first; None fills up
                nothing.
        """
        length = generator.config.num_latent_tokens
        if init_tokens is None:
            at_start = [length] * len(request)
        else:
            at_start = (init_tokens == generator.mask_token).sum(dim=1).tolist()
        sampling = request.sampling
        counts_from = {start: masked_counts(sampling, start) for start in set(at_start) or {length}}
        have_equal_counts = len(counts_from) == 1
        counts = [[counts_from[start][i] for start in at_start] for i in range(sampling.steps + 1)]
        # Where the samples differ, the op reads the counts of each sample instead of those in `step_params`.
        shared = next(iter(counts_from.values())) if have_equal_counts else [0] * (sampling.steps + 1)
        step_params = [
            pack_step_params(
                step=step.index,
                steps=sampling.steps,
                num_masked=shared[step.index + 1],
                guidance=step.guidance,
                softmax_temperature=step.softmax_temperature,
                noise_temperature=step.noise_temperature,
                confidence=sampling.confidence,
                seed=request.seed,
                first_sample=request.first_sample,
            )
            for step in schedule(sampling)
        ]
        if torch.compiler.is_compiling():  # how many are distinct cannot be known while tracing
            distinct_labels, label_index = request.labels, torch.arange(len(request))
        else:
            distinct_labels, label_index = request.labels.unique(return_inverse=True)
        if num_distinct is not None:
            distinct_labels = padded(distinct_labels, num_distinct)
        first_class = generator.mask_token + 1
        no_class = torch.tensor([first_class + generator.config.num_classes], dtype=torch.int64, device="cpu")
        parts = {
            "step_params": torch.stack(step_params).view(torch.int64),
            "class_tokens": torch.stack([first_class + request.labels, no_class.expand(len(request))]),
            "shared_class_tokens": torch.cat([first_class + distinct_labels, no_class]),
            "shared_rows": label_index[:, None] * length + torch.arange(length, device="cpu"),
        }
        if not have_equal_counts:
            parts["masked_counts_by_sample"] = torch.tensor(counts, dtype=torch.int64, device="cpu")
        if init_tokens is not None and init_tokens.device.type == "cpu":
            parts["tokens"] = init_tokens
        packed = _concatenated([part.flatten() for part in parts.values()], pinned=generator.device.type == "cuda")
        return cls(packed, {name: tuple(part.shape) for name, part in parts.items()}, counts)


def _concatenated(parts: list[Tensor], *, pinned: bool) -> Tensor:
    """The parts one after the other. A copy from pinned memory to a GPU does not make the host wait."""
    if not pinned:
        return torch.cat(parts)
    size = sum(map(len, parts))
    return torch.cat(parts, out=torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True))


def padded(x: Tensor, size: int) -> Tensor:
    """x (n,) -> (size,), filled up with copies of its first value."""
    return torch.cat([x, x[:1].expand(size - len(x))])


@dataclass
class DecodeBatch:
    """What one run of the loop reads. All tensors are on the generator's device.

    A pass is one sequence that the generator reads. Where every token of every sample is masked, samples with the same
    label share a pass, and all samples share the unconditional one ("shared" below). In all other steps each sample has
    passes of its own.

    Attributes:
        inputs: (n,) int64, the copy of `HostInputs.packed`, of which some of the tensors below are views.
        tokens: (B, K) int64 to start from.
        order: (2, B, K) int64 of these tokens, as `maskgit_decode_step_packed` returns it.
        class_tokens: (2, B) int64, the class token of each sample in its conditional and its unconditional pass.
        shared_class_tokens: (U + 1,) int64, the class token of each shared pass, of which the unconditional is the
            last.
        shared_rows: (B, K) int64, which row each position reads of the logits of all shared conditional passes.
        shared_uncond_rows: (B, K) int64, the same for the shared unconditional pass.
        samples: (B,) int64, from 0 to B - 1.
        step_params: (steps, 10) int32, the numbers of each step in the form of `titok.ops.pack_step_params`.
        masked_counts: (steps + 1, B) as nested lists, so that shapes are known without asking the device: how many
            tokens of each sample are masked before the first step, then after each step.
        masked_counts_by_sample: the same as a tensor (steps + 1, B) int64, or None where all samples have the same
            counts; `step_params` then holds them.
        workspace: (B,) int32 zeros for the decoding step on a GPU, which leaves them zero; None on a CPU.
    """

    inputs: Tensor
    tokens: Tensor
    order: Tensor
    class_tokens: Tensor
    shared_class_tokens: Tensor
    shared_rows: Tensor
    shared_uncond_rows: Tensor
    samples: Tensor
    step_params: Tensor
    masked_counts: list[list[int]]
    masked_counts_by_sample: Tensor | None
    workspace: Tensor | None

    @classmethod
    def prepare(
        cls, generator: MaskGIT, request: GenerationRequest, init_tokens: Tensor | None = None
    ) -> DecodeBatch:
        """The batch of a request; the arguments are those of `HostInputs.pack`."""
        return cls.copied(generator, HostInputs.pack(generator, request, init_tokens), init_tokens)

    @classmethod
    def copied(cls, generator: MaskGIT, host: HostInputs, init_tokens: Tensor | None = None) -> DecodeBatch:
        """The batch whose inputs were packed before, copied to the device of the generator at once.

        Whatever is the same in every step is computed here, so that a captured graph of the steps does not repeat it.

        Args:
            init_tokens: what `HostInputs.pack` was given.
        """
        device = generator.device
        inputs = host.packed.to(device, non_blocking=True)
        sizes = [math.prod(shape) for shape in host.shapes.values()]
        named = zip(host.shapes.items(), inputs.split(sizes), strict=True)
        parts = {name: part.view(shape) for (name, shape), part in named}
        batch, length = host.shapes["shared_rows"]
        tokens = parts.get("tokens")
        if init_tokens is None:
            tokens = torch.full((batch, length), generator.mask_token, device=device)
        elif tokens is None:  # they are on a GPU already
            tokens = init_tokens.to(device, copy=True)
        on_gpu = device.type == "cuda"
        return cls(
            inputs=inputs,
            tokens=tokens,
            order=masked_first_order(tokens, generator.mask_token),
            class_tokens=parts["class_tokens"],
            shared_class_tokens=parts["shared_class_tokens"],
            shared_rows=parts["shared_rows"],
            shared_uncond_rows=torch.arange(length, device=device).repeat(batch, 1),
            samples=torch.arange(batch, device=device),
            step_params=parts["step_params"].view(torch.int32),
            masked_counts=host.masked_counts,
            masked_counts_by_sample=parts.get("masked_counts_by_sample"),
            workspace=torch.zeros(batch, dtype=torch.int32, device=device) if on_gpu else None,
        )


def decode(generator: MaskGIT, sampling: SamplingConfig, batch: DecodeBatch) -> Tensor:
    """Runs all steps of a batch.

    Args:
        sampling: that of the request which the batch was prepared from.

    Returns:
        tokens (B, K) int64, all decided.
    """
    tokens = batch.tokens
    for result in decode_steps(generator, sampling, batch):
        tokens = result.tokens
    return tokens


def decode_steps(
    generator: MaskGIT, sampling: SamplingConfig, batch: DecodeBatch, *, all_steps: bool = False
) -> Iterator[StepResult]:
    """Runs the steps of a batch one by one, and yields what each of them returns.

    Args:
        sampling: that of the request which the batch was prepared from.
        all_steps: also run a step that draws tokens and masks all of them again.
    """
    tokens, order = batch.tokens, batch.order
    for step in schedule(sampling):
        if all_steps or batch.masked_counts[step.index] != batch.masked_counts[step.index + 1]:
            with annotate("step", step.index):
                tokens, confidences, order = _decode_step(generator, sampling, batch, step, tokens, order)
            yield StepResult(tokens, confidences)


def _decode_step(
    generator: MaskGIT, sampling: SamplingConfig, batch: DecodeBatch, step: Step, tokens: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one step.

    Args:
        tokens: (B, K) int64 before the step.
        order: (2, B, K) int64 of these tokens, as `maskgit_decode_step_packed` returns it.

    Returns:
        tokens (B, K) int64 after the step, the confidences (B, K) float32 of its draws, and the order of the tokens.
    """
    before = batch.masked_counts[step.index]
    is_guided = step.guidance != 1.0
    if min(before, default=0) == tokens.shape[1]:
        logits = _shared_logits(generator, tokens, batch, guided=is_guided)
    else:
        logits = _masked_logits(generator, tokens, order, batch, max(before, default=0), guided=is_guided)
    by_sample = batch.masked_counts_by_sample
    return maskgit_decode_step_packed(
        tokens,
        logits.cond,
        logits.uncond,
        params=batch.step_params[step.index],
        mask_token=generator.mask_token,
        confidence=sampling.confidence,
        num_masked=None if by_sample is None else by_sample[step.index + 1],
        rows=logits.cond_rows,
        uncond_rows=logits.uncond_rows,
        workspace=batch.workspace,
        return_confidence=True,  # the op computes the confidences in any case
        return_order=True,
    )


class _MaskedLogits(NamedTuple):
    """Logits at masked positions, in the form that `titok.ops.maskgit_decode_step` takes with `rows`.

    Attributes:
        cond: (R, V), one row for each masked position of each conditional pass.
        uncond: (R', V) of the unconditional passes, or None without guidance.
        cond_rows: (B, K) int64, the row of `cond` that each position reads. Entries at decided positions are never
            read.
        uncond_rows: (B, K) int64, the same for `uncond`; None without guidance, and where it is `cond_rows`.
    """

    cond: Tensor
    uncond: Tensor | None
    cond_rows: Tensor
    uncond_rows: Tensor | None


def _shared_logits(generator: MaskGIT, tokens: Tensor, batch: DecodeBatch, *, guided: bool) -> _MaskedLogits:
    """Runs the forward passes of a step in which every token of every sample is masked.

    Args:
        tokens: (B, K) int64.
        guided: also run the unconditional pass.
    """
    class_tokens = batch.shared_class_tokens if guided else batch.shared_class_tokens[:-1]
    length = tokens.shape[1]
    ids = torch.cat([class_tokens[:, None], tokens[:1].expand(len(class_tokens), length)], dim=1)
    logits = _logits_of(generator, generator.features(ids).contiguous())
    if not guided:
        return _MaskedLogits(logits, None, batch.shared_rows, None)
    return _MaskedLogits(logits[:-length], logits[-length:], batch.shared_rows, batch.shared_uncond_rows)


def _masked_logits(
    generator: MaskGIT, tokens: Tensor, order: Tensor, batch: DecodeBatch, max_masked: int, *, guided: bool
) -> _MaskedLogits:
    """Runs the forward passes of one step, one or two for each sample.

    Args:
        tokens: (B, K) int64.
        order: (2, B, K) int64 of these tokens, as `maskgit_decode_step_packed` returns it.
        max_masked: the largest number of masked tokens of a sample.
        guided: also run unconditional passes.
    """
    # The first max_masked positions of each sample get logits. A sample with fewer masked positions is filled up with
    # decided ones, whose logits nothing reads.
    (size, length), passes = tokens.shape, 2 if guided else 1
    ids = torch.cat([batch.class_tokens[:passes, :, None], tokens.expand(passes, size, length)], dim=2)
    features = generator.features(ids.flatten(0, 1)).unflatten(0, (passes, size))
    positions = order[0, :, :max_masked, None].expand(passes, size, max_masked, features.shape[-1])
    logits = _logits_of(generator, features.gather(2, positions).flatten(0, 1))
    rows = torch.add(order[1], batch.samples[:, None], alpha=max_masked)
    cond, uncond = logits[: size * max_masked], logits[size * max_masked :]
    return _MaskedLogits(cond, uncond if guided else None, rows, None)


def _logits_of(generator: MaskGIT, features: Tensor) -> Tensor:
    """Features (P, M, D), contiguous, to logits (P * M, V), of a float64 model in float32."""
    logits: Tensor = generator.lm_head(features).flatten(0, 1)
    return logits.float() if logits.dtype == torch.float64 else logits  # the decoding step takes no float64
