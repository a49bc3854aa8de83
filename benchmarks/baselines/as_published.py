"""TiTok's generation step by step as the official code computes it, in our own writing: the rival of our engine.

Length-first attention by `nn.MultiheadAttention`, every norm, sum and activation an op of its own, two forward passes
for guidance, logits at every position, whole noise tensors and a sort, contiguous (NCHW) convolutions, enlarged maps
stored. It runs in three ways: float32; native bfloat16 (weights and activations); autocast (float32 weights). Nothing
of `titok` runs in it but the schedules' numbers.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from titok import MaskGIT, TiTok
from titok.config import GeneratorConfig, SamplingConfig, TokenizerConfig, VQGANConfig
from titok.generation.schedules import schedule

Predict = Callable[
    [Tensor, Tensor, float], Tensor
]  # tokens (B, K), labels (B,), share dropped -> logits (B, K, V)


class AsPublished:
    """`AsPublished(tokenizer, generator)(labels)` -> uint8 pictures (B, H, W, 3) on the CPU, from global noise.

    Args:
        tokenizer, generator: whose weights it uses, contiguous; shared where they already are, in this dtype.
        dtype: None keeps that of the models.
        autocast: run float32 weights under `torch.autocast` to bfloat16.
        attention: "math" computes scores, softmax and mixture by themselves, as before PyTorch 2.0.

    Raises:
        ValueError: the configuration is none that the official code generates with.
    """

    def __init__(
        self,
        tokenizer: TiTok,
        generator: MaskGIT,
        *,
        dtype: torch.dtype | None = None,
        autocast: bool = False,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        self.decoder = PublishedDecoder.of(tokenizer, dtype)
        self.generator = PublishedGenerator.of(generator, dtype)
        self.device, self.autocast, self.attention = generator.device, autocast, attention

    def __call__(self, labels: Sequence[int]) -> Tensor:
        return self.pictures(self.logits(self.sample(labels)))

    def sample(self, labels: Sequence[int], sampling: SamplingConfig | None = None) -> Tensor:
        """(B, K) tokens."""
        with self._ways():
            return self.generator.sample(torch.tensor(labels, device=self.device), sampling)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> logits over the proxy's codes (B, codes, h, w)."""
        with self._ways():
            return self.decoder.logits(tokens)

    def pixels(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> images (B, 3, H, W), not clamped."""
        with self._ways():
            return self.decoder.pixels(logits)

    def pictures(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> uint8 (B, H, W, 3) on the CPU, truncated as the published script does."""
        return (255.0 * self.pixels(logits).clamp(0.0, 1.0)).permute(0, 2, 3, 1).to("cpu", torch.uint8)

    def _ways(self) -> ExitStack:
        ways = ExitStack()
        ways.enter_context(torch.no_grad())
        ways.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast))
        if self.attention == "math":
            ways.enter_context(sdpa_kernel(SDPBackend.MATH))
        return ways


# --- the tokenizer's decoder


