// bitplane_matmul: products of numbers that are sums of scaled bits.
//
//     W[o, k] = Σ_p w_scale[o, p] · B[o, p, k]         B = +1 where the bit is set, −1 where not
//     X[n, k] = x_offset + Σ_q x_scale[q] · A[n, q, k]
//     y[n, o] = x_offset · Σ_k W[o, k]
//             + Σ_p Σ_q w_scale[o, p] · x_scale[q] · (K − 2 · popcount(B[o, p] xor A[n, q]))
//
// Binary and ternary networks, k-bit activations and learned levels are all this one product. A
// convolution is the same with a window's taps, one after another, for k; a linear layer has one
// tap, and its samples are the pixels of one row.
//
// Weights lie as sixteen outputs side by side, so that lanes never have to be summed:
// w[out / 16][plane][tap][word of 64 channels][16]. Unused bits are zero on both sides.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

constexpr int kMaxPlanes = 8;
constexpr int kMaxLevels = 16;  // of activations told apart by thresholds

// How real activations become bits: level = how many of the thresholds x reaches (x ≥ t; NaN
// reaches none), and the planes are the bits of pattern[level].
struct Levels {
  int planes;
  int count;                   // levels, 2 … 16; the thresholds rise
  const float* thresholds;     // [count − 1, channels], or [count − 1, 1]
  bool per_channel;
  const uint8_t* pattern;      // [count]
};

struct Image {
  int64_t count, channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
};

struct Bitplanes {
  // Activations: floats that are told apart by levels, or int8 (x8), whose planes are their bits.
  // Or they are signs already, a byte each, whose lowest bit it is: [count, height, width, channels].
  const float* x;
  const int8_t* x8;
  const uint8_t* x_signs;
  Image image;
  Levels levels;
  const float* x_scale;     // [planes of x]
  const uint64_t* w;        // as above; one such block of out / groups for each group
  const float* w_scale;     // [w_planes, out rounded up to 16 within each group]
  const float* w_sums;      // [out, rounded up likewise]: Σ_k W[o, k]
  const float* tap_sums;    // [taps, out, rounded up likewise]: Σ_c W[o, tap, c]; for padding
  float x_offset;
  float pad;                // the value of padding less that of bits that are not set
  int w_planes;
  int64_t out, groups;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
  float* y;                 // [count, out_h, out_w, out]; null where only its signs are wanted

  // What follows the product, for engines that have it done in the same pass:
  //     y = max(after_scale[o] · y + after_shift[o] + beside, 0)
  const float* after_scale;  // [out], or null: none of it
  const float* after_shift;  // [out]
  const float* beside;       // like y, or null
  bool rectify;              // whether what is below zero becomes zero

  // And the signs that the next layer reads: y_signs[…, o] = y[…, o] ≥ y_thresholds[o], a byte each.
  uint8_t* y_signs;           // like y, or null
  const float* y_thresholds;  // [out]
};

using BitplaneMatmul = void (*)(const Bitplanes&, const Parallel&);

#define TAUT_VARIANT(name, needs) void bitplane_matmul_##name(const Bitplanes&, const Parallel&);
#include "bitplane/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<BitplaneMatmul> kBitplaneVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, bitplane_matmul_##name},
#include "bitplane/variants.inc"
#undef TAUT_VARIANT
};

// Real activations, not split into bits: y[n, o] = Σ_k x[n, k] · W[o, k].
struct BitWeights {
  const float* x;         // [batch, in]
  const uint64_t* w;      // [out / 16][planes][word][16]
  const float* w_scale;   // [planes, out rounded up to 16]
  float* y;               // [batch, out]
  int64_t batch, in, out;
  int planes;
};

using BitplaneReal = void (*)(const BitWeights&, const Parallel&);

#define TAUT_VARIANT(name, needs) void bitplane_real_##name(const BitWeights&, const Parallel&);
#include "bitplane/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<BitplaneReal> kBitplaneRealVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, bitplane_real_##name},
#include "bitplane/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
