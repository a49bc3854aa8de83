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
        micro_batch_size: how many of them a process computes at once; it divides `batch_size`. Gradients are averaged
            over the micro-batches of a step, so that a smaller one saves memory. The number of processes must divide
            the number of micro-batches. None computes the whole batch at once, in one process.
        learning_rate: the highest. It is reached after `warmup_steps`; then half a cosine leads down to
            `final_learning_rate` at the last step.
        betas, weight_decay: of AdamW. Decay acts on matrices only: see `titok.training.optim`.
        clip_norm: gradients with a larger l2 norm are scaled down to this one.
        precision: "bfloat16" and "float16" run the networks under autocast; weights, losses and the optimizer stay in
            float32. "float16" scales the loss, so that small gradients do not become zero. "tf32" is float32 with
            matrix products in TF32, on a GPU that has it.
        ema_decay: of the exponential moving average of the weights, in [0, 1). The model that a run saves has the
            averages; the weights themselves are beside it in the folder `raw`. 0 keeps no averages. The decay of the
            n-th update is min(ema_decay, n / (n + 9)).
        compile: True compiles the transformers, or the convolutional networks, with torch.compile.
        checkpoint_activations: True computes the activations of each transformer block again in the backward pass,
            in place of keeping them: less memory, about a third more work.
        seed: a run with the same seed, settings and data gives the same weights on the same machine.
        checkpoint_every: in steps. A run that is killed loses at most this many.
        keep_last: how many checkpoints to keep, the one that a resumption reads included.
        keep_every: in steps, checkpoints to keep for good, as `training-<step>.safetensors`. 0 keeps none.
        log_every: in steps, between two entries of `metrics.jsonl` and updates of the progress bar. The last step
            always makes an entry.
        picture_every: in steps, between two pictures of what the model does. 0 makes none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    micro_batch_size: int | None = None
    clip_norm: float = 1.0
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    ema_decay: float = 0.0
    compile: bool = False
    checkpoint_activations: bool = False
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 1
    keep_every: int = 0
    log_every: int = 10
    picture_every: int = 0

    def __post_init__(self) -> None:
        betas = tuple(map(as_number, self.betas)) if isinstance(self.betas, (tuple, list)) else ()
        valid = len(betas) == 2 and all(b is not None and 0 <= b < 1 for b in betas)
        self._set_if("betas", betas, valid, "two numbers in [0, 1)")
        self._check_counts("steps", "batch_size", "checkpoint_every", "keep_last", "log_every")
        self._check_number("learning_rate", "final_learning_rate", "weight_decay", "clip_norm", "ema_decay")
        self._check_choice("precision", ("float32", "tf32", "bfloat16", "float16"))
        self._check("ema_decay", self.ema_decay < 1, "a number in [0, 1)")
        self._check_flags("compile", "checkpoint_activations")
        for name in ("keep_every", "picture_every"):
            self._check_integer(name, 0, "an int >= 0")
        if self.micro_batch_size is not None:
            self._check_counts("micro_batch_size")
            fits = self.batch_size % self.micro_batch_size == 0
            self._check("micro_batch_size", fits, f"a divisor of batch_size = {self.batch_size}, or None")
        self._check("clip_norm", self.clip_norm > 0, "a number > 0")
        self._check_integer("warmup_steps", 0, f"an int in [0, steps = {self.steps})", self.steps - 1)
        self._check_integer("seed", 0, "an int in [0, 2^63)", (1 << 63) - 1)

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)


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
