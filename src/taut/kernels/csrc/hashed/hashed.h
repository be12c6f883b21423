// hashed_matmul: weights drawn from a few buckets by a hash, and made anew whenever they are used.
//
//     y[n, o] = Σ_i x[n, i] · W[o, i]
//     W[o, i] = ± buckets[(start(o, i / span) + place(o, i)) mod count]
//
// In runs of 4, 16 or 64 columns (span = run) the place is i % run: a run lies side by side. Single
// weights (run = 1) share the start of 16 columns, but each chooses between four places by two bits
// of its own: i % 16 + 16·(0 … 3). The sign is one more bit of each weight. All of it comes from
//
//     mix(v)      v ^= v >> 16; v *= 0x7feb352d; v ^= v >> 15; v *= 0x846ca68b; v ^= v >> 16
//     hash(o, c)  v = c + mix(o + mix(seed)); v ^= v >> 16; v *= 0x7feb352d; v ^= v >> 15;
//                 v += mix(o ^ mix(seed ^ 0x9e3779b9)); v *= 0x846ca68b; v ^= v >> 16
//     start(o, c) = hash(o, c) · count >> 32
//     bits(o, i)  = hash(o, 2³¹ + 16·(i / 128) + i % 16) >> 4·(i / 16 % 8): bit 3 is set for a
//                   minus, bits 2 and 1 count the sixteens of the place, bit 0 is spare
//
// in 32-bit arithmetic (mix: Chris Wellons' lowbias32), called mix32.v1. It never changes.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

// Places go from 0 to here at most. Buckets come wrapped, with as many more behind the last one,
// from the first on: no sum of a start and a place has to be brought back below the count.
inline constexpr int64_t kHashReach = 63;

struct Hashed {
  const float* buckets;    // [count + kHashReach]: buckets[i % count]; not read by the gradient
  int64_t count, out, in;  // count from 1 up, all below 2**31
  uint32_t seed;
  int run;                 // 1, 4, 16 or 64
};

struct HashedProduct {
  const float* x;  // [batch, in]
  float* y;        // [batch, out]
  int64_t batch;
};

// The gradient of the buckets: each gets ± the gradients of its weights. Rows are added up in
// parts, whose number depends on nothing but the shape, so that the sums do not on the threads.
struct HashedGradient {
  const float* weight;  // [out, in], the gradient of W
  float* buckets;       // [count]
  float* work;          // [hashed_parts, count + kHashReach]
};

// So many that the parts hold half as many numbers as W at most, and eight at most.
inline int64_t hashed_parts(const Hashed& op) {
  const int64_t parts = op.out * op.in / (2 * (op.count + kHashReach));
  return parts < 1 ? 1 : parts > 8 ? 8 : parts;
}

struct HashedOps {
  void (*matmul)(const Hashed&, const HashedProduct&, const Parallel&);
  void (*weight)(const Hashed&, float*, const Parallel&);
  void (*gradient)(const Hashed&, const HashedGradient&, const Parallel&);
};

#define TAUT_VARIANT(name, needs)                                                   \
  void hashed_matmul_##name(const Hashed&, const HashedProduct&, const Parallel&);  \
  void hashed_weight_##name(const Hashed&, float*, const Parallel&);                \
  void hashed_gradient_##name(const Hashed&, const HashedGradient&, const Parallel&);
#include "hashed/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<HashedOps> kHashedVariants[] = {
#define TAUT_VARIANT(name, needs) \
  {#name, needs, {hashed_matmul_##name, hashed_weight_##name, hashed_gradient_##name}},
#include "hashed/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
