// The algorithm of bitmap_matmul: a Decoder for decode/matmul.h. Included after one of lanes/*.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "bitmap/bitmap.h"
#include "decode/matmul.h"

namespace {

inline F16 load_kept(const float* p) { return F16::load(p); }
inline F16 load_kept(const uint16_t* p) { return load_halves(p); }

template <class T>
struct BitmapDecoder {
  const taut::BitmapMatmul& op;

  struct Row {
    const uint16_t* masks;
    const int32_t* starts;
  };

  Row row(int64_t o) const {
    return {op.masks + o * ((op.in + 15) / 16), op.starts + o * ((op.in + kBlock - 1) / kBlock)};
  }

  void block(const Row& r, int64_t b, F16 (&w)[kStrips]) const {
    const T* values = static_cast<const T*>(op.values);
    const int64_t start = r.starts[b];
    const int64_t strips = std::min((op.in + 15) / 16 - kStrips * b, kStrips);
    // Strips read sixteen values wherever they stand, 128 at the most: near the end, out of a copy.
    if (start >= 0 && start + kBlock <= op.count && strips == kStrips) {
      return spread_out(r.masks + kStrips * b, values + start, w);
    }
    T aside[kBlock] = {};
    uint16_t masks[kStrips] = {};
    const int64_t from = std::clamp<int64_t>(start, 0, op.count);
    std::memcpy(aside, values + from, size_t(std::min(op.count - from, kBlock)) * sizeof(T));
    std::memcpy(masks, r.masks + kStrips * b, size_t(strips) * sizeof(uint16_t));
    spread_out(masks, aside, w);
  }

  static void spread_out(const uint16_t* masks, const T* from, F16 (&w)[kStrips]) {
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) {
      w[s] = expand(load_kept(from), masks[s]);
      from += __builtin_popcount(masks[s]);
    }
  }
};

inline void bitmap_matmul(const taut::BitmapMatmul& op, const taut::Parallel& parallel) {
  const Product product{op.x, op.y, op.batch, op.in, op.out, op.in, op.out};
  if (op.half) return decoded_matmul(BitmapDecoder<uint16_t>{op}, product, parallel);
  decoded_matmul(BitmapDecoder<float>{op}, product, parallel);
}

}  // namespace
