"""MaskGIT (Chang et al. 2022): a bidirectional transformer that predicts every token of a partly masked sequence.

Shapes: B samples, K tokens of a sample, V codes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titok.checkpoints import official
from titok.checkpoints.lazy import LazyTensor
from titok.checkpoints.pretrained import Pretrained
from titok.checks import check_labels, check_tokens
from titok.config import GeneratorConfig
from titok.inference.cuda_graphs import GraphCache
from titok.models.layers import Embedding, Linear
from titok.models.transformer import PostNormTransformer, UViT, init_weights
from titok.profiling import ranged


class MaskGIT(Pretrained):
    """The generator. `MaskGIT(config)` has random weights; `MaskGIT.from_pretrained(path_or_repo)` reads them.

    A sequence is one class token and the K image tokens. One embedding table of V + num_classes + 2 rows serves
    both: rows 0 to V - 1 are the codes, row V is the mask token, row V + 1 + c is class c, and the last row means
    "class dropped".
    """

    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding: Embedding = Embedding(c.codebook_size + c.num_classes + 2, c.width)
        self.positions: nn.Parameter = nn.Parameter(torch.empty(1 + c.num_latent_tokens, c.width))
        self.trunk: nn.Module
        if c.architecture == "vit":
            self.trunk = PostNormTransformer(c.width, c.layers, c.heads, c.mlp_width)
        else:
            self.trunk = UViT(c.width, c.layers, c.heads, c.mlp_width)
        self.lm_head: Linear = Linear(c.width, c.codebook_size)
        init_weights(self, "trunc_normal")
        for table in (self.embedding.weight, self.positions):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)
        self.graphs: GraphCache = GraphCache()  # captured with this model's weights

    @property
    def mask_token(self) -> int:
        """The id of a token that is still to be generated: the codebook size."""
        return self.config.codebook_size

    @property
    def no_class(self) -> int:
        """The label that means "class dropped": the number of classes. A batch may mix it with real classes."""
        return self.config.num_classes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.lm_head.weight.device

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits over the codebook at every position.

        In training mode the "vit" architecture applies the dropout of its configuration. Where gradients are enabled, a
        prepared model is given its weights back first.

        Args:
            tokens: (B, K) of any integer dtype, codes or `mask_token`, on the device of the model.
            labels: (B,) of any integer dtype: classes, `no_class` where the class is dropped; None drops all.

        Returns:
            (B, K, V) logits in the dtype of the model.

        Raises:
            TypeError: an argument is not a tensor of an integer dtype.
            ValueError: a shape does not fit, or an id or class is out of range.
        """
        if torch.is_grad_enabled() and self.prepared:
            self.unprepare()
        tokens = check_tokens(tokens, self.config.num_latent_tokens, self.config.codebook_size + 1)
        if labels is None:
            labels = tokens.new_full((tokens.shape[0],), self.no_class)
        else:
            labels = check_labels(labels, self.config.num_classes)
            if labels.shape[0] != tokens.shape[0]:
                raise ValueError(
                    f"labels: expected one for each of {tokens.shape[0]} rows of tokens, got {labels.shape[0]}"
                )
        ids = torch.cat([(self.mask_token + 1 + labels)[:, None], tokens], dim=1)
        return self.lm_head(self.features(ids, dropout=self.config.dropout if self.training else 0.0))

    @ranged("generator")
    def features(self, ids: Tensor, *, dropout: float = 0.0) -> Tensor:
        """What `lm_head` reads, for callers that need logits at some positions only.

        The arguments are not checked: `forward` and `sample_tokens` call this behind their own checks. Whether the
        model is in training mode makes no difference here.

        Args:
            ids: (B, 1 + K) int64 rows of the embedding table: the class token, then codes or `mask_token`.
            dropout: probability of dropout, which the "uvit" architecture does not have and ignores.

        Returns:
            (B, K, D).
        """
        x = F.embedding(ids, self.embedding.weight) + self.positions
        x = self.trunk(x, dropout=dropout) if isinstance(self.trunk, PostNormTransformer) else self.trunk(x)
        return x[:, 1:]

    def _apply(self: MaskGIT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskGIT:
        self.graphs.clear()  # they hold the memory of the weights, which are about to leave it
        return super()._apply(fn, recurse)

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> tuple[GeneratorConfig, bool]:
        """The configuration in a `config.json` of ours or of the official layout, and whether it is the latter."""
        if official.is_official(values):
            return official.generator_config(values), True
        return GeneratorConfig.from_dict(values), False

    @staticmethod
    def convert_official(
        weights: Mapping[str, LazyTensor], config: GeneratorConfig | None = None
    ) -> dict[str, LazyTensor]:
        """The tensors of an official checkpoint under the names of this model's parameters."""
        return official.generator_weights(weights, config)

    @classmethod
    def preset_config(cls, name: str) -> GeneratorConfig:
        """See `GeneratorConfig.preset`."""
        return GeneratorConfig.preset(name)
