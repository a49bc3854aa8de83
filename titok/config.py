"""Hyper-parameters: one frozen dataclass for each model, and one table of named presets for each kind of model.

A configuration checks its values when it is constructed, so the models do not check them again. `to_dict` and
`from_dict` convert it to and from the values that JSON can hold.

This file is longer than 400 lines because the presets stand beside the fields that they fill.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

MaskSchedule = Literal["arccos", "cosine", "linear", "root", "square"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
ConfidenceRule = Literal["titok", "maskgit"]
# Larger counts in a file are damage or an attack: building the model would take minutes and all memory.
MAX_COUNT = 1 << 20
MAX_LAYERS = 1_000
MAX_STEPS = 10_000
Rounding = Literal["nearest", "truncate"]  # how pixels in [0, 1] become 8-bit levels: `titok.data.images.to_uint8`

C = TypeVar("C", bound="Config")


def is_bool(value: object) -> bool:
    """True for True, False, and arrays and tensors of them."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def as_integer(value: object) -> int | None:
    """`value` as an int, where it is an integer of Python, NumPy or PyTorch. None for all else: bools, floats, text.

    Every count, seed and index that a caller hands in goes through here, so that all take the same values.
    """
    if is_bool(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: object) -> int | float | None:
    """`value` as an int or a float, where it is a finite number of Python or NumPy. None for all else, bools too."""
    if (integer := as_integer(value)) is not None:
        return integer if abs(integer) < 1 << 64 else None
    if isinstance(value, numbers.Real) and not is_bool(value) and math.isfinite(value):
        return float(value)
    return None


class Config:
    """Base class of the configurations: conversion to and from dicts, and the checks of their fields.

    Every check raises a `ValueError` that names the class, the field, what was expected and the actual value.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields by name. Configurations within become dicts too."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The configuration with the fields `values`, as `to_dict` returned them.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: keys are missing or unknown (all of them are named), or a value is refused.
        """
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a dict, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__}: unknown keys {unknown!r:.300}; known are {sorted(known)}")
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{cls.__name__}: missing keys {missing}")
        return cls(**values)

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r:.80}")

    def _set_if(self, name: str, value: object, valid: bool, expected: str) -> None:
        """Replaces a field by `value`, its plain Python form, where `valid`; else raises with the field's own value."""
        self._check(name, valid, expected)
        object.__setattr__(self, name, value)

    def _check_integer(self, name: str, low: int, expected: str, high: float = math.inf) -> None:
        """Checks an integer in [low, high]."""
        value = as_integer(getattr(self, name))
        self._set_if(name, value, value is not None and low <= value <= high, expected)

    def _check_counts(self, *names: str, at_most: float = math.inf) -> None:
        for name in names:
            self._check_integer(name, 1, "an int >= 1")
            self._check(name, getattr(self, name) <= at_most, f"an int in [1, {at_most}]")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        self._check(name, isinstance(value, str) and value in choices, f"one of {choices}")

    def _check_number(self, *names: str) -> None:
        for name in names:
            value = as_number(getattr(self, name))
            self._set_if(name, value, value is not None and value >= 0, "a finite number >= 0")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            self._check(name, isinstance(getattr(self, name), bool), "True or False")

    def _check_nested(self, name: str, kind: type[Config], *, optional: bool = False) -> None:
        """Checks a field that holds a configuration. A dict, which is how JSON holds one, is converted first."""
        value = getattr(self, name)
        if isinstance(value, dict):
            object.__setattr__(self, name, kind.from_dict(value))
        elif value is not None or not optional:
            self._check(name, isinstance(value, kind), f"a {kind.__name__}")

    def _check_unit(self, name: str) -> None:
        value = as_number(getattr(self, name))
        self._set_if(name, value, value is not None and 0 <= value <= 1, "a number in [0, 1]")


def _as_integers(values: object) -> tuple[int, ...]:
    """A tuple or list of integers as a tuple of ints; an empty one where `values` is anything else."""
    if not isinstance(values, (tuple, list)):
        return ()
    integers = tuple(map(as_integer, values))
    return integers if None not in integers else ()  # type: ignore[return-value]


def _lookup(kind: str, name: str, table: dict[str, C]) -> C:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"name: expected a {kind} preset out of {sorted(table)}, got {name!r}")
    return table[name]


