"""Public switch of inference: in `with engine.plain():`, models and ops compute as in training, in plain PyTorch."""

from titok.inference.prepared import plain
from titok.inference.prepared_weights import PreparedError

__all__ = ["PreparedError", "plain"]
