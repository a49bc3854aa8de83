"""Settings of a training run: one frozen dataclass for each of the two loops, which contains the model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titok.config import Config, GeneratorConfig, TokenizerConfig, as_number


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What both loops share.

    Attributes:
        steps: optimizer steps of the whole run, which also set the length of the learning-rate schedule.
        batch_size: images, or sequences of tokens, in one step.
        learning_rate: the highest. It is reached after `warmup_steps`; then half a cosine leads down to
            `final_learning_rate` at the last step.
        betas, weight_decay: of AdamW. Decay acts on matrices only: see `titok.training.optim`.
        clip_norm: gradients with a larger l2 norm are scaled down to this one.
        precision: "bfloat16" runs the networks under autocast; weights, losses and the optimizer stay in float32.
            It is faster on a GPU, and on a CPU that multiplies bfloat16 natively.
        seed: a run with the same seed, settings and data gives the same weights on the same machine.
        checkpoint_every: in steps. A run that is killed loses at most this many.
        log_every: in steps, between two entries of the history and updates of the progress bar. The last step
            always makes an entry.
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
        betas = tuple(map(as_number, self.betas)) if isinstance(self.betas, (tuple, list)) else ()
        valid = len(betas) == 2 and all(b is not None and 0 <= b < 1 for b in betas)
        self._set_if("betas", betas, valid, "two numbers in [0, 1)")
        self._check_counts("steps", "batch_size", "checkpoint_every", "log_every")
        self._check_number("learning_rate", "final_learning_rate", "weight_decay", "clip_norm")
        self._check_choice("precision", ("float32", "bfloat16"))
        self._check("clip_norm", self.clip_norm > 0, "a number > 0")
        self._check_integer("warmup_steps", 0, f"an int in [0, steps = {self.steps})", self.steps - 1)
        self._check_integer("seed", 0, "an int in [0, 2^63)", (1 << 63) - 1)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingConfig):
    """Single-stage training of a tokenizer with a "pixels" head.

    The loss is the mean squared error of the pixels, plus the loss of the bottleneck.

    Attributes:
        model: of the tokenizer.
        reconstruction_weight: of the mean squared error. The loss of a quantizer has weight 1, and at weight 1 the
            squared error would be too small beside it.
        kl_weight: of the KL divergence of a VAE, in nats per latent token.
        restart_every: in steps. A code that no latent chose for so long is replaced by a random latent of the
            batch.
        restart_until: the share of the run, in [0, 1], after which codes are no longer replaced.
        random_shift: in pixels. Each training image is moved by a random number of pixels up to this one, both
            down and right; the pixels at its edge are repeated.
        random_flip: True mirrors each training image left to right with probability 1/2.
        position_std: standard deviation that learned tokens and positions start with. None keeps the one of
            `TiTok(config)`, width^-0.5, with which a small model learns positions slowly.
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
        self._check_nested("model", TokenizerConfig)
        super().__post_init__()
        self._check("model", self.model.head == "pixels", "a tokenizer with head 'pixels' (single-stage)")
        self._check_number("reconstruction_weight", "kl_weight")
        self._check_counts("restart_every")
        self._check_unit("restart_until")
        if self.position_std is not None:
            std = as_number(self.position_std)
            self._set_if("position_std", std, std is not None and std > 0, "None or a finite number > 0")
        self._check_integer("random_shift", 0, "an int >= 0")
        self._check_flags("random_flip")


@dataclass(frozen=True, kw_only=True)
class GeneratorTraining(TrainingConfig):
    """Masked-token training of MaskGIT (Chang et al. 2022) on tokens that a tokenizer made before.

    Attributes:
        model: of the generator.
        label_smoothing: of the cross-entropy.
        unmasked_weight: of the tokens that are not masked, in the loss. Masked tokens have weight 1.
        class_dropout: probability with which the class of a sample is dropped, for classifier-free guidance.
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
        self._check_nested("model", GeneratorConfig)
        super().__post_init__()
        for name in ("label_smoothing", "unmasked_weight", "class_dropout"):
            self._check_unit(name)
