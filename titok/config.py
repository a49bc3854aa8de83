"""Hyper-parameters: one frozen dataclass per model, named presets in one table each.

A configuration is checked when it is made, so that no model has to; `to_dict`/`from_dict` are its JSON form.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

MaskSchedule = Literal["arccos", "cosine", "linear", "root", "square"]
GuidanceSchedule = Literal["constant", "linear", "power-cosine"]
ConfidenceRule = Literal["titok", "maskgit"]

C = TypeVar("C", bound="_Config")


class _Config:
    """JSON form and checks shared by the configurations below."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """Raises `ValueError` naming every key that is missing or that this version does not know."""
        if not isinstance(values, dict):
            raise TypeError(f"{cls.__name__}: expected a dict, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}; known are {sorted(known)}")
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{cls.__name__}: missing keys {missing}")
        return cls(**values)

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "an int >= 1")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        self._check(name, getattr(self, name) in choices, f"one of {choices}")

    def _check_number(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            fine = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            self._check(name, fine, "a finite number >= 0")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            self._check(name, isinstance(getattr(self, name), bool), "True or False")

    def _check_nested(self, name: str, kind: type[_Config], *, optional: bool = False) -> None:
        """A dict, as it comes out of JSON, becomes the configuration that it describes."""
        value = getattr(self, name)
        if isinstance(value, dict):
            object.__setattr__(self, name, kind.from_dict(value))
        elif value is not None or not optional:
            self._check(name, isinstance(value, kind), f"a {kind.__name__}")

    def _check_unit(self, name: str, *, below: float = 1.0) -> None:
        value = getattr(self, name)
        fine = isinstance(value, (int, float)) and 0 <= value <= below
        self._check(name, fine, f"a number in [0, {below:g}]")


def _lookup(kind: str, name: str, table: dict[str, C]) -> C:
    if name not in table:
        raise ValueError(f"name: expected a {kind} preset out of {sorted(table)}, got {name!r}")
    return table[name]


@dataclass(frozen=True)
class ViTConfig(_Config):
    """One side of the tokenizer. The paper's sizes: small 512x8, base 768x12, large 1024x24 (width x layers)."""

    width: int
    layers: int
    heads: int
    patch_size: int
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        self._check_counts("width", "layers", "heads", "patch_size", "mlp_ratio")
        self._check("heads", self.width % self.heads == 0, f"a divisor of width {self.width}")

    @classmethod
    def named(cls, size: str, patch_size: int) -> ViTConfig:
        sizes = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
        if size not in sizes:
            raise ValueError(f"size: expected one of {sorted(sizes)}, got {size!r}")
        width, layers, heads = sizes[size]
        return cls(width, layers, heads, patch_size)


