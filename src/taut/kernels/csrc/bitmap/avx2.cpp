#include "lanes/avx2.h"
#include "bitmap/generic.h"

void taut::bitmap_matmul_avx2(const BitmapMatmul& op, const Parallel& parallel) {
  ::bitmap_matmul(op, parallel);
}
