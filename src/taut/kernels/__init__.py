"""One function per operation on packed weights, named for its arithmetic.

Each is defined in plain PyTorch by `reference.py` and runs in C++ (csrc/) where that was built;
the two must agree.
"""

from taut.kernels.bitplane import BitWeights, Levels, bitplane_conv2d, bitplane_matmul
from taut.kernels.cells import gru_cell, lstm_cell
from taut.kernels.hashed import hashed_matmul, hashed_rows, hashed_weight, wrap_buckets
from taut.kernels.lookup import lookup_lstm, lookup_matmul, lookup_matmul_int8
from taut.kernels.sparse import bitmap_matmul, block_matmul, sparse_conv2d, sparse_matmul

__all__ = [
    "BitWeights",
    "Levels",
    "bitmap_matmul",
    "bitplane_conv2d",
    "bitplane_matmul",
    "block_matmul",
    "gru_cell",
    "hashed_matmul",
    "hashed_rows",
    "hashed_weight",
    "lookup_lstm",
    "lookup_matmul",
    "lookup_matmul_int8",
    "lstm_cell",
    "sparse_conv2d",
    "sparse_matmul",
    "wrap_buckets",
]
