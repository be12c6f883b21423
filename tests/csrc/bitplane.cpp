// bitplane_matmul: every variant against the sum written out, over numbers decoded from their bits.
// All scales are small integers, so the floats are exact.
#include "bitplane/bitplane.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "check.h"

namespace {

struct Pair {
  int64_t h = 1, w = 1;
};

enum Layout { kChannelsFirst, kChannelsLast, kRowsApart };

struct Case {
  int64_t channels, out;
  Pair image;
  int64_t count = 1, groups = 1;
  int w_planes = 1, x_planes = 1, levels = 2;  // 0 levels: int8
  bool per_channel = false;
  Layout layout = kChannelsLast;
  Pair kernel{}, stride{}, pad{0, 0}, dilation{};
  float pad_value = 0;
  int64_t skew = 0;
  bool x_signs = false;                         // x comes as signs, a byte each
  bool ends = false, beside = false, relu = false;  // what follows the product
  int signs = 0;                                // given: 1 beside the numbers, 2 instead of them
};

int64_t sixteens(int64_t n) { return (n + 15) / 16; }
int64_t words_of(int64_t channels) { return (channels + 63) / 64; }

// Random ±1 planes and scales, and the weights they stand for: [out][tap][channels of a group].
// Lanes beyond the outputs have bits that are not set and scales that are NaN: nothing may use them.
struct Weights {
  int64_t padded;
  check::Exact<uint64_t> w;
  check::Exact<float> scale, tap_sums, sums;
  std::vector<float> dense;

  Weights(check::Random& random, int64_t out, int64_t groups, int64_t channels, int64_t taps,
          int planes, int64_t skew)
      : padded(groups * sixteens(out / groups) * 16),
        w(padded * planes * taps * words_of(channels), skew),
        scale(planes * padded, skew),
        tap_sums(taps * padded, skew),
        sums(padded, skew),
        dense(size_t(out * taps * channels)) {
    std::fill_n(w.data(), w.size(), 0);
    const int64_t each = out / groups, words = words_of(channels);
    for (int64_t o = 0; o < out; ++o) {
      const int64_t lane = o / each * sixteens(each) * 16 + o % each;
      float* row = dense.data() + o * taps * channels;
      for (int p = 0; p < planes; ++p) {
        const float factor = scale[p * padded + lane] = float(random.between(1, 4));
        uint64_t* plane = w.data() + (lane / 16 * planes + p) * taps * words * 16 + lane % 16;
        for (int64_t i = 0; i < taps * channels; ++i) {
          const uint64_t bit = random.bits() >> 7 & 1;
          const int64_t c = i % channels;
          plane[(i / channels * words + c / 64) * 16] |= bit << (c % 64);
          row[i] += bit ? factor : -factor;
        }
      }
      sums[lane] = 0;
      for (int64_t t = 0; t < taps; ++t) {
        tap_sums[t * padded + lane] = 0;
        for (int64_t c = 0; c < channels; ++c) tap_sums[t * padded + lane] += row[t * channels + c];
        sums[lane] += tap_sums[t * padded + lane];
      }
    }
  }
};

// How activations become bits; of int8, their own.
struct Cuts {
  float offset = 3, lowest;
  check::Exact<float> thresholds, scale;
  check::Exact<uint8_t> pattern;

