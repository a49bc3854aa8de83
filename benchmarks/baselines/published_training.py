"""Training steps as the official code computes them, in plain PyTorch: losses as functions of images or tokens.

The modules take the weights of titok's models, so that both sides start from the same loss. Feature maps are contiguous
(NCHW), transformers have the sequence in the first dimension, and the distances to all codes are stored.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.baselines.published_decoder import LengthFirstBlock, PixelDecoder, PublishedDecoder, ResidualBlock
from benchmarks.baselines.published_generator import PublishedGenerator
from benchmarks.baselines.published_parts import conv3x3, with_weights
from titok import MaskGIT, TiTok
from titok.config import GeneratorConfig, TokenizerConfig, VQGANConfig
from titok.models.vqgan import MaskGITVQGAN


class EncoderLevel(nn.Module):
    """The residual blocks of one resolution."""

    def __init__(self, before: int, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(before if i == 0 else width, width) for i in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class PixelEncoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, code_dim, h, w) of a MaskGIT-VQGAN."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.hidden_channels * m for m in config.channel_multipliers]
        self.conv_in = conv3x3(config.channels, config.hidden_channels, bias=False)
        before = [config.hidden_channels, *widths[:-1]]
        self.levels = nn.ModuleList(
            EncoderLevel(b, w, config.blocks_per_level) for b, w in zip(before, widths, strict=True)
        )
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.levels) - 1:
                x = F.avg_pool2d(x, 2)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

    @classmethod
    def of(cls, vqgan: MaskGITVQGAN) -> PixelEncoder:
        weights = {
            name.removeprefix("encoder."): v for name, v in vqgan.state_dict().items() if "encoder." in name
        }
        return with_weights(lambda: cls(vqgan.config), weights, None)


class LatentEncoder(nn.Module):
    """Images (B, 3, H, W) -> latents (B, K, C) of a TiTok."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit, patches = config.encoder, config.grid("encoder")[0] * config.grid("encoder")[1]
        self.latents, self.reread = config.num_latent_tokens, config.reread_latents
        self.patch_embed = nn.Conv2d(config.channels, vit.width, vit.patch_size, stride=vit.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, vit.width))
        self.patch_positions = nn.Parameter(torch.empty(1 + patches, vit.width))
        self.latent_tokens = nn.Parameter(torch.empty(self.latents, vit.width))
        self.latent_positions = nn.Parameter(torch.empty(self.latents, vit.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(vit.width), nn.LayerNorm(vit.width)
        self.blocks = nn.Sequential(
            *(LengthFirstBlock(vit.width, vit.heads, vit.mlp_ratio * vit.width) for _ in range(vit.layers))
        )
        outputs = 2 * config.code_dim if config.bottleneck == "vae" else config.code_dim
        self.project = nn.Conv2d(vit.width, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        batch = len(images)
        x = self.patch_embed(images).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(batch, 1, -1), x], dim=1) + self.patch_positions
        latents = self.latent_tokens.expand(batch, -1, -1) + self.latent_positions
        x = self.norm_pre(torch.cat([x, latents], dim=1))
        x = self.blocks(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = self.norm_post(x[:, -self.latents :])
        # The published weights of some models were trained with the rows read as if they were columns.
        x = x.reshape(batch, -1, self.latents) if self.reread else x.permute(0, 2, 1)
        return self.project(x[:, :, None])[:, :, 0].permute(0, 2, 1)

    @classmethod
    def of(cls, tokenizer: TiTok) -> LatentEncoder:
        weights = {}
        for name, value in tokenizer.encoder.state_dict().items():
            name = name.replace("trunk.", "").replace("attn.qkv.", "attn.in_proj_")
            name = name.replace("attn.proj.", "attn.out_proj.")
            weights[name] = value[..., None, None] if name == "project.weight" else value
        return with_weights(lambda: cls(tokenizer.config), weights, None)


def nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code, for latents (n, C) and codes (V, C), by the distances to all of them."""
    distances = latents.square().sum(1, keepdim=True) + codebook.square().sum(1)
    distances = distances - 2 * torch.einsum("nc,cv->nv", latents, codebook.T)
    return distances.argmin(dim=1)


def quantize(latents: Tensor, codebook: Tensor, *, l2_normalize: bool) -> tuple[Tensor, Tensor]:
    """Latents (B, K, C) -> straight-through codes (B, K, C), and the codebook and commitment loss."""
    flat, codes = latents.reshape(-1, latents.shape[-1]), codebook
    if l2_normalize:
        flat, codes, latents = (F.normalize(x, dim=-1) for x in (flat, codes, latents))
    found = F.embedding(nearest(flat, codes), codebook).view(latents.shape)
    if l2_normalize:
        found = F.normalize(found, dim=-1)
    loss = 0.25 * (found.detach() - latents).square().mean() + (found - latents.detach()).square().mean()
    return latents + (found - latents).detach(), loss


class PublishedStage(nn.Module):
    """Stage 1, whose targets are the codes of a MaskGIT-VQGAN, or with `pixels` stage 2 with a squared error alone."""

    def __init__(self, tokenizer: TiTok, vqgan: MaskGITVQGAN, *, pixels: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = LatentEncoder.of(tokenizer), PublishedDecoder.of(tokenizer)
        self.requires_grad_(True)
        self.config, self.pixels = tokenizer.config, pixels
        if pixels:
            self.encoder.requires_grad_(False)
            self.decoder.codebook.requires_grad_(False)
        self._proxy = (PixelEncoder.of(vqgan), vqgan.codebook.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.pixels):
            latents = self.encoder(images)
            codes, bottleneck = quantize(latents, self.decoder.codebook, l2_normalize=self.config.l2_normalize)
        logits = self._logits(codes)
        if self.pixels:
            return F.mse_loss(self.decoder.pixels(logits), images)
        with torch.no_grad():
            features = rearrange(self._proxy[0](images), "b c h w -> (b h w) c")
            targets = nearest(features, self._proxy[1]).view(len(images), *logits.shape[2:])
        return F.cross_entropy(logits, targets) + bottleneck

    def _logits(self, codes: Tensor) -> Tensor:
        """`PublishedDecoder.logits` from code vectors (B, K, C), through which a gradient passes."""
        d = self.decoder
        x = decode_features(d, codes)
        return x if d.side == 1 else rearrange(x, "b (r s c) h w -> b c (h r) (w s)", r=d.side, s=d.side)


def decode_features(d: PublishedDecoder | PixelHeadDecoder, codes: Tensor) -> Tensor:
    """Code vectors (B, K, C) -> what the head predicts of each patch, (B, values, h, w)."""
    h, w = d.grid
    masks = torch.cat([d.class_token[None], d.mask_token.repeat(1, h * w, 1)], dim=1).repeat(len(codes), 1, 1)
    x = torch.cat([masks + d.patch_positions, d.embed(codes) + d.latent_positions], dim=1)
    x = d.blocks(d.norm_pre(x).permute(1, 0, 2)).permute(1, 0, 2)
    x = d.norm_post(x[:, 1 : 1 + h * w])
    return d.head(x.permute(0, 2, 1).reshape(len(codes), -1, h, w).contiguous())


class PixelHeadDecoder(nn.Module):
    """The decoder of a single-stage tokenizer: a 1x1 convolution to the pixels of each patch, then a 3x3 one."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        vit = config.decoder
        self.grid, self.side = config.grid("decoder"), vit.patch_size
        if config.bottleneck == "vq":
            self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))
        self.embed = nn.Linear(config.code_dim, vit.width)
        self.class_token = nn.Parameter(torch.empty(1, vit.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, vit.width))
        self.patch_positions = nn.Parameter(torch.empty(1 + self.grid[0] * self.grid[1], vit.width))
        self.latent_positions = nn.Parameter(torch.empty(config.num_latent_tokens, vit.width))
        self.norm_pre, self.norm_post = nn.LayerNorm(vit.width), nn.LayerNorm(vit.width)
        self.blocks = nn.Sequential(
            *(LengthFirstBlock(vit.width, vit.heads, vit.mlp_ratio * vit.width) for _ in range(vit.layers))
        )
        self.head = nn.Sequential(nn.Conv2d(vit.width, config.channels * self.side**2, 1))
        self.smooth = nn.Conv2d(config.channels, config.channels, 3, padding=1)


