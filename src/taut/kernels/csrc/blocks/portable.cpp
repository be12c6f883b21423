#include "lanes/portable.h"
#include "blocks/generic.h"

void taut::block_matmul_portable(const BlockMatmul& op, const Parallel& parallel) {
  ::block_matmul(op, parallel);
}