  Cuts(check::Random& random, const Case& c)
      : thresholds(c.levels ? (c.levels - 1) * (c.per_channel ? c.channels : 1) : 0, c.skew),
        scale(c.levels ? c.x_planes : 8, c.skew),
        pattern(c.levels ? c.levels : 1) {
    const int64_t each = c.per_channel ? c.channels : 1;
    for (int64_t i = 0; i < each && c.levels; ++i) {
      std::vector<float> rising;
      for (int j = 0; j + 1 < c.levels; ++j) rising.push_back(float(random.between(-3, 3)));
      std::sort(rising.begin(), rising.end());
      for (int j = 0; j + 1 < c.levels; ++j) thresholds[j * each + i] = rising[size_t(j)];
    }
    for (int64_t j = 0; j < pattern.size(); ++j) pattern[j] = uint8_t(random.bits());
    if (c.levels == 2 && c.x_planes == 1) pattern[0] = 0, pattern[1] = 1;
    for (int64_t q = 0; q < scale.size(); ++q) scale[q] = float(random.between(1, 4));
    if (!c.levels) {
      offset = -0.5f;
      for (int q = 0; q < 8; ++q) scale[q] = q == 7 ? -64 : 0.5f * float(1 << q);
    }
    lowest = offset;
    for (int64_t q = 0; q < scale.size(); ++q) lowest -= scale[q];
  }

  float decoded(float x, int64_t channel, const Case& c) {
    if (!c.levels) return x;
    const int64_t each = c.per_channel ? c.channels : 1;
    int level = 0;
    for (int j = 0; j + 1 < c.levels; ++j) level += x >= thresholds[j * each + channel % each];
    float value = offset;
    for (int q = 0; q < c.x_planes; ++q) {
      value += pattern[level] >> q & 1 ? scale[q] : -scale[q];
    }
    return value;
  }
};

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// What follows the product, and is done here to what is wanted. Each output's threshold is one of
// the numbers that it gives: what stands on a threshold reaches it.
struct Ends {
  check::Exact<float> scale, shift, beside, thresholds;

  Ends(check::Random& random, const Case& c, std::vector<float>& wanted)
      : scale(c.ends ? c.out : 0, c.skew), shift(c.ends ? c.out : 0, c.skew),
        beside(c.beside ? int64_t(wanted.size()) : 0, c.skew),
        thresholds(c.signs != 0 ? c.out : 0, c.skew) {
    for (int64_t o = 0; o < scale.size(); ++o) {
      scale[o] = float(random.between(-2, 2)), shift[o] = float(random.between(-20, 20));
    }
    for (int64_t i = 0; i < beside.size(); ++i) beside[i] = float(random.between(-50, 50));
    if (beside.size() > 0) beside[beside.size() - 1] = NAN;  // stays, and reaches no threshold
    for (size_t i = 0; i < wanted.size(); ++i) {
      const auto at = int64_t(i), o = at % c.out;
      if (c.ends) wanted[i] = wanted[i] * scale[o] + shift[o];
      if (c.beside) wanted[i] += beside[at];
      if (c.relu && wanted[i] < 0) wanted[i] = 0;
    }
    const int64_t pixels = int64_t(wanted.size()) / std::max<int64_t>(c.out, 1);
    for (int64_t o = 0; o < thresholds.size() && pixels > 0; ++o) {
      thresholds[o] = wanted[size_t(random.between(0, pixels - 1) * c.out + o)];
    }
  }
};

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t taps = c.kernel.h * c.kernel.w, channels = c.channels / c.groups;
  Weights w(random, c.out, c.groups, channels, taps, c.w_planes, c.skew);
  Cuts cuts(random, c);

