"""Public switch of inference: in `with engine.plain():`, models and ops compute as in training, in plain PyTorch."""

from titok.inference.prepared import PreparedError, plain

__all__ = ["PreparedError", "plain"]
