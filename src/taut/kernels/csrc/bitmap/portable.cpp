#include "lanes/portable.h"
#include "bitmap/generic.h"

void taut::bitmap_matmul_portable(const BitmapMatmul& op, const Parallel& parallel) {
  ::bitmap_matmul(op, parallel);
}
