"""oneDNN lays no weight out again in a call of a prepared model: that can take longer than the products do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from titok.inference import onednn

# oneDNN prints a line for everything that it runs, to the standard output of the process.
_SCRIPT = """
import sys
import torch
from titok import MaskGITVQGAN, VQGANConfig
from titok.models.vqgan import VQGANDecoder
from titok.inference.prepared import PreparableLayer
from titok.inference.workspace import Workspace

size = (int(sys.argv[1]), int(sys.argv[2]))
decoder = VQGANDecoder(VQGANConfig(), size).eval()
for parameter in decoder.parameters():
    parameter.requires_grad_(False)
for module in decoder.modules():
    if isinstance(module, PreparableLayer):
        module.prepare_weights()
codes = torch.randn(1, 256, *size)
with torch.inference_mode(), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    decoder(codes, Workspace())
"""


@pytest.mark.slow
@pytest.mark.skipif(not onednn.packs(torch.empty(1)), reason="this PyTorch does not pack weights")
@pytest.mark.parametrize("size", [(2, 2), (4, 8), (16, 16)])
def test_a_prepared_pixel_decoder_reads_its_weights_as_they_are(size: tuple[int, int]) -> None:
    command = [sys.executable, "-c", _SCRIPT, *map(str, size)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    executed = [line.split(",") for line in lines if ",exec," in line]
    kinds = [fields[fields.index("exec") + 2] for fields in executed]
    assert kinds.count("convolution") > 30
    assert kinds.count("reorder") == 0
