"""Losses of training: pure functions and small classes that know nothing of models' files, optimizers or processes."""

from titok.training.losses.adversarial import generator_adversarial_loss, hinge_discriminator_loss
from titok.training.losses.kl import kl_loss
from titok.training.losses.lecam import LeCamAverages, lecam_regularization
from titok.training.losses.perceptual import (
    LogitsDistance,
    LPIPSDistance,
    PerceptualLoss,
    convnext_small_distance,
    lpips_distance,
)
from titok.training.losses.proxy import proxy_code_loss
from titok.training.losses.reconstruction import reconstruction_loss
from titok.training.losses.tokenizer import call_detached, discriminator_loss, generator_loss

__all__ = [
    "LPIPSDistance",
    "LeCamAverages",
    "LogitsDistance",
    "PerceptualLoss",
    "call_detached",
    "convnext_small_distance",
    "discriminator_loss",
    "generator_adversarial_loss",
    "generator_loss",
    "hinge_discriminator_loss",
    "kl_loss",
    "lecam_regularization",
    "lpips_distance",
    "proxy_code_loss",
    "reconstruction_loss",
]
