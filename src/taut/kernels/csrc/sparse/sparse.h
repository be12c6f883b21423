// sparse_matmul: weights as compressed rows; sparse_conv2d: the same product over shifted images.
//
//     y[n, o] = Σ_j x[n, columns[j]] · value[j]        for starts[o] <= j < starts[o + 1]
//
//     y[n, o, p, q] = Σ_j x[n, c, p·stride + kh·dilation - padding, q·…] · value[j]
//                                                      (c, kh, kw) flattened = columns[j]
//
// A weight that is not stored is no term of the sum: what x holds there does not matter.
//
// Trust: whoever calls has checked that starts rise from 0 to the number of values. Columns are
// limited to those that exist and indices to the table, so that bad ones give wrong sums but read
// nothing else.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

enum class Values {
  kFloat,
  kHalf,
  kBfloat16,
  kInt8,   // times the scale of the row
  kIndex,  // into a table, 8 bits each
};

struct SparseRows {
  const int32_t* starts;  // [out + 1]
  const void* columns;    // [count] uint16_t, or int32_t where wide
  const void* values;     // [count] of `kind`
  const float* scale;     // [out], for kInt8
  const float* table;     // [256], for kIndex, zeros after its entries
  int64_t in, out, count;
  Values kind;
  bool wide;
  bool small_table;  // no more than 16 entries
};

struct SparseMatmul {
  SparseRows rows;
  const float* x;  // [batch, in]
  float* y;        // [batch, out]
  int64_t batch;
};

struct SparseConv {
  SparseRows rows;  // in: channels / groups · kernel[0] · kernel[1]
  const float* x;   // [batch, channels, size[0], size[1]]
  float* y;         // [batch, out, out_size[0], out_size[1]]
  int64_t batch, channels, groups;
  int64_t size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];
};

using SparseMatmulRun = void (*)(const SparseMatmul&, const Parallel&);
using SparseConvRun = void (*)(const SparseConv&, const Parallel&);

#define TAUT_VARIANT(name, needs)                                    \
  void sparse_matmul_##name(const SparseMatmul&, const Parallel&);   \
  void sparse_conv2d_##name(const SparseConv&, const Parallel&);
#include "sparse/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<SparseMatmulRun> kSparseMatmulVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, sparse_matmul_##name},
#include "sparse/variants.inc"
#undef TAUT_VARIANT
};

inline constexpr Variant<SparseConvRun> kSparseConvVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, sparse_conv2d_##name},
#include "sparse/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
