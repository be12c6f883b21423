#include "lanes/avx2.h"
#include "blocks/generic.h"

void taut::block_matmul_avx2(const BlockMatmul& op, const Parallel& parallel) {
  ::block_matmul(op, parallel);
}