  taut::Image m{c.count, c.channels, c.image.h, c.image.w, 0, 0, 0, 0};
  const int64_t row = m.width + (c.layout == kRowsApart ? 3 : 0);
  if (c.layout == kChannelsLast) {
    m.stride_c = 1, m.stride_w = m.channels, m.stride_h = m.width * m.channels;
    m.stride_n = m.height * m.stride_h;
  } else {
    m.stride_w = 1, m.stride_h = row, m.stride_c = m.height * row;
    m.stride_n = m.channels * m.stride_c;
  }
  const bool empty = m.count * m.channels * m.height * m.width == 0;
  const int64_t used = empty ? 0
                             : (m.count - 1) * m.stride_n + (m.channels - 1) * m.stride_c +
                                   (m.height - 1) * m.stride_h + (m.width - 1) * m.stride_w + 1;
  check::Exact<float> x(c.levels ? used : 0, c.skew);
  check::Exact<int8_t> x8(c.levels ? 0 : used, c.skew);
  check::Exact<uint8_t> x_signs(c.x_signs ? used : 0, c.skew);
  for (int64_t i = 0; i < used; ++i) {
    const int64_t value = random.between(c.levels ? -4 : -128, c.levels ? 4 : 127);
    if (c.x_signs) {  // above the lowest bit there may be anything
      const bool set = float(value) >= cuts.thresholds[c.per_channel ? i % m.channels : 0];
      x_signs[i] = uint8_t((random.bits() >> 24 & 0xfe) | set);
    }
    if (c.levels) {
      x[i] = float(value);
    } else {
      x8[i] = int8_t(value);
    }
  }
  const auto size = [](int64_t in, int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
    return (in + 2 * pad - dilation * (k - 1) - 1) / stride + 1;
  };
  const int64_t out_h = size(m.height, c.kernel.h, c.stride.h, c.pad.h, c.dilation.h);
  const int64_t out_w = size(m.width, c.kernel.w, c.stride.w, c.pad.w, c.dilation.w);

  std::vector<float> wanted;
  for (int64_t i = 0; i < m.count * out_h * out_w; ++i) {
    const int64_t n = i / (out_h * out_w), top = i / out_w % out_h * c.stride.h - c.pad.h;
    const int64_t left = i % out_w * c.stride.w - c.pad.w;
    std::vector<float> window;  // [tap][channel]
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t h = top + t / c.kernel.w * c.dilation.h;
      const int64_t v = left + t % c.kernel.w * c.dilation.w;
      const bool inside = h >= 0 && h < m.height && v >= 0 && v < m.width;
      const int64_t at = n * m.stride_n + h * m.stride_h + v * m.stride_w;
      for (int64_t k = 0; k < c.channels; ++k) {
        const int64_t from = at + k * m.stride_c;
        window.push_back(!inside ? c.pad_value
                                 : cuts.decoded(c.levels ? x[from] : float(x8[from]), k, c));
      }
    }
    for (int64_t o = 0; o < c.out; ++o) {
      const int64_t first = o / (c.out / c.groups) * channels;
      float sum = 0;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t k = 0; k < channels; ++k) {
          sum += window[size_t(t * c.channels + first + k)] *
                 w.dense[size_t((o * taps + t) * channels + k)];
        }
      }
      wanted.push_back(sum);
    }
  }
  Ends ends(random, c, wanted);
  check::each_variant(taut::kBitplaneVariants, [&](const char* name, taut::BitplaneMatmul kernel) {
    check::Exact<float> y(c.signs == 2 ? 0 : int64_t(wanted.size()), c.skew);
    check::Exact<uint8_t> signs(c.signs != 0 ? int64_t(wanted.size()) : 0, c.skew);
    taut::Bitplanes op{};
    op.x = c.levels && !c.x_signs ? x.data() : nullptr;
    op.x_signs = c.x_signs ? x_signs.data() : nullptr;
    op.x8 = c.levels ? nullptr : x8.data();
    op.image = m;
    op.levels = {int(cuts.scale.size()), int(cuts.pattern.size()), cuts.thresholds.data(),
                 c.per_channel, cuts.pattern.data()};
    op.x_scale = cuts.scale.data();
    op.w = w.w.data(), op.w_scale = w.scale.data();
    op.w_sums = w.sums.data(), op.tap_sums = w.tap_sums.data();
    op.x_offset = cuts.offset, op.pad = c.pad_value - cuts.lowest;
    op.w_planes = c.w_planes, op.out = c.out, op.groups = c.groups;
    op.kernel_h = c.kernel.h, op.kernel_w = c.kernel.w;
    op.stride_h = c.stride.h, op.stride_w = c.stride.w;
    op.pad_h = c.pad.h, op.pad_w = c.pad.w;
    op.dilation_h = c.dilation.h, op.dilation_w = c.dilation.w;
    op.out_h = out_h, op.out_w = out_w, op.y = c.signs == 2 ? nullptr : y.data();
    if (c.ends) op.after_scale = ends.scale.data(), op.after_shift = ends.shift.data();
    op.beside = c.beside ? ends.beside.data() : nullptr, op.rectify = c.relu;
    if (c.signs != 0) op.y_signs = signs.data(), op.y_thresholds = ends.thresholds.data();
    kernel(op, parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !same(y[i], wanted[size_t(i)]);
    for (int64_t i = 0; i < signs.size(); ++i) {
      wrong += signs[i] != uint8_t(wanted[size_t(i)] >= ends.thresholds[i % c.out]);
    }
    CHECK(wrong == 0,
          "%s: %lld of %lld wrong; %lld channels, %lld outputs, %lld groups, image %lld × %lld, "
          "%d × %d planes, %d levels, layout %d, signs %d to %d, beside %d, relu %d",
          name, (long long)wrong, (long long)wanted.size(), (long long)c.channels,
          (long long)c.out, (long long)c.groups, (long long)m.height, (long long)m.width,
          c.w_planes, int(cuts.scale.size()), c.levels, int(c.layout), int(c.x_signs), c.signs,
          int(c.beside), int(c.relu));
  });
}

