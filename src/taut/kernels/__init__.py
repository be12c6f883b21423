"""One function per operation on packed weights, named for its arithmetic.

Each is defined in plain PyTorch by `reference.py`; a faster implementation must agree with it.
"""

from taut.kernels.reference import lookup_matmul, sparse_matmul

__all__ = ["lookup_matmul", "sparse_matmul"]
