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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titok.config import SamplingConfig
from titok.generation.request import GenerationRequest
from titok.generation.schedules import masked_counts, schedule
from titok.models.generator import MaskGIT
from titok.ops import maskgit_decode_step_packed, pack_step_params
from titok.profiling import each


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
        parts = {
            "step_params": torch.stack(step_params).view(torch.int64),
            "labels": request.labels,
            "distinct_labels": distinct_labels,
            "label_index": label_index,
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

    Attributes:
        inputs: (n,) int64, the copy of `HostInputs.packed`. The tensors below but `tokens` are views of it.
        tokens: (B, K) int64 to start from.
        labels: (B,) int64.
        distinct_labels: (U,) int64, the labels without repetitions.
        label_index: (B,) int64: `labels` is `distinct_labels[label_index]`.
        step_params: (steps, 10) int32, the numbers of each step in the form of `titok.ops.pack_step_params`.
        masked_counts: (steps + 1, B) as nested lists, so that shapes are known without asking the device: how many
            tokens of each sample are masked before the first step, then after each step.
        masked_counts_by_sample: the same as a tensor (steps + 1, B) int64, or None where all samples have the same
            counts; `step_params` then holds them.
    """

    inputs: Tensor
    tokens: Tensor
    labels: Tensor
    distinct_labels: Tensor
    label_index: Tensor
    step_params: Tensor
    masked_counts: list[list[int]]
    masked_counts_by_sample: Tensor | None

    @classmethod
    def prepare(
        cls, generator: MaskGIT, request: GenerationRequest, init_tokens: Tensor | None = None
    ) -> DecodeBatch:
        """The batch of a request; the arguments are those of `HostInputs.pack`."""
        return cls.copied(generator, HostInputs.pack(generator, request, init_tokens), init_tokens)

    @classmethod
    def copied(cls, generator: MaskGIT, host: HostInputs, init_tokens: Tensor | None = None) -> DecodeBatch:
        """The batch whose inputs were packed before, copied to the device of the generator at once.

        Args:
            init_tokens: what `HostInputs.pack` was given.
        """
        device = generator.device
        inputs = host.packed.to(device, non_blocking=True)
        sizes = [math.prod(shape) for shape in host.shapes.values()]
        named = zip(host.shapes.items(), inputs.split(sizes), strict=True)
        parts = {name: part.view(shape) for (name, shape), part in named}
        tokens = parts.get("tokens")
        if init_tokens is None:
            size = (len(parts["labels"]), generator.config.num_latent_tokens)
            tokens = torch.full(size, generator.mask_token, device=device)
        elif tokens is None:  # they are on a GPU already
            tokens = init_tokens.to(device, copy=True)
        return cls(
            inputs=inputs,
            tokens=tokens,
            labels=parts["labels"],
            distinct_labels=parts["distinct_labels"],
            label_index=parts["label_index"],
            step_params=parts["step_params"].view(torch.int32),
            masked_counts=host.masked_counts,
            masked_counts_by_sample=parts.get("masked_counts_by_sample"),
        )


def decode(
    generator: MaskGIT, sampling: SamplingConfig, batch: DecodeBatch, history: list[StepResult] | None = None
) -> Tensor:
    """Runs all steps of a batch.

    Args:
        sampling: that of the request which the batch was prepared from.
        history: collects the result of every step. No step is left out then.

    Returns:
        tokens (B, K) int64, all decided.
    """
    tokens = batch.tokens
    for step in each("step", schedule(sampling)):
        before, after = batch.masked_counts[step.index], batch.masked_counts[step.index + 1]
        if after == before and history is None:
            continue  # the step would draw tokens and mask all of them again
        logits = _masked_logits(generator, tokens, batch, before, guided=step.guidance != 1.0)
        by_sample = batch.masked_counts_by_sample
        result = maskgit_decode_step_packed(
            tokens,
            logits.cond,
            logits.uncond,
            params=batch.step_params[step.index],
            mask_token=generator.mask_token,
            confidence=sampling.confidence,
            num_masked=None if by_sample is None else by_sample[step.index + 1],
            rows=logits.cond_rows,
            uncond_rows=logits.uncond_rows,
            return_confidence=True,  # the op computes the confidences in any case
        )
        tokens = result[0]
        if history is not None:
            history.append(StepResult(*result))
    return tokens


class _MaskedLogits(NamedTuple):
    """Logits at masked positions, in the form that `titok.ops.maskgit_decode_step` takes with `rows`.

    Attributes:
        cond: (R, V), one row for each masked position of each conditional pass.
        uncond: (R', V) of the unconditional passes, or None without guidance.
        cond_rows: (B, K) int64, the row of `cond` that each position reads. Entries at decided positions are never
            read.
        uncond_rows: (B, K) int64, the same for `uncond`, or None without guidance.
    """

    cond: Tensor
    uncond: Tensor | None
    cond_rows: Tensor
    uncond_rows: Tensor | None


def _masked_logits(
    generator: MaskGIT, tokens: Tensor, batch: DecodeBatch, num_masked: list[int], *, guided: bool
) -> _MaskedLogits:
    """Runs the forward passes of one step.

    Args:
        tokens: (B, K) int64.
        num_masked: how many tokens of each sample are masked.
        guided: also run unconditional passes.
    """
    max_masked = max(num_masked, default=0)
    # The positions of each sample, the masked ones first; `slots` is where each position stands in that order. The
    # first max_masked of them get logits. A sample with fewer masked positions is filled up with decided ones,
    # whose logits nothing reads.
    positions = (tokens != generator.mask_token).to(torch.int8).argsort(dim=1, stable=True)  # (B, K)
    slots = positions.argsort(dim=1)  # (B, K)
    positions = positions[:, :max_masked]

    # A pass is one sequence that the generator reads; `cond_pass` and `uncond_pass` (B,) say which pass serves a
    # sample.
    fully_masked = min(num_masked, default=0) == tokens.shape[1]
    if fully_masked:  # all rows of `tokens` and of `positions` are equal, so any of them serves a pass
        cond_labels, cond_pass = batch.distinct_labels, batch.label_index
        num_uncond, uncond_pass = 1, torch.zeros_like(batch.label_index)
    else:
        cond_labels, cond_pass = batch.labels, torch.arange(len(tokens), device=tokens.device)
        num_uncond, uncond_pass = len(tokens), cond_pass
    num_cond = len(cond_labels)
    cond_rows = cond_pass[:, None] * max_masked + slots
    if not guided:
        cond = _logits_at(generator, tokens[:num_cond], cond_labels, positions[:num_cond])
        return _MaskedLogits(cond, None, cond_rows, None)

    no_class = torch.full_like(cond_labels[:num_uncond], generator.no_class)
    both = _logits_at(
        generator,
        torch.cat([tokens[:num_cond], tokens[:num_uncond]]),
        torch.cat([cond_labels, no_class]),
        torch.cat([positions[:num_cond], positions[:num_uncond]]),
    )
    cond, uncond = both.split([num_cond * max_masked, num_uncond * max_masked])
    return _MaskedLogits(cond, uncond, cond_rows, uncond_pass[:, None] * max_masked + slots)


def _logits_at(generator: MaskGIT, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """The logits of sequences at some of their positions.

    Args:
        tokens: (P, K) int64.
        labels: (P,) int64.
        positions: (P, M) int64 in [0, K).

    Returns:
        (P * M, V), the positions of the first sequence first; of a float64 model in float32.
    """
    features = generator.features(tokens, labels)
    picked = features.gather(1, positions[:, :, None].expand(-1, -1, features.shape[-1]))
    logits = generator.lm_head(picked).flatten(0, 1)
    return logits.float() if logits.dtype == torch.float64 else logits  # the decoding step takes no float64
