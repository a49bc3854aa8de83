"""Fused ops of titok, for others to import: each one public function, registered as `torch.ops.titok.<op>`.

Every op has a plain-PyTorch path that runs anywhere; `backends()` tells which faster ones are there and why not.
"""

from titok.ops._extension import backends
from titok.ops._registry import last_backend
from titok.ops.add_layer_norm import add_layer_norm
from titok.ops.code_mixture import code_mixture

__all__ = ["add_layer_norm", "backends", "code_mixture", "last_backend"]
