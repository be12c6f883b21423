// lookup_matmul_int8: weights as small indices into a table of int8, times int8.
//
//     y[n, o] = scale[o] · Σ_k x[n, k] · table[o, index[o, k]]
//
// The sum is exact, in 32 bits, which bounds the columns; it becomes a float once. The indices lie
// as lookup/lookup.h says.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

struct LookupInt8 {
  const int8_t* x;       // [batch, in]
  const uint32_t* codes; // [out, words]
  const int8_t* table;   // [out or 1, 2**bits]
  const float* scale;    // [out]
  float* y;              // [batch, out]
  int64_t batch, in, out;
  int64_t words;         // of one row
  int64_t table_stride;  // from one row's table to the next; 0 for a shared one
  int bits;              // 1 … 8
};

constexpr int64_t kLookupInt8Columns = (1 << 17) - 1;  // times 128 · 128 stays below 2**31

using LookupMatmulInt8 = void (*)(const LookupInt8&, const Parallel&);

#define TAUT_VARIANT(name, needs) \
  void lookup_matmul_int8_##name(const LookupInt8&, const Parallel&);
#include "lookup_int8/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<LookupMatmulInt8> kLookupInt8Variants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, lookup_matmul_int8_##name},
#include "lookup_int8/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