@dataclass(frozen=True)
class ViTConfig(Config):
    """The vision transformer of the tokenizer's encoder or decoder.

    Attributes:
        width: channels of a token.
        patch_size: height and width of a patch in pixels.
        mlp_ratio: channels of the MLP's hidden layer, divided by `width`.
    """

    width: int
    layers: int
    heads: int
    patch_size: int
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        self._check_counts("width", "heads", "patch_size", "mlp_ratio", at_most=MAX_COUNT)
        self._check_counts("layers", at_most=MAX_LAYERS)
        self._check("heads", self.width % self.heads == 0, f"a divisor of width {self.width}")

    @classmethod
    def named(cls, size: str, patch_size: int) -> ViTConfig:
        """A size of the paper: "small" (width 512, 8 layers), "base" (768, 12) or "large" (1024, 24).

        Raises:
            ValueError: `size` is none of the three.
        """
        sizes = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
        if not isinstance(size, str) or size not in sizes:
            raise ValueError(f"size: expected one of {sorted(sizes)}, got {size!r:.80}")
        width, layers, heads = sizes[size]
        return cls(width, layers, heads, patch_size)


@dataclass(frozen=True)
class VQGANConfig(Config):
    """MaskGIT-VQGAN (Chang et al. 2022), the 2D tokenizer whose codes TiTok predicts and whose decoder it uses.

    Attributes:
        hidden_channels: channels of the finest level, a multiple of 32 because its group norms have 32 groups.
        channel_multipliers: one for each level, from fine to coarse: its channels divided by `hidden_channels`.
        shortcut_of_result: repeat a mistake that the published weights were trained with, see
            `titok.checkpoints.quirks`. Turn it off for a model that is trained from scratch.
    """

    channels: int = 3
    hidden_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    codebook_size: int = 1024
    code_dim: int = 256
    shortcut_of_result: bool = True

    def __post_init__(self) -> None:
        multipliers = _as_integers(self.channel_multipliers)
        self._set_if("channel_multipliers", multipliers, bool(multipliers) and min(multipliers) >= 1, "ints >= 1")
        fits = len(multipliers) <= 16 and max(multipliers) <= MAX_COUNT
        self._check("channel_multipliers", fits, f"at most 16 ints of at most {MAX_COUNT}")
        self._check_flags("shortcut_of_result")
        names = ("channels", "hidden_channels", "codebook_size", "code_dim")
        self._check_counts(*names, at_most=MAX_COUNT)
        self._check_counts("blocks_per_level", at_most=100)
        self._check(
            "hidden_channels", self.hidden_channels % 32 == 0, "a multiple of 32 (the groups of its norms)"
        )

    @property
    def factor(self) -> int:
        """Pixels per code along the height and along the width: 2^(levels - 1)."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """A TiTok tokenizer (Yu et al., NeurIPS 2024).

    Attributes:
        image_size: (height, width) in pixels, multiples of both patch sizes; an int stands for a square.
        num_latent_tokens: tokens of an image, K.
        code_dim: values of a code vector, C.
        codebook_size: V; a VAE has no codebook and ignores it.
        channels: of the images, 3 for RGB or 1 for grey.
        bottleneck: "vq", a vector quantizer, or "vae", a diagonal Gaussian.
        l2_normalize: latents and codes are compared on the unit sphere.
        commitment_cost: weight of the commitment loss (van den Oord et al. 2017).
        head: what the decoder predicts at each of its patches. "pixels": the pixels of the patch. "proxy": logits
            over the codes of a MaskGIT-VQGAN, one set for each of the (patch size / factor)^2 codes that the patch
            covers.
        proxy: the MaskGIT-VQGAN of a "proxy" head.
        pixel_decoder: the decoder of `proxy` is part of the model and turns the predicted codes into an image (the
            paper's second training stage). Without it, a model with a "proxy" head ends at logits.
        signed_pixels: the networks take and return values in [-1, 1]. The images outside stay in [0, 1].
        reread_latents: repeat a mistake that some published weights were trained with, see
            `titok.checkpoints.quirks`.
    """

    image_size: tuple[int, int]
    encoder: ViTConfig
    decoder: ViTConfig
    num_latent_tokens: int
    code_dim: int
    codebook_size: int = 4096
    channels: int = 3
    bottleneck: Literal["vq", "vae"] = "vq"
    l2_normalize: bool = False
    commitment_cost: float = 0.25
    head: Literal["pixels", "proxy"] = "pixels"
    proxy: VQGANConfig | None = None
    pixel_decoder: bool = False
    signed_pixels: bool = False
    reread_latents: bool = False

    def __post_init__(self) -> None:
        self._check_nested("encoder", ViTConfig)
        self._check_nested("decoder", ViTConfig)
        self._check_nested("proxy", VQGANConfig, optional=True)
        self._check_counts("num_latent_tokens", "code_dim", "codebook_size", "channels", at_most=MAX_COUNT)
        self._check_choice("bottleneck", ("vq", "vae"))
        self._check_choice("head", ("pixels", "proxy"))
        self._check_number("commitment_cost")
        self._check_flags("l2_normalize", "pixel_decoder", "signed_pixels", "reread_latents")
        side = as_integer(self.image_size)
        size = _as_integers(self.image_size) if side is None else (side, side)
        for vit in (self.encoder, self.decoder):
            p = vit.patch_size
            fits = len(size) == 2 and all(1 <= s <= MAX_COUNT and s % p == 0 for s in size)
            self._check("image_size", fits, f"(height, width), multiples of the patch size {p}")
        object.__setattr__(self, "image_size", size)
        proxy = self.proxy
        if self.head == "pixels":
            self._check("pixel_decoder", not self.pixel_decoder, "False, because head is 'pixels'")
        elif proxy is None:
            self._check("proxy", False, "a VQGANConfig, because head is 'proxy'")
        else:
            fits = self.decoder.patch_size % proxy.factor == 0
            self._check("decoder", fits, f"a patch size that the proxy's {proxy.factor} divides")
            self._check("channels", self.channels == proxy.channels, f"the proxy's {proxy.channels}")
        if self.bottleneck == "vae":
            self._check("head", self.head == "pixels", "'pixels', because bottleneck is 'vae'")

    @classmethod
    def preset(cls, name: str) -> TokenizerConfig:
        """The configuration of a published tokenizer or, for the two at 512 pixels, our reading of the paper.

        Raises:
            ValueError: there is no such preset; all names are listed.
        """
        return _lookup("tokenizer", name, TOKENIZER_PRESETS)

    def grid(self, network: Literal["encoder", "decoder"]) -> tuple[int, int]:
        """The number of patches along the height and along the width of an image."""
        p = getattr(self, network).patch_size
        return self.image_size[0] // p, self.image_size[1] // p


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How `sample_tokens` decodes. The defaults are those published for TiTok-L-32.

    Attributes:
        steps: forward passes. Each one decides the tokens it is most confident of. There may be more steps than
            tokens.
        guidance_scale: strength of classifier-free guidance. The logits of a step are w * cond + (1 - w) * uncond.
        guidance_schedule: how w follows from the scale s and the share p = step / steps of the steps done, as in
            the official code:
            "constant": w = 1 + s,
            "linear": w = 1 + s * p,
            "power-cosine": w = 1 + (s - 1) * (1 - cos(pi * p^guidance_power)) / 2.
        guidance_power: see "power-cosine".
        temperature: scale of the Gumbel noise on confidences and, by the rule "titok", on draws. It falls linearly
            to 0 in the last step.
        softmax_annealing: divide the logits by a temperature that falls linearly from 1.3 to 0.5.
        mask_schedule: how many tokens are still masked after each step: `titok.generation.schedules.mask_ratio`.
        confidence: what the confidence of a drawn code is, before noise. "titok": its guided logit. "maskgit": its
            log probability.
    """

    steps: int = 8
    guidance_scale: float = 4.5
    guidance_schedule: GuidanceSchedule = "linear"
    guidance_power: float = 3.0
    temperature: float = 9.5
    softmax_annealing: bool = True
    mask_schedule: MaskSchedule = "arccos"
    confidence: ConfidenceRule = "titok"

    def __post_init__(self) -> None:
        self._check_counts("steps", at_most=MAX_STEPS)
        self._check_number("guidance_scale", "guidance_power", "temperature")
        self._check_flags("softmax_annealing")
        self._check_choice("guidance_schedule", ("constant", "linear", "power-cosine"))
        self._check_choice("mask_schedule", ("arccos", "cosine", "linear", "root", "square"))
        self._check_choice("confidence", ("titok", "maskgit"))


@dataclass(frozen=True)
class GeneratorConfig(Config):
    """A MaskGIT generator (Chang et al. 2022) over the tokens of one tokenizer.

    Attributes:
        num_latent_tokens, codebook_size: of the tokenizer.
        architecture: "vit", post-norm transformer blocks as in BERT, or "uvit", pre-norm blocks with long skips
            (Bao et al. 2023).
        layers: blocks of a "vit". A "uvit" has two halves of layers / 2 blocks around one more, so 20 makes 21.
        mlp_width: channels of the MLP's hidden layer.
        dropout: probability, for "vit" and in training mode only: after the embedding, after attention, after the
            MLP and on the attention weights.
        sampling: what `sample_tokens` takes when the caller gives no `SamplingConfig`.
    """

    num_latent_tokens: int
    codebook_size: int
    num_classes: int = 1000
    architecture: Literal["vit", "uvit"] = "vit"
    width: int = 768
    layers: int = 24
    heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        self._check_nested("sampling", SamplingConfig)
        names = ("num_latent_tokens", "codebook_size", "num_classes", "width", "heads", "mlp_width")
        self._check_counts(*names, at_most=MAX_COUNT)
        self._check_counts("layers", at_most=MAX_LAYERS)
        self._check_choice("architecture", ("vit", "uvit"))
        self._check("heads", self.width % self.heads == 0, f"a divisor of width {self.width}")
        self._check_unit("dropout")
        if self.architecture == "uvit":
            self._check("layers", self.layers % 2 == 0, "an even number, because architecture is 'uvit'")

    @classmethod
    def preset(cls, name: str) -> GeneratorConfig:
        """The configuration of a published generator or, for the two at 512 pixels, our reading of the paper.

        Raises:
            ValueError: there is no such preset; all names are listed.
        """
        return _lookup("generator", name, GENERATOR_PRESETS)


def _two_stage(
    size: str, tokens: int, *, image_size: int = 256, patch: int = 16, reread_latents: bool = True
) -> TokenizerConfig:
    """A tokenizer with a "proxy" head and a pixel decoder."""
    vit = ViTConfig.named(size, patch)
    return TokenizerConfig(
        image_size=(image_size, image_size), encoder=vit, decoder=vit, num_latent_tokens=tokens, code_dim=12,
        codebook_size=4096, l2_normalize=True, head="proxy", proxy=VQGANConfig(), pixel_decoder=True,
        reread_latents=reread_latents,
    )  # fmt: skip


def _single_stage(encoder: str, decoder: str, tokens: int, **bottleneck: Any) -> TokenizerConfig:
    """A tokenizer with a "pixels" head for images of 256x256 pixels in patches of 16x16."""
    vits: dict[str, Any] = {"encoder": ViTConfig.named(encoder, 16), "decoder": ViTConfig.named(decoder, 16)}
    return TokenizerConfig(image_size=(256, 256), num_latent_tokens=tokens, **vits, **bottleneck)


_VQ8K: dict[str, Any] = {"codebook_size": 8192, "code_dim": 64}
_VAE: dict[str, Any] = {"bottleneck": "vae", "code_dim": 16}

TOKENIZER_PRESETS: dict[str, TokenizerConfig] = {
    "titok-l-32": _two_stage("large", 32),
    "titok-b-64": _two_stage("base", 64),
    "titok-s-128": _two_stage("small", 128),
    "titok-bl-64-vq8k": _single_stage("base", "large", 64, **_VQ8K),
    "titok-bl-128-vq8k": _single_stage("base", "large", 128, **_VQ8K),
    "titok-sl-256-vq8k": _single_stage("small", "large", 256, **_VQ8K),
    "titok-ll-32-vae-c16": _single_stage("large", "large", 32, **_VAE),
    "titok-bl-64-vae-c16": _single_stage("base", "large", 64, **_VAE),
    "titok-bl-128-vae-c16": _single_stage("base", "large", 128, **_VAE),
    # The paper's two at 512 pixels, whose weights were never published. We read "patch size 32" as a 16x16 grid of
    # patches in encoder and decoder. Each decoder patch predicts the 2x2 proxy codes that it covers in the VQGAN's
    # 32x32 grid.
    "titok-l-64-512": _two_stage("large", 64, image_size=512, patch=32, reread_latents=False),
    "titok-b-128-512": _two_stage("base", 128, image_size=512, patch=32, reread_latents=False),
}

_UVIT: dict[str, Any] = {
    "architecture": "uvit",
    "width": 1024,
    "layers": 20,
    "heads": 16,
    "mlp_width": 4096,
    "dropout": 0.0,
}
_UVIT_SAMPLING = SamplingConfig(steps=64, guidance_scale=6.9, guidance_schedule="power-cosine", temperature=2.8)

GENERATOR_PRESETS: dict[str, GeneratorConfig] = {
    "titok-l-32": GeneratorConfig(32, 4096),
    "titok-b-64": GeneratorConfig(64, 4096, sampling=SamplingConfig(guidance_scale=3.0, temperature=11.0)),
    "titok-s-128": GeneratorConfig(128, 4096, **_UVIT, sampling=_UVIT_SAMPLING),
    "titok-l-64-512": GeneratorConfig(64, 4096),
    "titok-b-128-512": GeneratorConfig(128, 4096, **_UVIT, sampling=_UVIT_SAMPLING),
}
