// The algorithm of block_matmul. One sample: sixteen products at a time, without gathers. More:
// they are turned into a panel, and each block's column meets many samples out of registers.
// Included after one of lanes/*.h.
#pragma once

#include "blocks/blocks.h"
#include "sparse/panel.h"

namespace {

inline F16 load_values(const float* p) { return F16::load(p); }
inline F16 load_values(const uint16_t* p) { return load_halves(p); }

constexpr int64_t kBlockChain = 64;  // blocks after which a sum is started anew
constexpr int64_t kFewSamples = 2;   // up to here one by one

// Rows R·b … of one sample; y has room for R floats.
template <int R, class T>
void block_row(const taut::BlockMatmul& op, const float* x, int64_t b, float* y) {
  const int64_t last = op.in - 1, end = op.starts[b + 1];
  const auto column = [&](int64_t j) { return op.columns[j] < last ? op.columns[j] : last; };
  const T* values = static_cast<const T*>(op.values);
  int64_t j = op.starts[b];
  F16 total = F16::zero();
  constexpr int kAtOnce = 16 / R;  // blocks that fill a register
  while (j < end) {
    F16 sum[4] = {F16::zero(), F16::zero(), F16::zero(), F16::zero()};
    const int64_t stop = end - j < 4 * kBlockChain ? end : j + 4 * kBlockChain;
    for (; j + 4 * kAtOnce <= stop; j += 4 * kAtOnce) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t at = j + i * kAtOnce;
        F16 xs;
        if constexpr (R == 16) {
          xs = F16::all(x[column(at)]);
        } else {
          xs = spread(x[column(at)], x[column(at + 1)], x[column(at + 2)], x[column(at + 3)]);
        }
        sum[i] = multiply_add(load_values(values + at * R), xs, sum[i]);
      }
    }
    for (; j < stop; ++j) {
      T aside[16] = {};
      std::memcpy(aside, values + j * R, R * sizeof(T));
      const float xs = x[column(j)];
      sum[0] = multiply_add(load_values(aside).first(R), F16::all(xs).first(R), sum[0]);
    }
    total = total + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  if constexpr (R == 16) {
    total.store(y);
  } else {
    float four[4];
    fold(total, four);
    std::memcpy(y, four, sizeof(four));
  }
}

// Four rows of block row b from row `r` of its blocks on, times 16 · Strips samples.
template <int R, int Strips, class T>
void four_rows(const taut::BlockMatmul& op, int64_t b, int64_t r, const float* panel,
               int64_t width, float* tile) {
  const uint32_t last = uint32_t(op.in - 1);
  const T* values = static_cast<const T*>(op.values) + r;
  int64_t j = op.starts[b];
  const int64_t end = op.starts[b + 1];
  for (int64_t i = 0; i < 4; ++i) {
    for (int s = 0; s < Strips; ++s) F16::zero().store(tile + i * width + 16 * s);
  }
  while (j < end) {
    F16 sum[4][Strips];
    for (auto& row : sum) {
      for (auto& s : row) s = F16::zero();
    }
    for (const int64_t stop = end - j < kBlockChain ? end : j + kBlockChain; j < stop; ++j) {
      const uint32_t column = op.columns[j] < last ? op.columns[j] : last;
      const float* x = panel + column * width;
      F16 xs[Strips];
#pragma GCC unroll 4
      for (int s = 0; s < Strips; ++s) xs[s] = F16::load(x + 16 * s);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const F16 v = F16::all(to_float(values[j * R + i]));
#pragma GCC unroll 4
        for (int s = 0; s < Strips; ++s) sum[i][s] = multiply_add(v, xs[s], sum[i][s]);
      }
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int s = 0; s < Strips; ++s) {
        float* to = tile + i * width + 16 * s;
        (F16::load(to) + sum[i][s]).store(to);
      }
    }
  }
}

}  // namespace
