"""Training loops: single-stage training of a tokenizer, and masked-token training of a MaskGIT generator."""

from titok.training.config import GeneratorTraining, TokenizerTraining, TrainingConfig
from titok.training.generator import tokenize_images, train_generator
from titok.training.tokenizer import train_tokenizer

__all__ = [
    "GeneratorTraining",
    "TokenizerTraining",
    "TrainingConfig",
    "tokenize_images",
    "train_generator",
    "train_tokenizer",
]
