// The algorithm of bitplane_matmul. Included after one of lanes/*.h and a definition of
//
//     struct Words    sixteen 64-bit words: load(p)
//     struct Bits     one word for all sixteen: all(p)
//     struct Counts   sixteen counts: zero(), add(words, bits) counts the bits that differ,
//                     floats() as F16
//     kPixels, kStrips16   pixels and sixteens of outputs whose counts fit the registers
#pragma once

#include "bitplane/bitplane.h"
#include "bitplane/pack.h"
#include "decode/matmul.h"

namespace {

struct Geometry {
  int64_t words;         // 64-bit words of one tap of one plane
  int64_t pixel;         // words of a pixel: groups × planes × words
  int64_t row, image;    // words from one padded row, or image, to the next
  int64_t taps, strips;  // strips: sixteens of outputs in a group
  int64_t outputs;       // of a group
  int64_t pixels;        // of all output images
};

// One block: `Pixels` output pixels, each given by where its window starts, × `Strips` · 16 outputs.
template <int Pixels, int Strips>
void count_block(const taut::Bitplanes& op, const Geometry& g, const uint64_t* const* windows,
                 const int64_t* tap_at, int64_t group, int64_t strip, F16 (&y)[Pixels][Strips]) {
  const int64_t padded = g.strips * 16, first = group * padded + strip * 16;
  for (int s = 0; s < Strips; ++s) {
    const F16 base = F16::load(op.w_sums + first + 16 * s) * F16::all(op.x_offset);
    for (int j = 0; j < Pixels; ++j) y[j][s] = base;
  }
  const int64_t plane = g.taps * g.words * 16;
  const F16 minus_two = F16::all(-2);
  const F16 length = F16::all(float(g.taps * op.image.channels / op.groups));
  for (int p = 0; p < op.w_planes; ++p) {
    const uint64_t* w[Strips];
    for (int s = 0; s < Strips; ++s) {
      w[s] = op.w + ((group * g.strips + strip + s) * op.w_planes + p) * plane;
    }
    for (int q = 0; q < op.levels.planes; ++q) {
      Counts counts[Pixels][Strips];
      for (auto& of_pixel : counts) {
        for (auto& count : of_pixel) count = Counts::zero();
      }
      int64_t at = 0;
      for (int64_t t = 0; t < g.taps; ++t) {
        const int64_t offset = tap_at[t] + q * g.words;
        for (int64_t k = 0; k < g.words; ++k, at += 16) {
          Words words[Strips];
          for (int s = 0; s < Strips; ++s) words[s] = Words::load(w[s] + at);
#pragma GCC unroll 8
          for (int j = 0; j < Pixels; ++j) {
            const Bits bits = Bits::all(windows[j] + offset + k);
            for (int s = 0; s < Strips; ++s) counts[j][s].add(words[s], bits);
          }
        }
      }
      for (int s = 0; s < Strips; ++s) {
        const F16 w_scale = F16::load(op.w_scale + p * op.groups * padded + first + 16 * s);
        const F16 scale = w_scale * F16::all(op.x_scale[q]);
        for (int j = 0; j < Pixels; ++j) {
          const F16 dot = multiply_add(minus_two, counts[j][s].floats(), length);  // exact
          y[j][s] = y[j][s] + scale * dot;
        }
      }
    }
  }
}

// Where an output pixel stands, counted up through rows and images.
struct Place {
  int64_t n, h, w;
};

// The taps that fall on padding counted as bits that are not set: put right what they add.
inline F16 pad_taps(const taut::Bitplanes& op, int64_t tap, int64_t h, int64_t w,
                    const float* sums, F16 y) {
  const int64_t top = h * op.stride_h - op.pad_h, left = w * op.stride_w - op.pad_w;
  const bool inside = top >= 0 && left >= 0 &&
                      top + (op.kernel_h - 1) * op.dilation_h < op.image.height &&
                      left + (op.kernel_w - 1) * op.dilation_w < op.image.width;
  if (inside) return y;
  F16 sum = F16::zero();
  for (int64_t i = 0; i < op.kernel_h; ++i) {
    const int64_t at_h = top + i * op.dilation_h;
    for (int64_t j = 0; j < op.kernel_w; ++j) {
      const int64_t at_w = left + j * op.dilation_w;
      if (at_h >= 0 && at_h < op.image.height && at_w >= 0 && at_w < op.image.width) continue;
      sum = sum + F16::load(sums + (i * op.kernel_w + j) * tap);
    }
  }
  return y + F16::all(op.pad) * sum;
}

template <int Pixels, int Strips>
void block(const taut::Bitplanes& op, const Geometry& g, const uint64_t* x, const int64_t* tap_at,
           int64_t pixel, int64_t group, int64_t strip) {
  const uint64_t* windows[Pixels];
  Place place{pixel / (op.out_w * op.out_h), pixel / op.out_w % op.out_h, pixel % op.out_w};
  Place places[Pixels];
  for (int j = 0; j < Pixels; ++j) {
    places[j] = place;
    windows[j] = x + place.n * g.image + place.h * op.stride_h * g.row +
                 place.w * op.stride_w * g.pixel + group * op.levels.planes * g.words;
    if (++place.w == op.out_w) {
      place.w = 0;
      if (++place.h == op.out_h) place.h = 0, ++place.n;
    }
  }
  F16 y[Pixels][Strips];
  count_block<Pixels, Strips>(op, g, windows, tap_at, group, strip, y);
  for (int j = 0; j < Pixels; ++j) {
    for (int s = 0; s < Strips; ++s) {
      const int64_t o = (strip + s) * 16;
      if (op.pad != 0) {
        const float* sums = op.tap_sums + group * g.strips * 16 + o;
        y[j][s] = pad_taps(op, g.strips * op.groups * 16, places[j].h, places[j].w, sums, y[j][s]);
      }
      float* to = op.y + (pixel + j) * op.out + group * g.outputs + o;
      y[j][s].store_some(to, g.outputs - o);
    }
  }
}

template <int Strips, int Pixels = kPixels>
void some_pixels(const taut::Bitplanes& op, const Geometry& g, const uint64_t* x,
                 const int64_t* tap_at, int64_t pixel, int64_t count, int64_t group,
                 int64_t strip) {
  if constexpr (Pixels > 0) {
    if (count < Pixels) {
      return some_pixels<Strips, Pixels - 1>(op, g, x, tap_at, pixel, count, group, strip);
    }
    block<Pixels, Strips>(op, g, x, tap_at, pixel, group, strip);
  }
}

inline void bitplane_matmul(const taut::Bitplanes& op, const taut::Parallel& parallel) {
  const int64_t channels = op.image.channels / op.groups;
  Geometry g{};
  g.words = (channels + 63) / 64;
  g.pixel = op.groups * op.levels.planes * g.words;
  g.row = (op.image.width + 2 * op.pad_w) * g.pixel;
  g.image = (op.image.height + 2 * op.pad_h) * g.row;
  g.taps = op.kernel_h * op.kernel_w;
  g.outputs = op.out / op.groups;
  g.strips = (g.outputs + 15) / 16;
  g.pixels = op.image.count * op.out_h * op.out_w;

  const int64_t size = op.image.count * g.image;
  auto* memory = static_cast<uint64_t*>(taut::scratch<1>(size_t(size + g.taps) * 8));
  auto* tap_at = reinterpret_cast<int64_t*>(memory);
  uint64_t* x = memory + g.taps;
  for (int64_t t = 0; t < g.taps; ++t) {
    tap_at[t] = t / op.kernel_w * op.dilation_h * g.row + t % op.kernel_w * op.dilation_w * g.pixel;
  }
  pack_image(op, g.words, x, parallel);

  const int64_t wide = (g.strips + kStrips16 - 1) / kStrips16;  // steps through a group's outputs
  const int64_t blocks = (g.pixels + kPixels - 1) / kPixels;
  const int64_t work = g.taps * g.words * op.w_planes * op.levels.planes;
  parallel(op.groups * wide * blocks, 1 + 1024 / (work + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixel = i % blocks * kPixels, outputs = i / blocks;
      const int64_t group = outputs / wide, strip = outputs % wide * kStrips16;
      const int64_t count = g.pixels - pixel;
      if (g.strips - strip >= kStrips16) {
        some_pixels<kStrips16>(op, g, x, tap_at, pixel, count, group, strip);
      } else {
        some_pixels<1>(op, g, x, tap_at, pixel, count, group, strip);
      }
    }
  });
}

