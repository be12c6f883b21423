#include "lanes/avx512.h"
#include "sparse/generic.h"

void taut::sparse_matmul_avx512(const SparseMatmul& op, const Parallel& parallel) {
  ::sparse_matmul(op, parallel);
}

void taut::sparse_conv2d_avx512(const SparseConv& op, const Parallel& parallel) {
  ::sparse_conv2d(op, parallel);
}
