"""MaskGIT (Chang et al. 2022): a bidirectional transformer that predicts every token of a partly masked sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.pretrained import Pretrained
from titok.checks import check_labels, check_tokens
from titok.config import GeneratorConfig
from titok.models.layers import Linear
from titok.models.transformer import PostNormTrunk, UViTTrunk, init_weights
from titok.profiling import ranged


class MaskGIT(Pretrained):
    """The generator. `MaskGIT(config)` has random weights; `MaskGIT.from_pretrained(path_or_repo)` reads them.

    Ids of its one embedding table: 0..V-1 codes, V the mask token, V+1+c class c, V+1+num_classes "class dropped".
    The class is one token in front of the K image tokens.
    """

    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = nn.Embedding(c.codebook_size + c.num_classes + 2, c.width)
        self.positions = nn.Parameter(torch.empty(1 + c.num_latent_tokens, c.width))
        self.trunk: nn.Module
        if c.architecture == "vit":
            self.trunk = PostNormTrunk(c.width, c.layers, c.heads, c.mlp_width, dropout=c.dropout)
        else:
            self.trunk = UViTTrunk(c.width, c.layers, c.heads, c.mlp_width)
        self.lm_head = Linear(c.width, c.codebook_size)
        init_weights(self, "trunc_normal")
        for table in (self.embedding.weight, self.positions):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)

    @property
    def mask_token(self) -> int:
        """The id of a token that is still to be generated: the codebook size."""
        return self.config.codebook_size

    @property
    def no_class(self) -> int:
        """The label that stands for "class dropped", to mix both kinds in one batch: the number of classes."""
        return self.config.num_classes

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @ranged("generator")
    def features(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """What `lm_head` reads: (B, K, width). Arguments and errors as `forward`."""
        check_tokens(tokens, self.config.num_latent_tokens, self.config.codebook_size + 1)
        if labels is None:
            labels = tokens.new_full((tokens.shape[0],), self.no_class)
        check_labels(labels, self.config.num_classes)
        if labels.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"labels: expected one for each of {tokens.shape[0]} rows of tokens, got {labels.shape[0]}"
            )
        ids = torch.cat([(self.mask_token + 1 + labels)[:, None], tokens], dim=1)
        return self.trunk(F.embedding(ids, self.embedding.weight) + self.positions)[:, 1:]

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits over the codebook at every position.

        Args:
            tokens: (B, K) int64, codes or `mask_token`.
            labels: (B,) int64 classes, `no_class` where the class is dropped; None drops all.

        Returns:
            (B, K, V) logits.

        Raises:
            TypeError, ValueError: wrong shape, dtype or id, naming the argument.
        """
        check_tokens(tokens, self.config.num_latent_tokens, self.config.codebook_size + 1)
        if labels is not None:
            check_labels(labels, self.config.num_classes)
            if len(labels) != len(tokens):
                raise ValueError(
                    f"labels: expected one for each of {len(tokens)} rows of tokens, got {len(labels)}"
                )
        return self.lm_head(self.features(tokens, labels))

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[GeneratorConfig, bool]:
        if official.is_official(values):
            return official.generator_config(values), True
        return GeneratorConfig.from_dict(values), False

    convert_official = staticmethod(official.generator_weights)
