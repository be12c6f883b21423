// The algorithm of block_matmul. One sample: sixteen products at a time, without gathers. More:
// they are turned into a panel, and each column's samples meet its weights out of registers.
// Included after one of lanes/*.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "blocks/blocks.h"
#include "sparse/panel.h"

namespace {

inline F16 load_values(const float* p) { return F16::load(p); }
inline F16 load_values(const uint16_t* p) { return load_halves(p); }

constexpr int64_t kBlockChain = 64;  // blocks after which a sum is started anew

template <int R, class T>
struct Blocks {
  const taut::BlockMatmul& op;
  const T* values = static_cast<const T*>(op.values);
  int64_t last = op.in - 1;

  int64_t column(int64_t j) const { return std::min<int64_t>(op.columns[j], last); }

  // to[…] = the R rows of block row b times one sample.
  void one_sample(int64_t b, const float* x, float* to) const {
    constexpr int kAtOnce = 16 / R;  // blocks that fill a register
    int64_t j = op.starts[b];
    const int64_t end = op.starts[b + 1];
    F16 total = F16::zero();
    while (j < end) {
      F16 sum[4] = {F16::zero(), F16::zero(), F16::zero(), F16::zero()};
      const int64_t stop = std::min(end, j + 4 * kAtOnce * kBlockChain);
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
        const F16 xs = F16::all(x[column(j)]).first(R);
        sum[0] = multiply_add(load_values(aside), xs, sum[0]);
      }
      total = total + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    if constexpr (R == 16) {
      total.store(to);
    } else {
      float four[4];
      fold(total, four);
      std::memcpy(to, four, sizeof(four));
    }
  }

  // to[i][…] = sixteen rows times samples i < Batch of a panel, outputs side by side.
  template <int Batch>
  void sixteen_rows(int64_t b, const float* panel, int64_t width, float* to) const {
    F16 total[Batch];
    for (auto& t : total) t = F16::zero();
    for (int64_t j = op.starts[b], end = op.starts[b + 1]; j < end;) {
      F16 sum[Batch];
      for (auto& s : sum) s = F16::zero();
      for (const int64_t stop = std::min(end, j + kBlockChain); j < stop; ++j) {
        const F16 v = load_values(values + 16 * j);
        const float* x = panel + column(j) * width;
#pragma GCC unroll 16
        for (int i = 0; i < Batch; ++i) sum[i] = multiply_add(v, F16::all(x[i]), sum[i]);
      }
      for (int i = 0; i < Batch; ++i) total[i] = total[i] + sum[i];
    }
    for (int i = 0; i < Batch; ++i) total[i].store(to + 16 * i);
  }

  // to[i · width + …] = four rows times 16 · Strips samples of a panel, samples side by side.
  template <int Strips>
  void four_rows(int64_t b, const float* panel, int64_t width, float* to) const {
    for (int64_t i = 0; i < 4 * Strips; ++i) F16::zero().store(to + i / Strips * width + i % Strips * 16);
    float room[4 * kBlockChain];
    for (int64_t j = op.starts[b], end = op.starts[b + 1]; j < end;) {
      const int64_t n = std::min(end - j, kBlockChain);
      const float* v;
      if constexpr (sizeof(T) == sizeof(float)) {
        v = values + 4 * j;
      } else {
        for (int64_t i = 0; i < n; i += 4) {
          T aside[16] = {};
          std::memcpy(aside, values + 4 * (j + i), size_t(std::min<int64_t>(n - i, 4)) * 4 * sizeof(T));
          load_values(aside).store(room + 4 * i);
        }
        v = room;
      }
      F16 sum[4][Strips];
      for (auto& row : sum) {
        for (auto& s : row) s = F16::zero();
      }
      for (int64_t t = 0; t < n; ++t) {
        const float* x = panel + column(j + t) * width;
        F16 xs[Strips];
#pragma GCC unroll 4
        for (int s = Strips - 1; s >= 0; --s) xs[s] = F16::load(x + 16 * s);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const F16 weight = F16::all(v[4 * t + i]);
#pragma GCC unroll 4
          for (int s = 0; s < Strips; ++s) sum[i][s] = multiply_add(weight, xs[s], sum[i][s]);
        }
      }
      for (int i = 0; i < 4; ++i) {
        for (int s = 0; s < Strips; ++s) {
          float* at = to + i * width + 16 * s;
          (F16::load(at) + sum[i][s]).store(at);
        }
      }
      j += n;
    }
  }

  // Rows 16·t … times `samples` of a panel of `strips` strips; y is that of the first sample.
  template <int Strips>
  void tile(int64_t t, const float* panel, int64_t samples, float* y) const {
    constexpr int kWidth = 16 * Strips;
    const int64_t rows = std::min<int64_t>(op.out - 16 * t, 16);
    y += 16 * t;
    if constexpr (R == 16) {
      constexpr int kBatch = kPanels == 2 ? 16 : 4;  // as many sums as there are registers for
      alignas(64) float to[16 * kBatch];
      for (int64_t n = 0; n < samples; n += kBatch) {
        sixteen_rows<kBatch>(t, panel + n, kWidth, to);
        for (int64_t i = 0; i < kBatch && n + i < samples; ++i) {
          F16::load(to + 16 * i).store_some(y + (n + i) * op.out, rows);
        }
      }
    } else {
      alignas(64) float to[16 * kWidth] = {};
      for (int64_t i = 0; 4 * i < rows; ++i) {
        if constexpr (kPanels == 2) {
          four_rows<Strips>(4 * t + i, panel, kWidth, to + 4 * i * kWidth);
        } else {
          for (int s = 0; s < kWidth; s += 16) {
            four_rows<1>(4 * t + i, panel + s, kWidth, to + 4 * i * kWidth + s);
          }
        }
      }
      write_tile(to, rows, samples, Strips, y, op.out);
    }
  }

  void run(const taut::Parallel& parallel) const {
    const int64_t tiles = (op.out + 15) / 16;
    const int64_t each = 1 + op.count * R / (tiles + 1);  // weights of sixteen rows, about
    if (op.batch <= 1) {
      return parallel(tiles, 1 + 16384 / each, [&](int64_t begin, int64_t end) {
        for (int64_t n = 0; n < op.batch; ++n) {
          for (int64_t o = 16 * begin; o < std::min(16 * end, op.out); o += R) {
            float to[R];
            one_sample(o / R, op.x + n * op.in, to);
            std::copy(to, to + std::min<int64_t>(R, op.out - o), op.y + n * op.out + o);
          }
        }
      });
    }
    each_panel(op.x, op.batch, op.in, parallel,
               [&](auto strips, const float* panel, int64_t n, int64_t samples) {
      parallel(tiles, 1 + 16384 / each / strips, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          tile<strips>(t, panel, samples, op.y + n * op.out);
        }
      });
    });
  }
};

inline void block_matmul(const taut::BlockMatmul& op, const taut::Parallel& parallel) {
  if (op.rows == 16) {
    if (op.half) return Blocks<16, uint16_t>{op}.run(parallel);
    return Blocks<16, float>{op}.run(parallel);
  }
  if (op.half) return Blocks<4, uint16_t>{op}.run(parallel);
  Blocks<4, float>{op}.run(parallel);
}

}  // namespace
