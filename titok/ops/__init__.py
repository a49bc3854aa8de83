"""Fused ops of titok, for others to import: each one public function, registered as `torch.ops.titok.<op>`.

Every op has a plain-PyTorch path that runs anywhere; `backends()` tells which faster ones are there and why not.
"""

from titok.ops._extension import backends
from titok.ops._registry import last_backend
from titok.ops.group_norm_silu import group_norm_silu

__all__ = ["backends", "group_norm_silu", "last_backend"]
