"""Settings of a training run: one frozen dataclass for each recipe, which contains the settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titok.config import Config, GeneratorConfig, TokenizerConfig, VQGANConfig, as_number


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """What all recipes share.

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
        shard: True shares weights, gradients, averages and the optimizer's state between the processes
            (`titok.training.sharding`), for models that outgrow a GPU. In one process it changes nothing.
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
        evaluate_every: in steps, between two measurements of a tokenizer, with its averaged weights, on the pictures
            that are held out; one follows the last step. 0 makes none.
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
    shard: bool = False
    compile: bool = False
    checkpoint_activations: bool = False
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 1
    keep_every: int = 0
    log_every: int = 10
    picture_every: int = 0
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        betas = tuple(map(as_number, self.betas)) if isinstance(self.betas, (tuple, list)) else ()
        valid = len(betas) == 2 and all(b is not None and 0 <= b < 1 for b in betas)
        self._set_if("betas", betas, valid, "two numbers in [0, 1)")
        self._check_counts("steps", "batch_size", "checkpoint_every", "keep_last", "log_every")
        self._check_number("learning_rate", "final_learning_rate", "weight_decay", "clip_norm", "ema_decay")
        self._check_choice("precision", ("float32", "tf32", "bfloat16", "float16"))
        self._check("ema_decay", self.ema_decay < 1, "a number in [0, 1)")
        self._check_flags("shard", "compile", "checkpoint_activations")
        self._check("shard", not (self.shard and self.compile), "False where compile is True: use one of the two")
        for name in ("keep_every", "picture_every", "evaluate_every"):
            self._check_integer(name, 0, "an int >= 0")
        if self.micro_batch_size is not None:
            self._check_counts("micro_batch_size")
            fits = self.batch_size % self.micro_batch_size == 0
            self._check("micro_batch_size", fits, f"a divisor of batch_size = {self.batch_size}, or None")
        self._check("clip_norm", self.clip_norm > 0, "a number > 0")
        self._check_integer("warmup_steps", 0, f"an int in [0, steps = {self.steps})", self.steps - 1)
        self._check_integer("seed", 0, "an int in [0, 2^63)", (1 << 63) - 1)

    def _check_std(self, name: str) -> None:
        if getattr(self, name) is not None:
            std = as_number(getattr(self, name))
            self._set_if(name, std, std is not None and std > 0, "None or a finite number > 0")

    def _check_start(self, model: TokenizerConfig, position_std: float | None, quantize_from: int) -> None:
        """Checks the fields `start_as_patches` and `quantize_from` of a recipe that trains this tokenizer."""
        self._check_flags("start_as_patches")
        alone = position_std is None or not getattr(self, "start_as_patches")  # noqa: B009
        self._check("start_as_patches", alone, "False where position_std is given")
        self._check_integer("quantize_from", 0, f"an int in [0, steps = {self.steps})", self.steps - 1)
        self._check("quantize_from", model.bottleneck == "vq" or quantize_from == 0, "0 for a VAE")

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ReconstructionTraining(TrainingConfig):
    """What the recipes share in which a model learns to reconstruct images: the terms of the loss, and a discriminator.

    The loss is a weighted sum: reconstruction, perceptual distance, adversarial term and bottleneck, see
    `titok.training.losses.generator_loss`. A term with weight 0 is not computed.

    Attributes:
        reconstruction_kind: "l2" is the mean squared error, "l1" the mean absolute one.
        reconstruction_weight, perceptual_weight, adversarial_weight: of the terms.
        perceptual: the perceptual distance, a name of `titok.training.losses.PerceptualLoss.from_name`, such as
            "convnext_s" or "lpips-convnext_s-1.0-0.1". The caller may pass another distance instead.
        adversarial_start: the first step in which the discriminator is trained and gives the adversarial term.
        lecam_weight: of the discriminator's regularisation (LeCam).
        discriminator_warmup_steps: of the discriminator's learning rate, from its own first step.
        discriminator_width, discriminator_stages, discriminator_grid: of `titok.training.discriminator`.
        random_shift: in pixels. Each training image is moved by a random number of pixels up to this one, both
            down and right; the pixels at its edge are repeated.
        random_flip: True mirrors each training image left to right with probability 1/2.
        random_crop: True crops each training picture at a random place, as the published training does, and not at the
            centre. The place depends on the seed, the epoch and the picture.
    """

    reconstruction_kind: Literal["l2", "l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual: str = "convnext_s"
    perceptual_weight: float = 0.1
    adversarial_weight: float = 0.01
    adversarial_start: int = 20_000
    lecam_weight: float = 0.001
    discriminator_warmup_steps: int = 5_000
    discriminator_width: int = 128
    discriminator_stages: int = 3
    discriminator_grid: int = 16
    random_shift: int = 0
    random_flip: bool = True
    random_crop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("reconstruction_kind", ("l2", "l1"))
        weights = ("reconstruction_weight", "perceptual_weight", "adversarial_weight", "lecam_weight")
        self._check_number(*weights)
        self._check("perceptual", isinstance(self.perceptual, str), "a str")
        self._check_counts("discriminator_width", "discriminator_stages", "discriminator_grid")
        groups = self.discriminator_width % 32 == 0
        self._check("discriminator_width", groups, "a multiple of 32 (the groups of its norms)")
        for name in ("adversarial_start", "discriminator_warmup_steps"):
            self._check_integer(name, 0, "an int >= 0")
        self._check_integer("random_shift", 0, "an int >= 0")
        self._check_flags("random_flip", "random_crop")


@dataclass(frozen=True, kw_only=True)
class VQGANTraining(ReconstructionTraining):
    """Training of a MaskGIT-VQGAN, the 2D tokenizer whose codes are the targets of the first stage of TiTok.

    The settings of the published model are not known; the losses are those of TiTok's second stage.

    Attributes:
        model: of the 2D tokenizer.
        image_size: side of the training images in pixels.
        commitment_cost: of the vector quantizer.
        restart_every, restart_until: as in `TokenizerTraining`.
    """

    model: VQGANConfig
    image_size: int = 256
    steps: int = 500_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 5_000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    commitment_cost: float = 0.25
    restart_every: int = 25
    restart_until: float = 0.7

    def __post_init__(self) -> None:
        self._check_nested("model", VQGANConfig)
        super().__post_init__()
        self._check_counts("image_size")
        factor = self.model.factor
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}")
        self._check_number("commitment_cost")
        self._check_integer("restart_every", 0, "an int >= 0")
        self._check_unit("restart_until")


