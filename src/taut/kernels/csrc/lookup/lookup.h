// lookup_matmul: weights as small indices into a table held in registers.
//
//     y[n, o] = Σ_k x[n, k] · table[o, k / group, index[o, k]]
//
// The indices of a row are stored in the parts of which the powers of two 8, 4, 2, 1 make up their
// bits (6 bits: a part of 4, then one of 2; the first holds the lowest bits). A part of b bits
// fills 32-bit words, sixteen side by side: bits b·s … of word 16·m + l belong to column
// 16·(m·32/b + s) + l. Words follow each other for as many columns as there are.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

struct Lookup {
  const float* x;        // [batch, in]
  const uint32_t* codes; // [out, words], the parts one after another
  const float* table;    // [out or 1, groups, 2**bits]
  float* y;              // [batch, out]
  int64_t batch, in, out;
  int64_t words;         // of one row
  int64_t table_stride;  // from one row's tables to the next, in floats; 0 for a shared one
  int64_t group;         // columns that share a table, a multiple of 128 (or `in` and more)
  int bits;              // 1 … 8
};

// How many 32-bit words the indices of one row take.
inline int64_t lookup_words(int64_t in, int bits) {
  const int64_t strips = (in + 15) / 16;
  int64_t words = 0;
  for (int part = 8; part > 0; part /= 2) {
    if (bits & part) words += 16 * ((strips * part + 31) / 32);
  }
  return words;
}

using LookupMatmul = void (*)(const Lookup&, const Parallel&);

#define TAUT_VARIANT(name, needs) void lookup_matmul_##name(const Lookup&, const Parallel&);
#include "lookup/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<LookupMatmul> kLookupVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, lookup_matmul_##name},
#include "lookup/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
