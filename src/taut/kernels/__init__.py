"""One function per operation on packed weights, named for its arithmetic.

Each is defined in plain PyTorch by `reference.py` and runs in C++ (csrc/) where that was built;
the two must agree.
"""

from taut.kernels.hashed import hashed_matmul, hashed_weight
from taut.kernels.lookup import lookup_matmul
from taut.kernels.reference import sparse_matmul

__all__ = ["hashed_matmul", "hashed_weight", "lookup_matmul", "sparse_matmul"]