def sample(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, K, 2C) of a VAE -> a sample (B, K, C), and the KL divergence in nats per image."""
    mean, logvar = parameters.chunk(2, dim=-1)
    logvar = logvar.clamp(-30.0, 20.0)
    drawn = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, device=mean.device)
    return drawn, 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / len(mean)


class PublishedSingleStage(nn.Module):
    """A single-stage tokenizer with a squared error, and the quantizer's loss or the weighted KL divergence."""

    def __init__(self, tokenizer: TiTok, kl_weight: float) -> None:
        super().__init__()
        self.config, self.kl_weight = tokenizer.config, kl_weight
        self.encoder = LatentEncoder.of(tokenizer)
        self.decoder = with_weights(
            lambda: PixelHeadDecoder(tokenizer.config), PublishedDecoder.weights_of(tokenizer), None
        )
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        signed, d = self.config.signed_pixels, self.decoder
        latents = self.encoder(2 * images - 1 if signed else images)
        if self.config.bottleneck == "vae":
            codes, divergence = sample(latents)
            bottleneck = self.kl_weight * divergence
        else:
            codes, bottleneck = quantize(latents, d.codebook, l2_normalize=self.config.l2_normalize)
        pixels = rearrange(decode_features(d, codes), "b (r s c) h w -> b c (h r) (w s)", r=d.side, s=d.side)
        pixels = d.smooth(pixels)
        return F.mse_loss(0.5 * pixels + 0.5 if signed else pixels, images) + bottleneck


class PublishedVQGAN(nn.Module):
    """A MaskGIT-VQGAN with a squared error and the quantizer's loss."""

    def __init__(self, vqgan: MaskGITVQGAN) -> None:
        super().__init__()
        self.encoder = PixelEncoder.of(vqgan)
        weights = {
            re.sub(r"^decoder\.", "", n): v for n, v in vqgan.state_dict().items() if n.startswith("decoder.")
        }
        self.decoder = with_weights(lambda: PixelDecoder(vqgan.config), weights, None)
        self.codebook = nn.Parameter(vqgan.codebook.detach().clone())
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        codes, bottleneck = quantize(
            rearrange(features, "b c h w -> b (h w) c"), self.codebook, l2_normalize=False
        )
        h, w = features.shape[2:]
        pixels = self.decoder(rearrange(codes, "b (h w) c -> b c h w", h=h, w=w).contiguous())
        return F.mse_loss(pixels, images) + bottleneck


class PublishedMaskGIT(nn.Module):
    """A generator with the loss of masked tokens: label smoothing 0.1, weight 0.1 for tokens that are not masked."""

    def __init__(self, generator: MaskGIT) -> None:
        super().__init__()
        self.config: GeneratorConfig = generator.config
        self.model = PublishedGenerator.of(generator).requires_grad_(True)

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(tokens.masked_fill(mask, self.config.codebook_size), labels, 0.0)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=0.1)
        weights = torch.where(mask.flatten(), 1.0, 0.1)
        return (losses * weights).sum() / (weights.sum() + 1e-8)