class LengthFirstBlock(nn.Module):
    """Pre-norm layer on (N, B, D)."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; where channels change, 1x1 of the result is added in place of x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, channels, eps=1e-6) for channels in (inputs, outputs))
        self.conv1, self.conv2 = (_conv(channels, outputs, bias=False) for channels in (inputs, outputs))
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Upsample(nn.Conv2d):
    """Nearest-neighbour x2, then the convolution on the enlarged map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next."""

    def __init__(self, widths: list[int], *, upsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(itertools.starmap(ResidualBlock, itertools.pairwise(widths)))
        self.upsample = Upsample(widths[-1], widths[-1], 3, padding=1) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.upsample(x)


class PixelDecoder(nn.Module):
    """Code vectors (B, code_dim, h, w) -> images."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.conv_in = _conv(config.code_dim, widths[-1])
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.levels = nn.ModuleList(
            Level([before] + [width] * config.blocks_per_level, upsample=i > 0)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = _conv(widths[0], config.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class PublishedDecoder(nn.Module):
    """Tokens to logits over the proxy's codes, and those to pixels."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        proxy = config.proxy
        if config.head != "proxy" or proxy is None or not proxy.shortcut_of_result or config.signed_pixels:
            raise ValueError("tokenizer: expected one whose decoder ends at the published proxy codes")
        vit = config.decoder
        self.grid, self.side, self.l2_normalize = (
            config.grid("decoder"),
            vit.patch_size // proxy.factor,
            config.l2_normalize,
        )
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))
        self.embed = nn.Linear(config.code_dim, vit.width)
        self.class_token = nn.Parameter(torch.empty(1, vit.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.patch_positions = nn.Parameter(torch.empty(1 + math.prod(self.grid), vit.width))
        self.latent_positions = nn.Parameter(torch.empty(config.num_latent_tokens, vit.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(vit.width), nn.LayerNorm(vit.width)
        self.blocks = nn.Sequential(
            *(LengthFirstBlock(vit.width, vit.heads, vit.mlp_ratio * vit.width) for _ in range(vit.layers))
        )
        self.head = nn.Sequential(
            nn.Conv2d(vit.width, 2 * vit.width, 1),
            nn.Tanh(),
            nn.Conv2d(2 * vit.width, proxy.codebook_size * self.side**2, 1),
        )
        self.pixel_decoder: PixelDecoder | None = None
        if config.pixel_decoder:
            self.pixel_codebook = nn.Parameter(torch.empty(proxy.codebook_size, proxy.code_dim))
            self.pixel_decoder = PixelDecoder(proxy)

    @classmethod
    def of(cls, tokenizer: TiTok, dtype: torch.dtype | None = None) -> PublishedDecoder:
        """With the weights of ours, in `dtype`."""
        weights = {}
        for name, value in tokenizer.state_dict().items():
            if name.startswith("encoder."):
                continue
            name = re.sub(r"^(quantizer|decoder\.trunk|decoder)\.", "", name)
            name = name.replace("attn.qkv.", "attn.in_proj_").replace("attn.proj.", "attn.out_proj.")
            weights[name] = value[..., None, None] if re.match(r"head\.\d\.weight", name) else value
        return _filled(lambda: cls(tokenizer.config), weights, dtype)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, K) -> (B, codes, h, w)."""
        batch, (h, w) = len(tokens), self.grid
        latents = F.embedding(tokens.reshape(-1), self.codebook)
        if self.l2_normalize:
            latents = F.normalize(latents, dim=-1)
        latents = rearrange(latents, "(b k) c -> b c 1 k", b=batch).contiguous()
        x = self.embed(latents.flatten(1, 2).permute(0, 2, 1))
        masks = self.mask_token.repeat(batch, h * w, 1).to(x.dtype)
        masks = torch.cat([self.class_token[None].expand(batch, -1, -1).to(x.dtype), masks], dim=1)
        masks = masks + self.patch_positions.to(x.dtype)
        x = self.norm_pre(torch.cat([masks, x + self.latent_positions], dim=1))
        x = self.blocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.norm_post(x[:, 1 : 1 + h * w])
        x = self.head(x.permute(0, 2, 1).reshape(batch, -1, h, w).contiguous())
        if self.side == 1:
            return x
        return rearrange(x, "b (r s c) h w -> b c (h r) (w s)", r=self.side, s=self.side)

    def pixels(self, logits: Tensor) -> Tensor:
        """logits (B, codes, h, w) -> images (B, 3, H, W)."""
        if self.pixel_decoder is None:
            raise ValueError("tokenizer: expected one with a pixel decoder, got one that ends at proxy logits")
        return self.pixel_decoder(torch.einsum("nchw,cd->ndhw", logits.softmax(1), self.pixel_codebook))


# --- the generators


class BertLayer(nn.Module):
    """Post-norm layer; queries, keys and values by three products."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.mlp = _mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (linear(x).view(split).transpose(1, 2) for linear in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(self.proj(mixed) + x)
        return self.norm2(self.mlp(x) + x)


class Bert(nn.Module):
    """The published "ViT": three embeddings, a norm, post-norm layers."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        # Our tables of positions hold the one row of token types that was ever used: here it is added as zeros.
        self.types = nn.Parameter(torch.zeros(1, config.width), requires_grad=False)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.blocks = nn.Sequential(
            *(BertLayer(config.width, config.heads, config.mlp_width) for _ in range(config.layers))
        )

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        return self.blocks(self.norm(words + self.types + positions))


class UViTBlock(nn.Module):
    """Pre-norm layer whose attention runs in float32 even where the rest does not."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = _mlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x))
        wide = qkv if qkv.dtype == torch.float64 else qkv.float()
        q, k, v = rearrange(wide, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        # Converted back: the official code stops here with an error when its weights are bfloat16.
        x = x + self.proj(mixed.to(qkv.dtype))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """U-ViT (Bao et al. 2023)."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width, half = config.width, config.layers // 2
        shape = (width, config.heads, config.mlp_width)
        self.in_blocks, self.out_blocks = (nn.ModuleList(UViTBlock(*shape) for _ in range(half)) for _ in range(2))
        self.mid_block = UViTBlock(*shape)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(half))
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        x, stack = words + positions, []
        for block in self.in_blocks:
            x = block(x)
            stack.append(x)
        x = self.mid_block(x)
        for block, skip in zip(self.out_blocks, self.skips, strict=True):
            x = block(skip(torch.cat([x, stack.pop()], dim=-1)))
        return self.norm(x)


class PublishedGenerator(nn.Module):
    """Class and partly masked tokens to logits; `sample` draws."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size + config.num_classes + 2, config.width)
        self.positions = nn.Parameter(torch.empty(1 + config.num_latent_tokens, config.width))
        self.trunk = Bert(config) if config.architecture == "vit" else UViT(config)
        self.lm_head = nn.Linear(config.width, config.codebook_size)

    @classmethod
    def of(cls, generator: MaskGIT, dtype: torch.dtype | None = None) -> PublishedGenerator:
        """With the weights of ours, in `dtype`."""
        weights = dict(generator.state_dict())
        if generator.config.architecture == "vit":
            weights["trunk.types"] = torch.zeros_like(weights["positions"][:1])
            for name in [name for name in weights if ".attn." in name]:
                value, short = weights.pop(name), name.replace("attn.", "")
                if "qkv" not in name:
                    weights[short] = value
                    continue
                for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    weights[short.replace("qkv", part)] = rows
        else:
            weights = {name.replace("attn.", ""): value for name, value in weights.items()}
        return _filled(lambda: cls(generator.config), weights, dtype)

    def forward(self, tokens: Tensor, labels: Tensor, drop: float) -> Tensor:
        """tokens (B, K), labels (B,) -> (B, K, V); a class is dropped where a uniform number is below `drop`."""
        codes, classes = self.config.codebook_size, self.config.num_classes
        labels = torch.where(torch.rand(labels.shape, device=labels.device) < drop, classes, labels)
        words = self.embedding(torch.cat([(codes + 1 + labels)[:, None], tokens], dim=1))
        return self.lm_head(self.trunk(words, self.positions)[:, 1:])

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: SamplingConfig | None = None) -> Tensor:
        """labels (B,) -> tokens (B, K)."""
        config = self.config
        steps = sample_steps(
            self, labels, config.num_latent_tokens, config.codebook_size, sampling or config.sampling
        )
        return steps[-1]


# --- the loop


def sample_steps(
    predict: Predict,
    labels: Tensor,
    length: int,
    mask_token: int,
    sampling: SamplingConfig,
    uniform: Callable[[Tensor], Tensor] = torch.rand_like,
) -> list[Tensor]:
    """Tokens (B, length) as they enter each step, and at last the result.

    Args:
        predict: called once or twice a step, with nothing dropped, then all.
        uniform: tensor -> uniform numbers in [0, 1) of its shape; per step first for the logits, then for the drawn.
    """
    if sampling.confidence != "titok":
        raise ValueError(f"sampling.confidence: expected 'titok', the published one, got {sampling.confidence!r}")
    tokens = torch.full((len(labels), length), mask_token, device=labels.device)
    history = [tokens]
    for step in schedule(sampling):
        masked = tokens == mask_token
        logits = predict(tokens, labels, 0.0)
        if step.guidance != 1.0 or sampling.guidance_schedule == "power-cosine":
            logits = logits + (logits - predict(tokens, labels, 1.0)) * (step.guidance - 1.0)
        if sampling.softmax_annealing:
            logits = logits / step.softmax_temperature
        drawn = _perturbed(logits, step.noise_temperature, uniform).argmax(dim=-1)
        scores = logits.gather(-1, drawn[..., None]).squeeze(-1)
        drawn = torch.where(masked, drawn, tokens)
        scores = torch.where(masked, scores, math.inf).float()
        # How many stay masked is row 0's count for all rows, and what ties with the last of them does too.
        most = torch.tensor([math.floor(length * step.mask_ratio)], device=labels.device)
        left = torch.minimum(masked.sum(-1, keepdim=True) - 1, most).clamp(min=1)[0, 0]
        confidence = _perturbed(scores, step.noise_temperature, uniform)
        cut = confidence.sort(dim=-1).values[:, left - 1 : left]
        tokens = drawn if step.final else torch.where(confidence <= cut, mask_token, drawn)
        history.append(tokens)
    return history


def _perturbed(x: Tensor, temperature: float, uniform: Callable[[Tensor], Tensor]) -> Tensor:
    """x plus Gumbel noise."""
    noise = -torch.log((-torch.log(uniform(x).clamp(min=1e-20))).clamp(min=1e-20))
    return x + temperature * noise


# --- parts


def _mlp(width: int, hidden: int) -> nn.Sequential:
    layers: dict[str, Any] = {"fc1": nn.Linear(width, hidden), "gelu": nn.GELU(), "fc2": nn.Linear(hidden, width)}
    mlp = nn.Sequential()
    for name, layer in layers.items():
        mlp.add_module(name, layer)
    return mlp


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _filled(make: Callable[[], Any], weights: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    """A model whose parameters are `weights`, each of them used."""
    with torch.device("meta"):
        model = make()
    contiguous = {name: value.detach().to(dtype or value.dtype).contiguous() for name, value in weights.items()}
    model.load_state_dict(contiguous, strict=True, assign=True)
    return model.eval().requires_grad_(False)
