"""Fused ops of titok, for others to import: each one public function, registered as `torch.ops.titok.<op>`.

Every op has a plain-PyTorch path that runs anywhere; `backends()` tells which faster ones are there and why not.
"""

from titok.ops._extension import backends
from titok.ops._registry import last_backend
from titok.ops.maskgit_decode_step import maskgit_decode_step

__all__ = ["backends", "last_backend", "maskgit_decode_step"]
from titok.ops.nearest_codebook import nearest_codebook
from titok.ops.quantize import Quantized, quantize

__all__ = ["Quantized", "backends", "last_backend", "nearest_codebook", "quantize"]
from titok.ops.masked_attention import masked_attention

__all__ = ["backends", "last_backend", "masked_attention"]
