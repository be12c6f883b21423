// The algorithm of sparse_matmul: one sample gathers; more are turned into a panel, where each
// weight meets all samples of its column at once. Included after one of lanes/*.h.
#pragma once

#include "sparse/conv.h"
#include "sparse/panel.h"
#include "sparse/rows.h"

namespace {

constexpr int64_t kGatherBatch = 1;  // up to here samples are gathered one by one

inline void gather_rows(const taut::SparseMatmul& op, int64_t begin, int64_t end) {
  const taut::SparseRows& rows = op.rows;
  with_values(rows, [&](const auto& values) {
    const auto run = [&](const auto& columns) {
      for (int64_t o = begin; o < end; ++o) {
        const float scale = rows.kind == taut::Values::kInt8 ? rows.scale[o] : 1.0f;
        for (int64_t n = 0; n < op.batch; ++n) {
          op.y[n * rows.out + o] = scale * dot(rows, values, columns, op.x + n * rows.in, o);
        }
      }
    };
    if (rows.wide) {
      run(WideColumns{});
    } else {
      run(ShortColumns{});
    }
  });
}

inline void sparse_matmul(const taut::SparseMatmul& op, const taut::Parallel& parallel) {
  const taut::SparseRows& rows = op.rows;
  const int64_t each = 1 + rows.count / (rows.out + 1);  // terms of a row, about
  if (op.batch <= kGatherBatch) {
    return parallel(rows.out, 1 + 16384 / each, [&](int64_t begin, int64_t end) {
      gather_rows(op, begin, end);
    });
  }
  each_panel(op.x, op.batch, rows.in, parallel,
             [&](auto strips, const float* panel, int64_t n, int64_t samples) {
    constexpr int kWidth = 16 * strips;
    parallel((rows.out + 15) / 16, 1 + 1024 / each / strips, [&](int64_t begin, int64_t end) {
      alignas(64) float tile[16 * kWidth] = {};
      for (int64_t o = 16 * begin; o < 16 * end && o < rows.out; o += 16) {
        const int64_t valid = rows.out - o < 16 ? rows.out - o : 16;
        for (int64_t r = 0; r < valid; ++r) {
          sum_row<strips>(rows, nullptr, o + r, panel, tile + r * kWidth);
        }
        write_tile(tile, valid, samples, strips, op.y + n * rows.out + o, rows.out);
      }
    });
  });
}

}  // namespace
