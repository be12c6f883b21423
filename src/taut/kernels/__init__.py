"""One function per operation on packed weights, named for its arithmetic.

Each is defined in plain PyTorch by `reference.py` and runs in C++ (csrc/) where that was built;
the two must agree. `sparse_matmul` here is the definition on positions; the kernel on compressed
rows is `sparse.sparse_matmul`.
"""

from taut.kernels.lookup import lookup_matmul
from taut.kernels.reference import sparse_matmul
from taut.kernels.sparse import bitmap_matmul, block_matmul, sparse_conv2d

__all__ = ["bitmap_matmul", "block_matmul", "lookup_matmul", "sparse_conv2d", "sparse_matmul"]
