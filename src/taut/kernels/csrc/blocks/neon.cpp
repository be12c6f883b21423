#include "lanes/neon.h"
#include "blocks/generic.h"

void taut::block_matmul_neon(const BlockMatmul& op, const Parallel& parallel) {
  ::block_matmul(op, parallel);
}