// Weights of ±1 planes for real activations, as a Decoder.
struct PlaneDecoder {
  const taut::BitWeights& op;
  int64_t words = (op.in + 63) / 64;

  struct Row {
    const uint64_t* w;
    int64_t o;
  };

  Row row(int64_t o) const { return {op.w + o / 16 * op.planes * words * 16 + o % 16, o}; }

  void block(const Row& r, int64_t b, F16 (&w)[kStrips]) const {
    const int64_t padded = (op.out + 15) / 16 * 16;
    for (int p = 0; p < op.planes; ++p) {
      const float scale = op.w_scale[p * padded + r.o];
      const F16 plus = F16::all(scale), minus = F16::all(-scale);
      const uint64_t* plane = r.w + (p * words + 2 * b) * 16;
      const uint64_t bits[2] = {plane[0], 2 * b + 1 < words ? plane[16] : 0};
#pragma GCC unroll 8
      for (int s = 0; s < kStrips; ++s) {
        const F16 value = select(uint16_t(bits[s / 4] >> (s % 4 * 16)), plus, minus);
        w[s] = p == 0 ? value : w[s] + value;
      }
    }
  }
};

inline void bitplane_real(const taut::BitWeights& op, const taut::Parallel& parallel) {
  const Product product{op.x, op.y, op.batch, op.in, op.out, op.in, op.out};
  decoded_matmul(PlaneDecoder{op}, product, parallel);
}

}  // namespace
