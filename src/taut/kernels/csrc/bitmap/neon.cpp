#include "lanes/neon.h"
#include "bitmap/generic.h"

void taut::bitmap_matmul_neon(const BitmapMatmul& op, const Parallel& parallel) {
  ::bitmap_matmul(op, parallel);
}
