"""Fused ops of titok, for others to import: each one public function, registered as `torch.ops.titok.<op>`.

Every op has a plain-PyTorch path that runs anywhere; `backends()` tells which faster ones are there and why not.
Importing this package registers the ops: `torch.export.load` needs that for a program that calls them.
"""

from titok.ops.add_layer_norm import add_layer_norm, layer_norm, layer_norm_of_sum
from titok.ops.attention import attention
from titok.ops.code_mixture import code_mixture
from titok.ops.core.available import backends
from titok.ops.core.mode import is_ordinary, is_plain, last_backend, last_backends, only_plain, through_dispatcher
from titok.ops.group_norm_silu import group_norm_silu
from titok.ops.masked_attention import masked_attention
from titok.ops.masked_decode_partial import (
    SplitDecode,
    begin_masked_decode,
    finish_masked_decode,
    masked_decode_partial,
    masked_decode_reduce,
)
from titok.ops.masked_decode_step import DecodeStep, masked_decode_step
from titok.ops.maskgit_decode_params import pack_step_params
from titok.ops.maskgit_decode_step import maskgit_decode_step, maskgit_decode_step_packed
from titok.ops.nearest_codebook import nearest_codebook
from titok.ops.quantize import Quantized, quantize

__all__ = [
    "DecodeStep",
    "Quantized",
    "SplitDecode",
    "add_layer_norm",
    "attention",
    "backends",
    "begin_masked_decode",
    "code_mixture",
    "finish_masked_decode",
    "group_norm_silu",
    "is_ordinary",
    "is_plain",
    "last_backend",
    "last_backends",
    "layer_norm",
    "layer_norm_of_sum",
    "masked_attention",
    "masked_decode_partial",
    "masked_decode_reduce",
    "masked_decode_step",
    "maskgit_decode_step",
    "maskgit_decode_step_packed",
    "nearest_codebook",
    "only_plain",
    "pack_step_params",
    "quantize",
    "through_dispatcher",
]