@dataclass(frozen=True, kw_only=True)
class ProxyTraining(TrainingConfig):
    """Stage 1 of TiTok: the decoder predicts the codes that a MaskGIT-VQGAN gives to the image.

    The loss is the cross-entropy of the codes plus the loss of TiTok's own quantizer. The defaults are the published
    numbers.

    Attributes:
        model: of a tokenizer with the head "proxy" and without a pixel decoder.
        restart_every, restart_until, position_std, start_as_patches, quantize_from: as in `TokenizerTraining`. The
            published training restarts no codes, draws all weights at random and quantises from the first step.
        random_shift, random_flip, random_crop: as in `ReconstructionTraining`.
    """

    model: TokenizerConfig
    steps: int = 1_000_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 10_000
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    ema_decay: float = 0.999
    restart_every: int = 0
    restart_until: float = 0.7
    random_shift: int = 0
    random_flip: bool = True
    random_crop: bool = False
    position_std: float | None = None
    start_as_patches: bool = False
    quantize_from: int = 0

    def __post_init__(self) -> None:
        self._check_nested("model", TokenizerConfig)
        super().__post_init__()
        self._check_std("position_std")
        self._check_start(self.model, self.position_std, self.quantize_from)
        fits = self.model.head == "proxy" and not self.model.pixel_decoder
        self._check("model", fits, "a tokenizer with head 'proxy' and without a pixel decoder")
        self._check_integer("restart_every", 0, "an int >= 0")
        self._check_unit("restart_until")
        self._check_integer("random_shift", 0, "an int >= 0")
        self._check_flags("random_flip", "random_crop")


@dataclass(frozen=True, kw_only=True)
class DecoderTraining(ReconstructionTraining):
    """Stage 2 of TiTok: its decoder and the pixel decoder of the MaskGIT-VQGAN learn to reconstruct images together.

    Encoder, latent tokens and codebook stay as they are, and in eval mode. The defaults are the published numbers.

    Attributes:
        model: of a tokenizer with a pixel decoder.
    """

    model: TokenizerConfig
    steps: int = 500_000
    batch_size: int = 256
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-5
    warmup_steps: int = 5_000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        self._check_nested("model", TokenizerConfig)
        super().__post_init__()
        self._check("model", self.model.pixel_decoder, "a tokenizer with a pixel decoder")


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(ReconstructionTraining):
    """Single-stage training of a tokenizer with a "pixels" head.

    The defaults suit a small model, and have neither a perceptual distance nor a discriminator.
    `titok.training.presets` has the published numbers.

    Attributes:
        model: of the tokenizer.
        reconstruction_weight: the loss of a quantizer has weight 1, and at weight 1 the squared error would be too
            small beside it.
        kl_weight: of the KL divergence of a VAE, in nats per image.
        restart_every: in steps. A code that no latent chose for so long is replaced by a random latent of the
            batch. 0 replaces none.
        restart_until: the share of the run, in [0, 1], after which codes are no longer replaced.
        position_std: standard deviation that learned tokens and positions start with. None keeps the one of
            `TiTok(config)`, width^-0.5, with which a small model learns positions slowly.
        start_as_patches: True starts with weights with which each latent token copies a patch
            (`titok.training.starting`), so that a small model need not learn first which patches a token reads. It
            sets tokens and positions, and excludes `position_std`.
        quantize_from: the first step in which latents are quantised. Before it the decoder reads the latents
            themselves, and `restart_every` keeps the codes near them. 0 quantises from the first step.
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
    perceptual: str = ""
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    kl_weight: float = 1e-6
    restart_every: int = 25
    restart_until: float = 0.7
    random_flip: bool = False
    position_std: float | None = None
    start_as_patches: bool = False
    quantize_from: int = 0

    def __post_init__(self) -> None:
        self._check_nested("model", TokenizerConfig)
        super().__post_init__()
        self._check("model", self.model.head == "pixels", "a tokenizer with head 'pixels' (single-stage)")
        self._check_number("kl_weight")
        self._check_integer("restart_every", 0, "an int >= 0")
        self._check_unit("restart_until")
        self._check_std("position_std")
        self._check_start(self.model, self.position_std, self.quantize_from)


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
