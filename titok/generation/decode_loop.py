"""The loop of all decoding steps: one body, run eagerly anywhere, or captured once as a CUDA graph and replayed.

What gives the same tokens with less work is done: the head runs at masked positions only; conditional and
unconditional pass are one batch; no unconditional pass where the guidance weight is 1; where all is masked (the first
step), samples of one class share their logits and all samples share the unconditional ones.

A run that starts fully masked has known shapes and asks the device nothing, so on a GPU it is captured: one graph for
each shape of the work, whose inputs are labels, seed, first sample, guidance and temperatures.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from titok.config import SamplingConfig
from titok.generation.schedules import schedule
from titok.inference.prepared import stamp
from titok.models.generator import MaskGIT
from titok.ops.maskgit_decode_step import maskgit_decode_step_packed, pack_step_params
from titok.profiling import annotate, each


class Trace(NamedTuple):
    """What `sample_tokens(trace=True)` adds: the tokens that enter each step and the result (steps + 1, B, K), and
    the confidences of each step's draws (steps, B, K), +inf where a token was known."""

    tokens: Tensor
    confidences: Tensor


@dataclass
class Batch:
    """What one run of the loop reads, on the generator's device.

    Attributes:
        tokens: (B, K) to start from.
        initially: masked tokens of each sample, known to the host.
        labels: (B,).
        classes: (U,) the distinct labels, and `class_of` (B,) where each sample finds its own.
        params: int32 (steps, 10), the numbers of each step as the op packs them.
    """

    tokens: Tensor
    initially: list[int]
    labels: Tensor
    classes: Tensor
    class_of: Tensor
    params: Tensor

    @classmethod
    def prepare(
        cls,
        generator: MaskGIT,
        sampling: SamplingConfig,
        labels: Tensor,
        seed: int,
        first_sample: int,
        init_tokens: Tensor | None = None,
    ) -> Batch:
        length, mask_token, device = generator.config.num_latent_tokens, generator.mask_token, generator.device
        if init_tokens is None:
            initially = [length] * len(labels)
            tokens = torch.full((len(labels), length), mask_token, device=device)
        else:
            initially = (init_tokens == mask_token).sum(dim=1).tolist()
            tokens = init_tokens.to(device, copy=True)
        classes, class_of = labels.unique(return_inverse=True)
        params, now = [], max(initially, default=0)
        for step in schedule(sampling):
            now = step.num_masked(length, now) if init_tokens is None else 0  # else counts differ between samples
            params.append(
                pack_step_params(
                    step=step.index,
                    steps=sampling.steps,
                    num_masked=now,
                    guidance=step.guidance,
                    softmax_temperature=step.softmax_temperature,
                    noise_temperature=step.noise_temperature,
                    confidence=sampling.confidence,
                    seed=seed,
                    first_sample=first_sample,
                )
            )
        on_device = (t.to(device) for t in (labels, classes, class_of, torch.stack(params)))
        return cls(tokens, initially, *on_device)