// Floats as they are.
void run_real(int64_t batch, int64_t in, int64_t out, int planes, int64_t skew,
              const taut::Parallel& parallel) {
  check::Random random;
  Weights w(random, out, 1, in, 1, planes, skew);
  check::Exact<float> x(batch * in, skew);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  check::each_variant(taut::kBitplaneRealVariants, [&](const char* name, taut::BitplaneReal kernel) {
    check::Exact<float> y(batch * out, skew);
    kernel({.x = x.data(), .w = w.w.data(), .w_scale = w.scale.data(), .y = y.data(),
            .batch = batch, .in = in, .out = out, .planes = planes},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) {
      float sum = 0;
      for (int64_t k = 0; k < in; ++k) {
        sum += x[i / out * in + k] * w.dense[size_t(i % out * in + k)];
      }
      wrong += !(y[i] == sum);
    }
    CHECK(wrong == 0, "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, %d planes", name,
          (long long)wrong, (long long)y.size(), (long long)batch, (long long)in, (long long)out,
          planes);
  });
}

}  // namespace

TAUT_TEST(bitplane_matmul_at_every_width) {
  for (int64_t in : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 513}) {
    for (int levels : {0, 2, 5, 16}) {
      for (bool per_channel : {false, true}) {
        run({.channels = in, .out = 18, .image = {1, 3}, .w_planes = 2,
             .x_planes = levels == 2 ? 1 : 4, .levels = levels, .per_channel = per_channel},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(bitplane_matmul_at_every_height) {
  for (int64_t out : {0, 1, 15, 16, 17, 31, 32, 33, 48, 65}) {
    for (int64_t batch : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 65}) {
      run({.channels = 70, .out = out, .image = {1, batch}, .w_planes = 3, .x_planes = 2,
           .levels = 3, .skew = 1},
          taut::serial);
    }
  }
}

TAUT_TEST(bitplane_matmul_at_every_number_of_planes) {
  for (int w_planes = 1; w_planes <= 8; ++w_planes) {
    for (int x_planes = 1; x_planes <= 8; ++x_planes) {
      run({.channels = 66, .out = 33, .image = {1, 7}, .w_planes = w_planes, .x_planes = x_planes,
           .levels = 16},
          taut::serial);
    }
  }
}

TAUT_TEST(bitplane_conv2d_reads_every_layout) {
  for (Layout layout : {kChannelsFirst, kChannelsLast, kRowsApart}) {
    for (int levels : {0, 2, 4}) {
      for (int64_t width : {1, 2, 15, 16, 17, 33, 63, 64, 65}) {
        for (bool per_channel : {false, true}) {
          run({.channels = 5, .out = 3, .image = {3, width}, .count = 2,
               .x_planes = levels == 2 ? 1 : 2, .levels = levels, .per_channel = per_channel,
               .layout = layout, .kernel = {3, 3}, .pad = {1, 1}, .skew = 1},
              taut::serial);
        }
      }
    }
  }
}

TAUT_TEST(bitplane_conv2d_with_groups) {
  for (const auto& [channels, groups, out] :
       {std::tuple<int64_t, int64_t, int64_t>{6, 2, 10}, {9, 9, 27}, {66, 66, 66}, {130, 2, 64}}) {
    for (Layout layout : {kChannelsFirst, kChannelsLast}) {
      for (int levels : {0, 2, 4}) {
        run({.channels = channels, .out = out, .image = {4, 5}, .groups = groups, .w_planes = 2,
             .x_planes = levels == 2 ? 1 : 2, .levels = levels, .per_channel = true,
             .layout = layout, .kernel = {3, 3}, .pad = {1, 1}, .pad_value = 1},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(bitplane_conv2d_with_every_window) {
  struct Window {
    Pair kernel, stride, pad, dilation;
  };
  for (const Window& v : {Window{{1, 1}, {2, 2}, {1, 1}, {1, 1}}, {{3, 3}, {2, 2}, {1, 1}, {1, 1}},
                          {{1, 5}, {1, 2}, {0, 4}, {1, 2}}, {{5, 2}, {3, 1}, {4, 0}, {1, 3}},
                          {{2, 4}, {2, 3}, {1, 5}, {3, 1}}, {{3, 3}, {1, 1}, {5, 5}, {1, 1}},
                          {{7, 7}, {1, 1}, {6, 6}, {1, 1}}, {{3, 3}, {9, 9}, {2, 2}, {1, 1}}}) {
    for (const Pair& image : {Pair{7, 10}, {3, 5}, {1, 10}, {7, 10}}) {
      if (image.h + 2 * v.pad.h <= (v.kernel.h - 1) * v.dilation.h) continue;
      if (image.w + 2 * v.pad.w <= (v.kernel.w - 1) * v.dilation.w) continue;
      for (float pad_value : {0, 1}) {
        run({.channels = 4, .out = 17, .image = image, .count = 2, .x_planes = 2, .levels = 4,
             .layout = kChannelsFirst, .kernel = v.kernel, .stride = v.stride, .pad = v.pad,
             .dilation = v.dilation, .pad_value = pad_value},
            taut::serial);
      }
    }
  }
  for (const Pair& image : {Pair{0, 0}, {0, 3}, {3, 0}, {1, 1}}) {
    run({.channels = 4, .out = 17, .image = image, .kernel = {3, 3}, .pad = {2, 2},
         .pad_value = 1},
        taut::serial);
  }
}

TAUT_TEST(bitplane_conv2d_takes_and_gives_signs) {
  for (int64_t channels : {20, 64, 130}) {
    for (int64_t out : {20, 33, 64}) {
      for (int64_t stride : {1, 2}) {
        for (int64_t pad : {0, 1}) {
          for (int signs : {0, 1, 2}) {
            const bool odd = (stride + pad) % 2 != 0;
            run({.channels = channels, .out = out, .image = {5, 4}, .count = 2, .per_channel = odd,
                 .kernel = {3, 3}, .stride = {stride, stride}, .pad = {pad, pad}, .skew = 1,
                 .x_signs = true, .ends = true, .beside = pad == 1, .relu = odd, .signs = signs},
                taut::serial);
          }
        }
      }
    }
  }
}

TAUT_TEST(bitplane_matmul_takes_and_gives_signs) {
  for (int64_t channels : {1, 20, 64, 130}) {
    for (int64_t out : {1, 20, 33, 64}) {
      for (const bool x_signs : {false, true}) {
        run({.channels = channels, .out = out, .image = {1, 7}, .w_planes = 2, .x_signs = x_signs,
             .signs = 1},
            taut::serial);
        run({.channels = channels, .out = out, .image = {1, 7}, .x_signs = x_signs, .ends = true,
             .beside = true, .relu = true, .signs = 2},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(bitplane_conv2d_gives_signs_of_groups_planes_and_bytes) {
  for (int64_t groups : {1, 2, 3}) {
    for (int levels : {0, 2, 4}) {
      for (const bool relu : {false, true}) {
        run({.channels = 66, .out = 66, .image = {4, 5}, .groups = groups, .w_planes = 2,
             .x_planes = levels == 2 ? 1 : 2, .levels = levels, .layout = kChannelsFirst,
             .kernel = {3, 3}, .pad = {1, 1}, .pad_value = 1, .ends = true, .beside = true,
             .relu = relu, .signs = 1},
            taut::serial);
      }
    }
    run({.channels = 66, .out = 66, .image = {4, 5}, .groups = groups, .kernel = {3, 3},
         .pad = {1, 1}, .pad_value = 1, .skew = 3, .x_signs = true, .ends = true, .beside = true,
         .signs = 2},
        taut::serial);
  }
}

TAUT_TEST(bitplane_conv2d_hands_on_signs_of_more_images_than_fit) {
  run({.channels = 64, .out = 64, .image = {40, 24}, .count = 40, .groups = 64, .skew = 1,
       .x_signs = true, .ends = true, .beside = true, .relu = true, .signs = 1},
      check::three_threads);
}

TAUT_TEST(bitplane_matmul_on_three_threads) {
  for (int levels : {0, 2, 4}) {
    const int x_planes = levels == 2 ? 1 : 2;
    run({.channels = 129, .out = 130, .image = {1, 200}, .w_planes = 2, .x_planes = x_planes,
         .levels = levels, .skew = 3},
        check::three_threads);
    for (Layout layout : {kChannelsFirst, kChannelsLast}) {
      run({.channels = 66, .out = 36, .image = {9, 70}, .count = 2, .groups = 2,
           .x_planes = x_planes, .levels = levels, .layout = layout, .kernel = {3, 3},
           .pad = {1, 1}},
          check::three_threads);
    }
  }
}

TAUT_TEST(bitplane_conv2d_on_more_images_than_fit) {
  run({.channels = 64, .out = 64, .image = {40, 24}, .count = 5, .groups = 64, .levels = 0,
       .kernel = {3, 3}, .pad = {1, 1}},
      taut::serial);
}

TAUT_TEST(bitplane_real_at_every_size) {
  for (int64_t in : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257, 400}) {
    for (int64_t batch : {1, 3, 4, 5, 13}) {
      for (int planes : {1, 2, 8}) run_real(batch, in, 5, planes, 0, taut::serial);
    }
  }
  for (int64_t out : {0, 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 65}) {
    for (int64_t batch : {0, 1, 2, 5, 12, 25}) run_real(batch, 145, out, 2, 1, taut::serial);
  }
  for (int64_t batch : {1, 4, 40}) run_real(batch, 513, 300, 2, 3, check::three_threads);
}

TAUT_TEST(bitplane_matmul_is_dispatched) {
  check::dispatch(taut::kBitplaneVariants);
  check::dispatch(taut::kBitplaneRealVariants);
#if defined(__x86_64__)
  using namespace taut;
  const auto chosen = [](uint32_t flags) {
    return std::string(choose(kBitplaneVariants, flags).name);
  };
  CHECK(chosen(kAny) == "portable", "no features");
  CHECK(chosen(kAvx2 | kVpopcntdq) == "avx2", "counts without AVX-512");
  CHECK(chosen(kAvx2 | kAvx512 | kVnni) == "avx512", "AVX-512");
  CHECK(chosen(kAvx2 | kAvx512 | kVpopcntdq) == "avx512_vpopcntdq", "AVX-512 that counts");
#endif
}
