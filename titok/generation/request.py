"""What one run of generation is asked for, checked once where the caller hands it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from titok.checks import check_integer, labels_on_host
from titok.config import GeneratorConfig, Rounding, SamplingConfig
from titok.data.images import check_rounding


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Which samples to generate, and how. Made by `checked`, so what receives a request need not check it.

    Attributes:
        labels: (B,) int64 on the CPU, where their distinct values decide the shape of the first step.
        seed: in [0, 2^64).
        first_sample: index of the first sample, in [0, 2^63). Sample i of the request draws the noise of sample
            first_sample + i, so the same samples come out however a run is cut into requests.
        sampling: how tokens are decoded.
        rounding: how pixels become 8-bit levels.
    """

    labels: Tensor
    seed: int
    first_sample: int
    sampling: SamplingConfig
    rounding: Rounding

    @classmethod
    def checked(
        cls,
        generator: GeneratorConfig,
        labels: Tensor | Sequence[int],
        *,
        seed: int,
        first_sample: int,
        sampling: SamplingConfig | None,
        rounding: Rounding = "nearest",
    ) -> GenerationRequest:
        """A request for samples of a generator, with every argument checked.

        Args:
            generator: whose classes the labels are, and whose sampling `sampling=None` stands for.
            labels: (B,) of any integer dtype, or a sequence of integers, in [0, num_classes].

        Raises:
            TypeError, ValueError: an argument has a wrong type, dtype, shape or value; it is named.
        """
        labels = labels_on_host(labels, generator.num_classes)
        seed, first_sample = check_integer("seed", seed, 64), check_integer("first_sample", first_sample, 63)
        if sampling is not None and not isinstance(sampling, SamplingConfig):
            raise TypeError(f"sampling: expected a SamplingConfig or None, got {type(sampling).__name__}")
        check_rounding(rounding)
        return cls(labels, seed, first_sample, sampling or generator.sampling, rounding)

    def __len__(self) -> int:
        """The number of samples, B."""
        return len(self.labels)

    def part(self, start: int, stop: int) -> GenerationRequest:
        """The request for the samples `start` to `stop` - 1 of this one."""
        return dataclasses.replace(self, labels=self.labels[start:stop], first_sample=self.first_sample + start)
