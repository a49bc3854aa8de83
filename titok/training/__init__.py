"""Training of every model: the 2D tokenizer, the two stages and the single stage of TiTok, and generators.

Each recipe is a frozen dataclass of settings and a function that trains by it. `titok.training.presets` has the
published settings.
"""

from titok.training.config import (
    DecoderTraining,
    GeneratorTraining,
    ProxyTraining,
    TokenizerTraining,
    TrainingConfig,
    VQGANTraining,
)
from titok.training.decoder import join_stages, train_decoder
from titok.training.generator import tokenize_images, train_generator
from titok.training.metrics import read_metrics
from titok.training.proxy import train_proxy
from titok.training.tokenizer import train_tokenizer
from titok.training.vqgan import train_vqgan

__all__ = [
    "DecoderTraining",
    "GeneratorTraining",
    "ProxyTraining",
    "TokenizerTraining",
    "TrainingConfig",
    "VQGANTraining",
    "join_stages",
    "read_metrics",
    "tokenize_images",
    "train_decoder",
    "train_generator",
    "train_proxy",
    "train_tokenizer",
    "train_vqgan",
]
