// block_matmul: weights as blocks of R rows and one column, R = 4 or 16.
//
//     y[n, R·b + r] = Σ_j x[n, columns[j]] · values[j, r]       for starts[b] <= j < starts[b + 1]
//
// Weights outside the blocks are no terms of the sum: what x holds there does not matter.
//
// Trust: whoever calls has checked that starts rise from 0 to the number of blocks. Columns are
// limited to those that exist.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

struct BlockMatmul {
  const float* x;           // [batch, in]
  const int32_t* starts;    // [(out + R - 1) / R + 1]
  const uint16_t* columns;  // [count]
  const void* values;       // [count, R] float, or IEEE half where `half`
  float* y;                 // [batch, out]
  int64_t batch, in, out, count;
  int64_t rows;  // R
  bool half;
};

using BlockMatmulRun = void (*)(const BlockMatmul&, const Parallel&);

#define TAUT_VARIANT(name, needs) void block_matmul_##name(const BlockMatmul&, const Parallel&);
#include "blocks/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<BlockMatmulRun> kBlockMatmulVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, block_matmul_##name},
#include "blocks/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
