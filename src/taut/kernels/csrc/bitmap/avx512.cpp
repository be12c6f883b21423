#include "lanes/avx512.h"
#include "bitmap/generic.h"

void taut::bitmap_matmul_avx512(const BitmapMatmul& op, const Parallel& parallel) {
  ::bitmap_matmul(op, parallel);
}
