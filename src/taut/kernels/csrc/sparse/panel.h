// Samples side by side: a panel holds x transposed, [in][16 · strips], so that each column's
// samples lie in one piece; a tile holds sixteen rows of results, to be transposed back.
// Included after one of lanes/*.h.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "scratch.h"

namespace {

constexpr int64_t kPanelBytes = 1 << 20;  // fits a second-level cache
constexpr int kMostStrips = 4;

// Strips of sixteen samples that a panel of so many columns may have.
inline int64_t panel_strips(int64_t in) {
  for (int64_t strips = kMostStrips; strips > 1; --strips) {
    if (in * strips * 64 <= kPanelBytes) return strips;
  }
  return 1;
}

// panel[c][j] = x[j, c] for j < samples, and 0 for the rest of the strips.
inline void fill_panel(const float* x, int64_t in, int64_t samples, int64_t strips, float* panel,
                       const taut::Parallel& parallel) {
  const int64_t width = 16 * strips;
  parallel((in + 15) / 16, 1 + 512 / width, [&](int64_t begin, int64_t end) {
    for (int64_t c = 16 * begin; c < 16 * end && c < in; c += 16) {
      for (int64_t n = 0; n < width; n += 16) {
        float* to = panel + c * width + n;
        if (n + 16 <= samples && c + 16 <= in) {
          transpose(x + n * in + c, in, to, width);
          continue;
        }
        for (int64_t i = 0; i < 16 && c + i < in; ++i) {
          for (int64_t j = 0; j < 16; ++j) {
            to[i * width + j] = n + j < samples ? x[(n + j) * in + c + i] : 0;
          }
        }
      }
    }
  });
}

// y[j, o + r] = tile[r][j] for j < samples, r < rows <= 16.
inline void write_tile(const float* tile, int64_t rows, int64_t samples, int64_t strips, float* y,
                       int64_t y_stride) {
  const int64_t width = 16 * strips;
  for (int64_t n = 0; n < samples; n += 16) {
    if (n + 16 <= samples && rows == 16) {
      transpose(tile + n, width, y + n * y_stride, y_stride);
      continue;
    }
    alignas(64) float turned[256];
    transpose(tile + n, width, turned, 16);
    for (int64_t j = 0; j < 16 && n + j < samples; ++j) {
      F16::load(turned + 16 * j).store_some(y + (n + j) * y_stride, rows);
    }
  }
}

// Calls use(std::integral_constant<int, strips>) for 1 … 4 strips.
template <class Use>
void with_strips(int64_t strips, const Use& use) {
  switch (strips) {
    case 1: return use(std::integral_constant<int, 1>{});
    case 2: return use(std::integral_constant<int, 2>{});
    case 3: return use(std::integral_constant<int, 3>{});
    default: return use(std::integral_constant<int, 4>{});
  }
}

// For each panel of x: turned, then use(strips, panel, first sample, samples) in this thread.
template <class Use>
void each_panel(const float* x, int64_t batch, int64_t in, const taut::Parallel& parallel,
                const Use& use) {
  const int64_t most = 16 * panel_strips(in);
  for (int64_t n = 0; n < batch; n += most) {
    const int64_t samples = batch - n < most ? batch - n : most;
    const int64_t strips = (samples + 15) / 16;
    auto* panel = static_cast<float*>(taut::scratch<1>(size_t(in * strips) * 64));
    fill_panel(x + n * in, in, samples, strips, panel, parallel);
    with_strips(strips, [&](auto s) { use(s, panel, n, samples); });
  }
}

}  // namespace