def decode(
    generator: MaskGIT, sampling: SamplingConfig, batch: Batch, history: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """All steps of one batch: (B, K) tokens. `history` collects tokens and confidences after each step."""
    tokens, now = batch.tokens, batch.initially
    for step in each("step", schedule(sampling)):
        after = [step.num_masked(first, left) for first, left in zip(batch.initially, now, strict=True)]
        if after == now and history is None:
            continue  # with more steps than tokens: it would draw one token and mask it again
        cond, uncond, rows, uncond_rows = _logits(generator, tokens, batch, now, guided=step.guidance != 1.0)
        whole = min(batch.initially, default=0) == tokens.shape[1]  # then `params` holds the count of every sample
        counts = None if whole else torch.tensor(after, dtype=torch.int64, device=tokens.device)
        result = maskgit_decode_step_packed(
            tokens,
            cond,
            uncond,
            params=batch.params[step.index],
            mask_token=generator.mask_token,
            confidence=sampling.confidence,
            num_masked=counts,
            rows=rows,
            uncond_rows=uncond_rows,
            return_confidence=True,
        )
        assert isinstance(result, tuple)  # because confidences were asked for; the op has them anyway
        tokens = result[0]
        if history is not None:
            history.append(result)
        now = after
    return tokens


def _logits(
    generator: MaskGIT, tokens: Tensor, batch: Batch, now: list[int], *, guided: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Logits of the masked positions alone, and the rows (B, K) in which the step finds them.

    Args:
        now: how many positions of each sample are masked.

    Returns:
        cond (R, V), uncond (R', V) or None, rows of cond, rows of uncond or None.
    """
    most = max(now, default=0)
    # Masked positions first, in order; samples with fewer than `most` are padded with known ones, which no row names.
    order = (tokens != generator.mask_token).to(torch.int8).argsort(dim=1, stable=True)
    positions = order[:, :most]
    slots = order.argsort(dim=1)  # where each position stands in that order

    inputs, classes = tokens, batch.labels
    cond_of = uncond_of = torch.arange(
        len(tokens), device=tokens.device
    )  # the forward pass that serves each sample
    all_masked = min(now, default=0) == tokens.shape[1]
    if all_masked:
        classes, cond_of = batch.classes, batch.class_of
        uncond_of = torch.zeros_like(cond_of)
        inputs = tokens[: len(classes)]
    parts = [positions[: len(inputs)]]
    if guided:
        free = inputs[:1] if all_masked else inputs
        parts.append(positions[: len(free)])
        inputs = torch.cat([inputs, free])
        classes = torch.cat([classes, torch.full_like(classes[: len(free)], generator.no_class)])
    features = generator.features(inputs, classes)
    picked = features.gather(1, torch.cat(parts)[:, :, None].expand(-1, -1, features.shape[-1]))
    logits = generator.lm_head(picked).flatten(0, 1)
    rows = cond_of[:, None] * most + slots
    if not guided:
        return logits, None, rows, None
    split = len(parts[0]) * most
    return logits[:split], logits[split:], rows, uncond_of[:, None] * most + slots


# ---------------------------------------------------------------------------------------------------------------
# CUDA graphs

# Batches are padded up to one of these, so that few graphs serve every size; at most a third of the work is padding.
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_KEPT = 8  # graphs kept for each generator; each holds the activations of its shape


def bucket(count: int) -> int:
    """The smallest bucket that holds `count`, at most the largest."""
    return BUCKETS[min(bisect_left(BUCKETS, count), len(BUCKETS) - 1)]


class Finish(Protocol):
    """What is done with the tokens in the same graph: the pipeline's way to pictures."""

    def __call__(self, tokens: Tensor) -> Tensor: ...

    def parameters(self) -> Iterable[Tensor]: ...


class StaticDecode:
    """The loop over buffers of fixed shape, which a graph can be captured from.

    `labels`, seed, first sample, guidance and temperatures are copied into the buffers before each run.
    """

    def __init__(
        self,
        generator: MaskGIT,
        sampling: SamplingConfig,
        size: int,
        distinct: int,
        finish: Finish | None = None,
        *,
        capture: bool,
    ) -> None:
        self.finish = finish
        self.size, self.distinct = size, distinct
        self.generator, self.sampling = weakref.ref(generator), sampling
        labels = torch.arange(size) % min(distinct, generator.config.num_classes + 1)
        self.buffers = Batch.prepare(generator, sampling, labels, 0, 0)
        self.buffers.classes = self._padded(self.buffers.classes, distinct)
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles and tunes what compiles and tunes itself on first use
                self._decode(generator)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # One pool for all: no two graphs run at once, and each result is copied out before the next.
            with torch.cuda.graph(self.graph, pool=_pool(torch.cuda.current_device())):
                self.result = self._decode(generator)

    def _decode(self, generator: MaskGIT) -> Tensor:
        tokens = decode(generator, self.sampling, self.buffers)
        return tokens if self.finish is None else self.finish(tokens)

    @staticmethod
    def _padded(x: Tensor, size: int) -> Tensor:
        return torch.cat([x, x[:1].expand(size - len(x))])

    def run(self, labels: Tensor, sampling: SamplingConfig, seed: int, first_sample: int) -> Tensor:
        """labels (B,), B <= size, on any device -> tokens (B, K), or what `finish` makes of them."""
        generator = self.generator()
        assert generator is not None
        batch = Batch.prepare(generator, sampling, self._padded(labels, self.size), seed, first_sample)
        self.buffers.labels.copy_(batch.labels)
        self.buffers.classes.copy_(self._padded(batch.classes, self.distinct))
        self.buffers.class_of.copy_(batch.class_of)
        self.buffers.params.copy_(batch.params)
        if self.graph is None:
            self.result = self._decode(generator)
        else:
            with annotate("graph of all steps"):
                self.graph.replay()
        return self.result[: len(labels)].clone()


@functools.cache
def _pool(device: int) -> Any:
    return torch.cuda.graph_pool_handle()


_graphs: weakref.WeakKeyDictionary[MaskGIT, OrderedDict[Any, StaticDecode | None]] = weakref.WeakKeyDictionary()


def decode_captured(
    generator: MaskGIT,
    sampling: SamplingConfig,
    labels: Tensor,
    seed: int,
    first_sample: int,
    finish: Finish | None = None,
    *,
    capture: bool = True,
) -> Tensor:
    """(B, K) tokens of fully masked starts, or what `finish` makes of them, by graph replays of
    at most `BUCKETS[-1]` samples each.

    Where a capture fails, says so once and decodes without one from then on.
    """
    parts = []
    for start in range(0, len(labels), BUCKETS[-1]):
        part = labels[start : start + BUCKETS[-1]]
        static = _static(generator, sampling, part, finish, capture)
        if static is None:
            batch = Batch.prepare(generator, sampling, part, seed, first_sample + start)
            tokens = decode(generator, sampling, batch)
            parts.append(tokens if finish is None else finish(tokens))
        else:
            parts.append(static.run(part, sampling, seed, first_sample + start))
    return torch.cat(parts)


def _static(
    generator: MaskGIT, sampling: SamplingConfig, labels: Tensor, finish: Finish | None, capture: bool
) -> StaticDecode | None:
    size = bucket(len(labels))
    distinct = min(size, bucket(len(labels.unique())))
    guided = tuple(step.guidance != 1.0 for step in schedule(sampling))
    # What shapes the work, and where the weights lie: a model that was moved or recast needs new graphs. What was made
    # of weights beforehand is baked into a graph, so behind the tokens their versions count as well.
    weights: list[tuple[Any, ...]] = [(p.data_ptr(), p.dtype) for p in generator.parameters()]
    if finish is not None:
        weights += map(stamp, finish.parameters())
    key = (size, distinct, guided, sampling.mask_schedule, sampling.confidence, finish, hash(tuple(weights)))
    cache = _graphs.setdefault(generator, OrderedDict())
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    try:
        cache[key] = StaticDecode(generator, sampling, size, distinct, finish, capture=capture)
    except torch.OutOfMemoryError:
        raise  # a smaller batch may be captured yet
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"titok: decoding without a CUDA graph, its capture failed: {reason}", stacklevel=4)
        cache[key] = None
    while len(cache) > _KEPT:
        cache.popitem(last=False)
    return cache[key]
