#include "lanes/neon.h"
#include "sparse/generic.h"

void taut::sparse_matmul_neon(const SparseMatmul& op, const Parallel& parallel) {
  ::sparse_matmul(op, parallel);
}

void taut::sparse_conv2d_neon(const SparseConv& op, const Parallel& parallel) {
  ::sparse_conv2d(op, parallel);
}
