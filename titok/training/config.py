"""What a training run is told: one frozen dataclass for each of the two loops, with the model's own inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from titok.config import Config, GeneratorConfig, TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What both loops share.

    Attributes:
        steps: optimizer steps of the whole run, which also set the length of the learning-rate schedule.
        learning_rate: reached after `warmup_steps`, then a cosine falls to `final_learning_rate` at the last step.
        betas, weight_decay: of AdamW; decay acts on matrices only (`titok.training.optim`).
        clip_norm: gradients are scaled down to this l2 norm.
        precision: "bfloat16" runs the networks under autocast; weights, losses and the optimizer stay in float32.
            Pays on a GPU, and on a CPU that multiplies bfloat16 natively.
        seed: with it, the configuration and the data, a machine always arrives at the same weights.
        checkpoint_every: steps that a killed run can lose at most.
        log_every: steps between two entries of the history and updates of the progress bar's figures;
            the last step makes one as well.
    """

    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        self._check_counts("steps", "batch_size", "checkpoint_every", "log_every")
        self._check_number("learning_rate", "final_learning_rate", "weight_decay")
        self._check_choice("precision", ("float32", "bfloat16"))
        self._check("clip_norm", self.clip_norm > 0, "a number > 0")
        self._check("warmup_steps", 0 <= self.warmup_steps < self.steps, f"an int in [0, steps = {self.steps})")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._check("seed", isinstance(self.seed, int) and 0 <= self.seed < 1 << 63, "an int in [0, 2^63)")


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingConfig):
    """Single-stage training of a tokenizer with a "pixels" head: squared error on pixels + the bottleneck's loss.

    Attributes:
        reconstruction_weight: of the mean squared error. A quantizer's loss weighs 1 and would drown a plain one.
        kl_weight: of a VAE's KL divergence, nats per latent token.
        restart_every, restart_until: codes that no latent chose for `restart_every` steps take a random latent of
            the batch instead, until this share of the run.
        random_shift: each training image is moved by up to so many pixels, its edges repeated.
        position_std: standard deviation that learned tokens and positions start with; None leaves them as
            `TiTok(config)` draws them, at width^-0.5. A small model is slow to tell positions apart then.
        random_flip: each training image is mirrored left to right with probability 1/2.
    """

    model: TokenizerConfig
    steps: int = 100_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 1_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    reconstruction_weight: float = 10.0
    kl_weight: float = 1e-6
    restart_every: int = 25
    restart_until: float = 0.7
    random_shift: int = 0
    random_flip: bool = False
    position_std: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", TokenizerConfig.from_dict(self.model))
        super().__post_init__()
        pixels = self.model.head == "pixels"
        self._check("model", pixels, "a tokenizer with head 'pixels' (single-stage)")
        self._check_number("reconstruction_weight", "kl_weight")
        self._check_counts("restart_every")
        self._check_unit("restart_until")
        std = self.position_std
        self._check("position_std", std is None or 0 < std < math.inf, "None or a finite number > 0")
        self._check("random_shift", isinstance(self.random_shift, int) and self.random_shift >= 0, "an int >= 0")


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining(TrainingConfig):
    """Masked-token training of MaskGIT (Chang et al. 2022) on tokens that a tokenizer made beforehand.

    Attributes:
        label_smoothing: of the cross-entropy.
        unmasked_weight: weight of the tokens that the model was shown; masked ones weigh 1.
        class_dropout: probability with which a sample's class is dropped, for classifier-free guidance.
    """

    model: GeneratorConfig
    steps: int = 100_000
    batch_size: int = 256
    learning_rate: float = 2e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 1_000
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.03
    label_smoothing: float = 0.1
    unmasked_weight: float = 0.1
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", GeneratorConfig.from_dict(self.model))
        super().__post_init__()
        for name in ("label_smoothing", "unmasked_weight", "class_dropout"):
            self._check_unit(name)
