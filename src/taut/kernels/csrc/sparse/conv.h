// The algorithm of sparse_conv2d: the image is padded once, and every weight's column becomes an
// offset into it. Outputs of stride 1 then lie side by side, in rows as wide as the padded ones
// (what their ends give is dropped); other strides split the image into planes of equal phase.
// Included after one of lanes/*.h.
#pragma once

#include <algorithm>

#include "sparse/panel.h"
#include "sparse/rows.h"

namespace {

struct ConvPlan {
  int64_t phases[2];     // planes that a channel is split into
  int64_t extra[2];      // rows and columns that a plane has beyond the outputs
  int64_t width;         // of a plane
  int64_t band;          // output rows at a time
  int64_t plane;         // floats
  int64_t image;         // floats, for all channels
  int64_t images;        // at a time
};

inline ConvPlan plan_conv(const taut::SparseConv& op) {
  ConvPlan p{};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = (op.kernel[i] - 1) * op.dilation[i];
    p.phases[i] = std::min(op.stride[i], reach + 1);
    p.extra[i] = reach / op.stride[i];
  }
  p.width = op.out_size[1] + p.extra[1];
  const int64_t row = op.channels * p.phases[0] * p.phases[1] * p.width;  // of all planes
  const int64_t most = kPanelBytes / 4;
  p.band = std::clamp<int64_t>(most / std::max<int64_t>(row, 1) - p.extra[0], 1, op.out_size[0]);
  p.plane = (p.band + p.extra[0]) * p.width;
  p.image = op.channels * p.phases[0] * p.phases[1] * p.plane;
  p.images = 1;
  if (p.band == op.out_size[0]) {
    p.images = std::clamp<int64_t>(most / std::max<int64_t>(p.image, 1), 1, op.batch);
  }
  return p;
}

// The planes of one channel, for outputs from row `top` on.
inline void pad_channel(const taut::SparseConv& op, const ConvPlan& p, const float* x, int64_t top,
                        float* to) {
  for (int64_t ph = 0; ph < p.phases[0]; ++ph) {
    for (int64_t pw = 0; pw < p.phases[1]; ++pw) {
      const int64_t step = op.stride[1];
      // Columns of the plane that lie inside the image: first … last - 1.
      const int64_t left = op.padding[1] - pw;  // plane column j is image column j · step - left
      const int64_t first = std::clamp<int64_t>((left + step - 1) / step, 0, p.width);
      const int64_t room = op.size[1] + left + step - 1;
      const int64_t last = std::clamp<int64_t>(room < 0 ? 0 : room / step, first, p.width);
      for (int64_t i = 0; i < p.band + p.extra[0]; ++i, to += p.width) {
        const int64_t row = (top + i) * op.stride[0] + ph - op.padding[0];
        if (row < 0 || row >= op.size[0] || first == last) {
          std::fill(to, to + p.width, 0.0f);
          continue;
        }
        const float* from = x + row * op.size[1] - left;
        std::fill(to, to + first, 0.0f);
        if (step == 1) {
          std::copy(from + first, from + last, to + first);
        } else {
          for (int64_t j = first; j < last; ++j) to[j] = from[j * step];
        }
        std::fill(to + last, to + p.width, 0.0f);
      }
    }
  }
}

// Where the inputs of each flattened column (c, kh, kw) start.
inline void find_places(const taut::SparseConv& op, const ConvPlan& p, uint32_t* place) {
  for (int64_t c = 0; c < op.channels / op.groups; ++c) {
    for (int64_t kh = 0; kh < op.kernel[0]; ++kh) {
      for (int64_t kw = 0; kw < op.kernel[1]; ++kw) {
        const int64_t h = kh * op.dilation[0], w = kw * op.dilation[1];
        const int64_t plane = (c * p.phases[0] + h % op.stride[0]) * p.phases[1] + w % op.stride[1];
        const int64_t at = h / op.stride[0] * p.width + w / op.stride[1];
        *place++ = uint32_t(plane * p.plane + at);
      }
    }
  }
}

// One row of outputs, pixels first … first + n - 1 of the plane's width, without the rows' ends.
inline void write_pixels(const float* from, int64_t first, int64_t n, int64_t width,
                         int64_t out_width, float* y) {
  for (int64_t at = first; at < first + n;) {
    const int64_t row = at / width, column = at % width;
    const int64_t run = std::min(width - column, first + n - at);
    const int64_t valid = std::min(run, out_width - column);
    float* to = y + row * out_width + column;
    for (int64_t i = 0; i < valid; i += 16) {
      F16::load_some(from + at - first + i, valid - i).store_some(to + i, valid - i);
    }
    at += run;
  }
}

inline void sparse_conv2d(const taut::SparseConv& op, const taut::Parallel& parallel) {
  const taut::SparseRows& rows = op.rows;
  const ConvPlan p = plan_conv(op);
  auto* place = static_cast<uint32_t*>(taut::scratch<2>(size_t(rows.in + 1) * 4));
  find_places(op, p, place);
  // Strips read up to 63 floats behind the last plane.
  const size_t floats = size_t(p.images * p.image + 64);
  auto* padded = static_cast<float*>(taut::scratch<1>(floats * 4));
  std::fill(padded + p.images * p.image, padded + floats, 0.0f);
  const int64_t in_plane = op.size[0] * op.size[1], out_plane = op.out_size[0] * op.out_size[1];
  const int64_t planes = p.phases[0] * p.phases[1] * p.plane;  // floats of one channel
  const int64_t each = 1 + rows.count / (rows.out + 1);
  const int64_t tiles = (rows.out + 15) / 16;
  for (int64_t n = 0; n < op.batch; n += p.images) {
    const int64_t images = std::min(p.images, op.batch - n);
    for (int64_t top = 0; top < op.out_size[0]; top += p.band) {
      parallel(images * op.channels, 1 + 8192 / planes, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          pad_channel(op, p, op.x + (n * op.channels + i) * in_plane, top, padded + i * planes);
        }
      });
      const int64_t band = std::min(p.band, op.out_size[0] - top);
      const int64_t pixels = (band - 1) * p.width + op.out_size[1];
      const int64_t panels = (pixels + 63) / 64;
      // Sixteen rows of 64 pixels are one piece of work.
      parallel(images * panels * tiles, 1 + 256 / each, [&](int64_t begin, int64_t end) {
        alignas(64) float sums[64];
        for (int64_t i = begin; i < end; ++i) {
          const int64_t tile = i % tiles, first = i / tiles % panels * 64;
          const int64_t image = i / tiles / panels;
          const int64_t count = std::min<int64_t>(64, pixels - first);
          for (int64_t o = 16 * tile; o < std::min(16 * tile + 16, rows.out); ++o) {
            const int64_t group = o / (rows.out / op.groups);
            const float* base =
                padded + image * p.image + group * (op.channels / op.groups) * planes + first;
            with_strips((count + 15) / 16, [&](auto strips) {
              sum_row<strips>(rows, place, o, base, sums);
            });
            float* y = op.y + ((n + image) * rows.out + o) * out_plane + top * op.out_size[1];
            write_pixels(sums, first, count, p.width, op.out_size[1], y);
          }
        }
      });
    }
  }
}

}  // namespace
