"""A packed forward takes its packed weights, its activations, and no more than 1 MiB beside."""

import subprocess
import sys

import pytest

from .conftest import needs_native

FORWARD = """
import torch
from torch import nn
from taut.kernels import BitWeights, Levels, bitplane_matmul, hashed_matmul
from taut.layers import pack_layer, run_dense
from taut.measure import peak_memory, tensor_bytes
from taut.packed import Plain
from taut.sparse_weight import SparseWeight
from taut.techniques.share_values import SharedValues

torch.set_num_threads(2)
kind, batch, side = {kind!r}, {batch}, 2048
layer = nn.Linear(side, side, bias=False)
weight = layer.weight.detach()
x = torch.randn(batch, side)
if kind == "shared":
    index = torch.randint(0, 16, weight.shape)
    pack_layer(layer, {{"weight": SharedValues(index, Plain.of(torch.randn(16)))}})
elif kind == "sparse":
    mask = torch.rand(weight.shape) > 0.9
    pack_layer(layer, {{"weight": SparseWeight(mask, Plain.of(weight[mask]))}})
else:
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.buckets = nn.Buffer(torch.randn(side * side // 64))
        def forward(self, x):
            if kind == "hashed":
                return hashed_matmul(x, self.buckets, side, 1, 16)
            return bitplane_matmul(x, bits, Levels.sign())
    layer = Product()
    bits = BitWeights.pack(torch.rand(side, 1, side) > 0.5, torch.rand(side, 1))
if kind in ("shared", "sparse"):
    run_dense(layer, False)
activations = 2 * 4 * batch * side
with torch.no_grad():
    beside = peak_memory(layer, ((x,), {{}})) - tensor_bytes(layer)
print(beside - activations + torch.ops.taut.scratch_bytes())
"""


@needs_native
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("kind", ["shared", "sparse", "bits", "hashed"])
def test_a_forward_takes_little_beside_weights_and_activations(kind: str, batch: int) -> None:
    script = FORWARD.format(kind=kind, batch=batch)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 2**20