@dataclass(frozen=True)
class VQGANConfig(_Config):
    """MaskGIT-VQGAN (Chang et al. 2022): the proxy tokenizer, pixel decoder and 2D baseline. Factor 2^(levels-1)."""

    channels: int = 3
    hidden_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    codebook_size: int = 1024
    code_dim: int = 256
    shortcut_of_result: bool = True  # what the published weights were trained with: titok/official.py

    def __post_init__(self) -> None:
        multipliers = self.channel_multipliers
        fine = isinstance(multipliers, (tuple, list)) and len(multipliers) > 0
        fine = fine and all(isinstance(m, int) and m >= 1 for m in multipliers)
        self._check("channel_multipliers", fine, "ints >= 1")
        object.__setattr__(self, "channel_multipliers", tuple(multipliers))
        self._check_flags("shortcut_of_result")
        self._check_counts("channels", "hidden_channels", "blocks_per_level", "codebook_size", "code_dim")
        self._check(
            "hidden_channels", self.hidden_channels % 32 == 0, "a multiple of 32 (the groups of its norms)"
        )

    @property
    def factor(self) -> int:
        """Pixels per code along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class TokenizerConfig(_Config):
    """A TiTok tokenizer.

    `head` says what the decoder predicts at each of its patches: ``"pixels"``, or ``"proxy"``: logits over the codes
    of a MaskGIT-VQGAN (`proxy`), (patch size / factor)^2 of them a patch. With `pixel_decoder` the VQGAN's decoder
    is part of the model and turns them into an image (the paper's second stage); without, the model ends at logits.
    """

    image_size: tuple[int, int]  # height, width; an int means a square
    encoder: ViTConfig
    decoder: ViTConfig
    num_latent_tokens: int
    code_dim: int
    codebook_size: int = 4096
    channels: int = 3
    bottleneck: Literal["vq", "vae"] = "vq"
    l2_normalize: bool = False  # compare latents and codes on the unit sphere
    commitment_cost: float = 0.25
    head: Literal["pixels", "proxy"] = "pixels"
    proxy: VQGANConfig | None = None
    pixel_decoder: bool = False
    signed_pixels: bool = False  # the networks see 2x - 1 and answer with it; images stay in [0, 1] outside
    reread_latents: bool = False  # what the published legacy weights were trained with: titok/official.py

    def __post_init__(self) -> None:
        self._check_nested("encoder", ViTConfig)
        self._check_nested("decoder", ViTConfig)
        self._check_nested("proxy", VQGANConfig, optional=True)
        self._check_counts("num_latent_tokens", "code_dim", "codebook_size", "channels")
        self._check_choice("bottleneck", ("vq", "vae"))
        self._check_choice("head", ("pixels", "proxy"))
        self._check_number("commitment_cost")
        self._check_flags("l2_normalize", "pixel_decoder", "signed_pixels", "reread_latents")
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        for side in (self.encoder, self.decoder):
            p = side.patch_size
            fits = isinstance(size, (tuple, list)) and len(size) == 2
            fits = fits and all(isinstance(s, int) and s >= 1 and s % p == 0 for s in size)
            self._check("image_size", fits, f"(height, width), multiples of the patch size {p}")
        object.__setattr__(self, "image_size", tuple(size))
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
        """The configuration of a published tokenizer or, for the two at 512 pixels, our reading of the paper."""
        return _lookup("tokenizer", name, TOKENIZER_PRESETS)

    def grid(self, side: Literal["encoder", "decoder"]) -> tuple[int, int]:
        """Patches along height and width."""
        p = getattr(self, side).patch_size
        return self.image_size[0] // p, self.image_size[1] // p


@dataclass(frozen=True)
class SamplingConfig(_Config):
    """How `sample_tokens` decodes; the defaults are the published ones of TiTok-L-32.

    Attributes:
        steps: forward passes; each fixes the most confident tokens. More steps than tokens is legal.
        guidance_scale: classifier-free guidance; for "constant" and "linear" the weight beyond 1, for
            "power-cosine" the weight itself (as the official code has it).
        guidance_power: exponent of "power-cosine".
        temperature: of the Gumbel noise on draw ("titok") and confidence, annealed linearly to 0.
        softmax_annealing: divide logits by a temperature that falls from 1.3 to 0.5.
        confidence: "titok": guided logit of the draw; "maskgit": its log-probability, drawn from the plain softmax.
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
        self._check_counts("steps")
        self._check_number("guidance_scale", "guidance_power", "temperature")
        self._check_flags("softmax_annealing")
        self._check_choice("guidance_schedule", ("constant", "linear", "power-cosine"))
        self._check_choice("mask_schedule", ("arccos", "cosine", "linear", "root", "square"))
        self._check_choice("confidence", ("titok", "maskgit"))


@dataclass(frozen=True)
class GeneratorConfig(_Config):
    """A MaskGIT generator over the tokens of one tokenizer.

    `architecture`: ``"vit"``, post-norm blocks as in BERT; ``"uvit"``, pre-norm blocks with long skips: `layers` of
    them in two halves around one more in the middle (20 makes 21).
    """

    num_latent_tokens: int
    codebook_size: int
    num_classes: int = 1000
    architecture: Literal["vit", "uvit"] = "vit"
    width: int = 768
    layers: int = 24
    heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1  # in training, "vit" only: after embedding, attention and MLP, and on attention weights
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # used where the caller names none

    def __post_init__(self) -> None:
        self._check_nested("sampling", SamplingConfig)
        names = ("num_latent_tokens", "codebook_size", "num_classes", "width", "layers", "heads", "mlp_width")
        self._check_counts(*names)
        self._check_choice("architecture", ("vit", "uvit"))
        self._check("heads", self.width % self.heads == 0, f"a divisor of width {self.width}")
        self._check_unit("dropout")
        if self.architecture == "uvit":
            self._check("layers", self.layers % 2 == 0, "an even number, because architecture is 'uvit'")

    @classmethod
    def preset(cls, name: str) -> GeneratorConfig:
        """The configuration of a published generator or, for the two at 512 pixels, our reading of the paper."""
        return _lookup("generator", name, GENERATOR_PRESETS)


def _two_stage(
    size: str, tokens: int, *, image_size: int = 256, patch: int = 16, legacy: bool = True
) -> TokenizerConfig:
    vit = ViTConfig.named(size, patch)
    return TokenizerConfig(
        image_size=(image_size, image_size), encoder=vit, decoder=vit, num_latent_tokens=tokens, code_dim=12,
        codebook_size=4096, l2_normalize=True, head="proxy", proxy=VQGANConfig(), pixel_decoder=True,
        reread_latents=legacy,
    )  # fmt: skip


def _single_stage(encoder: str, decoder: str, tokens: int, **bottleneck: Any) -> TokenizerConfig:
    sides: dict[str, Any] = {"encoder": ViTConfig.named(encoder, 16), "decoder": ViTConfig.named(decoder, 16)}
    return TokenizerConfig(image_size=(256, 256), num_latent_tokens=tokens, **sides, **bottleneck)


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
    # The paper's two at 512 pixels; their weights were never published. We read "patch size 32" as a 16x16 grid on
    # both sides, each decoder patch predicting the 2x2 proxy codes that it covers in the VQGAN's 32x32 grid.
    "titok-l-64-512": _two_stage("large", 64, image_size=512, patch=32, legacy=False),
    "titok-b-128-512": _two_stage("base", 128, image_size=512, patch=32, legacy=False),
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
