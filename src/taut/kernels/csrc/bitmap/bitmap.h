// bitmap_matmul: weights of which a mask says where they are; N:M sparsity is one case.
//
//     y[n, o] = Σ_i x[n, i] · W[o, i]
//     W[o, i] = the next of the kept values where bit i % 16 of masks[o, i / 16] is set, else 0
//
// Kept values follow each other row by row; starts[o, i / 128] says how many come before a block
// of 128 columns. Zeros are terms of the sum: where x is infinite or no number, so is y.
//
// Nothing outside the arrays is read, whatever masks and starts hold.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

struct BitmapMatmul {
  const float* x;         // [batch, in]
  const uint16_t* masks;  // [out, (in + 15) / 16]
  const int32_t* starts;  // [out, (in + 127) / 128]
  const void* values;     // [count] float, or IEEE half where `half`
  float* y;               // [batch, out]
  int64_t batch, in, out, count;
  bool half;
};

using BitmapMatmulRun = void (*)(const BitmapMatmul&, const Parallel&);

#define TAUT_VARIANT(name, needs) void bitmap_matmul_##name(const BitmapMatmul&, const Parallel&);
#include "bitmap/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<BitmapMatmulRun> kBitmapMatmulVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, bitmap_matmul_##name},
#include "bitmap/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
