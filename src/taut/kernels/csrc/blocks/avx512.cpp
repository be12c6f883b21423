#include "lanes/avx512.h"
#include "blocks/generic.h"

void taut::block_matmul_avx512(const BlockMatmul& op, const Parallel& parallel) {
  ::block_matmul(op, parallel);
}
