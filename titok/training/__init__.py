"""Training, plain and small: the tokenizer's single-stage loop and MaskGIT's masked-token loop."""

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
