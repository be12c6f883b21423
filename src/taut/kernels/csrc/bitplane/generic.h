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

// Where an output pixel stands, counted up through rows and images.
struct Place {
  int64_t n, h, w;

  Place(const taut::Bitplanes& op, int64_t pixel)
      : n(pixel / (op.out_w * op.out_h)), h(pixel / op.out_w % op.out_h), w(pixel % op.out_w) {}

  void next(const taut::Bitplanes& op) {
    if (++w < op.out_w) return;
    w = 0;
    if (++h < op.out_h) return;
    h = 0, ++n;
  }
};

struct Geometry {
  int64_t words;         // 64-bit words of one tap of one plane
  int64_t pixel;         // words of a pixel: groups × planes × words
  int64_t row, image;    // words from one padded row, or image, to the next
  int64_t taps, strips;  // strips: sixteens of outputs in a group
  int64_t steps;         // words of a window of one plane, taps × words
  int64_t outputs;       // of a group
  int64_t pixels;        // of all output images
  int64_t top, bottom, left, right;  // the pixels whose windows lie wholly inside

  bool on_border(const Place& p) const {
    return p.h < top || p.h > bottom || p.w < left || p.w > right;
  }
};

// The bits in which windows and weights differ, of one plane of each.
template <int Pixels, int Strips>
inline void count_plane(const Geometry& g, const uint64_t* const (&windows)[Pixels],
                        const int64_t* step_at, int64_t plane_at, const uint64_t* w,
                        int64_t strip, Counts (&counts)[Pixels][Strips]) {
  for (auto& of_pixel : counts) {
    for (auto& count : of_pixel) count = Counts::zero();
  }
  for (int64_t i = 0; i < g.steps; ++i) {
    const int64_t offset = step_at[i] + plane_at;
    Words words[Strips];
    for (int s = 0; s < Strips; ++s) words[s] = Words::load(w + s * strip + 16 * i);
#pragma GCC unroll 8
    for (int j = 0; j < Pixels; ++j) {
      const Bits bits = Bits::all(windows[j] + offset);
      for (int s = 0; s < Strips; ++s) counts[j][s].add(words[s], bits);
    }
  }
}

// One block: `Pixels` output pixels, each given by where its window starts, × `Strips` sixteens of
// outputs.
template <int Pixels, int Strips>
void count_block(const taut::Bitplanes& op, const Geometry& g,
                 const uint64_t* const (&windows)[Pixels], const int64_t* step_at, int64_t group,
                 int64_t strip, F16 (&y)[Pixels][Strips]) {
  const int64_t padded = g.strips * 16, first = group * padded + strip * 16;
  const int64_t plane = g.steps * 16;
  const uint64_t* w = op.w + (group * g.strips + strip) * op.w_planes * plane;
  const F16 minus_two = F16::all(-2);
  const F16 length = F16::all(float(g.taps * op.image.channels / op.groups));
  Counts counts[Pixels][Strips];
  for (int p = 0; p < op.w_planes; ++p) {
    for (int q = 0; q < op.levels.planes; ++q) {
      count_plane(g, windows, step_at, q * g.words, w + p * plane, op.w_planes * plane, counts);
      for (int s = 0; s < Strips; ++s) {
        const F16 w_scale = F16::load(op.w_scale + p * op.groups * padded + first + 16 * s);
        const F16 scale = w_scale * F16::all(op.x_scale[q]);
        const F16 base = F16::load(op.w_sums + first + 16 * s) * F16::all(op.x_offset);
        for (int j = 0; j < Pixels; ++j) {
          const F16 dot = multiply_add(minus_two, counts[j][s].floats(), length);  // exact
          y[j][s] = (p + q == 0 ? base : y[j][s]) + scale * dot;
        }
      }
    }
  }
}

// The taps that fall on padding counted as bits that are not set: put right what they add.
inline F16 pad_taps(const taut::Bitplanes& op, const Geometry& g, const Place& place,
                    const float* sums, F16 y) {
  F16 sum = F16::zero();
  for (int64_t i = 0; i < op.kernel_h; ++i) {
    const int64_t h = place.h * op.stride_h - op.pad_h + i * op.dilation_h;
    for (int64_t j = 0; j < op.kernel_w; ++j) {
      const int64_t w = place.w * op.stride_w - op.pad_w + j * op.dilation_w;
      if (h >= 0 && h < op.image.height && w >= 0 && w < op.image.width) continue;
      sum = sum + F16::load(sums + (i * op.kernel_w + j) * g.strips * op.groups * 16);
    }
  }
  return y + F16::all(op.pad) * sum;
}

// Sixteen bits as as many bytes, 1 where set.
inline void store_signs(uint32_t bits, uint8_t* to, int64_t valid) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m128i bytes = _mm_maskz_set1_epi8(__mmask16(bits), 1);
  if (valid >= 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  } else {
    _mm_mask_storeu_epi8(to, first_lanes(valid), bytes);
  }
#else
  uint8_t bytes[16];
  for (int half = 0; half < 2; ++half) {
    const uint64_t spread = (bits >> (8 * half) & 0xff) * 0x8040201008040201u;  // bit i to byte 7 - i
    const uint64_t each = __builtin_bswap64(spread >> 7 & 0x0101010101010101u);
    std::memcpy(bytes + 8 * half, &each, 8);
  }
  std::memcpy(to, bytes, size_t(valid >= 16 ? 16 : valid));
#endif
}

// What follows the product for some sixteens of outputs, the same for all pixels.
template <int Strips>
struct Ends {
  F16 scale[Strips], shift[Strips], threshold[Strips];
  int64_t first;  // output
  int64_t valid;  // outputs that there are from it on

  Ends(const taut::Bitplanes& op, const Geometry& g, int64_t group, int64_t strip)
      : first(group * g.outputs + strip * 16), valid(g.outputs - strip * 16) {
    for (int s = 0; s < Strips; ++s) {
      const int64_t o = first + 16 * s, some = valid - 16 * s;
      if (op.after_scale != nullptr && some > 0) {
        scale[s] = F16::load_some(op.after_scale + o, some);
        shift[s] = F16::load_some(op.after_shift + o, some);
      }
      if (op.y_signs != nullptr && some > 0) {
        threshold[s] = F16::load_some(op.y_thresholds + o, some);
      }
    }
  }
};

// The outputs of a pixel, put right at the border, finished and stored.
template <int Strips>
inline void put_pixel(const taut::Bitplanes& op, const Geometry& g, const Ends<Strips>& ends,
                      const Place& place, int64_t pixel, int64_t group, int64_t strip,
                      F16 (&y)[Strips]) {
  if (op.pad != 0 && g.on_border(place)) {
    for (int s = 0; s < Strips; ++s) {
      const float* sums = op.tap_sums + (group * g.strips + strip + s) * 16;
      y[s] = pad_taps(op, g, place, sums, y[s]);
    }
  }
  const int64_t at = pixel * op.out + ends.first;
  for (int s = 0; s < Strips; ++s) {
    const int64_t valid = ends.valid - 16 * s;
    if (valid <= 0) break;
    if (op.after_scale != nullptr) {
      y[s] = y[s] * ends.scale[s] + ends.shift[s];
      if (op.beside != nullptr) {
        const float* beside = op.beside + at + 16 * s;
        y[s] = y[s] + (valid >= 16 ? F16::load(beside) : F16::load_some(beside, valid));
      }
      if (op.rectify) {  // NaN stays
        y[s] = select(uint16_t(at_least(F16::zero(), y[s])), F16::zero(), y[s]);
      }
    }
    if (op.y_signs != nullptr) {
      store_signs(at_least(y[s], ends.threshold[s]), op.y_signs + at + 16 * s, valid);
    }
    if (op.y == nullptr) continue;
    if (valid >= 16) {
      y[s].store(op.y + at + 16 * s);
    } else {
      y[s].store_some(op.y + at + 16 * s, valid);
    }
  }
}

// Pixels from `place` on, which moves past them, times `Strips` sixteens of outputs.
template <int Pixels, int Strips>
void block(const taut::Bitplanes& op, const Geometry& g, const uint64_t* x, const int64_t* step_at,
           Place& place, int64_t pixel, int64_t group, int64_t strip) {
  const uint64_t* windows[Pixels];
  Place at = place;
  for (int j = 0; j < Pixels; ++j) {
    windows[j] = x + place.n * g.image + place.h * op.stride_h * g.row +
                 place.w * op.stride_w * g.pixel + group * op.levels.planes * g.words;
    place.next(op);
  }
  F16 y[Pixels][Strips];
  count_block<Pixels, Strips>(op, g, windows, step_at, group, strip, y);
  const Ends<Strips> ends(op, g, group, strip);
  for (int j = 0; j < Pixels; ++j, at.next(op)) {
    put_pixel<Strips>(op, g, ends, at, pixel + j, group, strip, y[j]);
  }
}

template <int Strips, int Pixels = kPixels>
void some_pixels(const taut::Bitplanes& op, const Geometry& g, const uint64_t* x,
                 const int64_t* step_at, Place& place, int64_t pixel, int64_t count, int64_t group,
                 int64_t strip) {
  if constexpr (Pixels > 0) {
    if (count < Pixels) {
      return some_pixels<Strips, Pixels - 1>(op, g, x, step_at, place, pixel, count, group, strip);
    }
    block<Pixels, Strips>(op, g, x, step_at, place, pixel, group, strip);
  }
}

inline Geometry geometry(const taut::Bitplanes& op) {
  const int64_t channels = op.image.channels / op.groups;
  Geometry g{};
  g.words = (channels + 63) / 64;
  g.pixel = op.groups * op.levels.planes * g.words;
  g.row = (op.image.width + 2 * op.pad_w) * g.pixel;
  g.image = (op.image.height + 2 * op.pad_h) * g.row;
  g.taps = op.kernel_h * op.kernel_w;
  g.steps = g.taps * g.words;
  g.outputs = op.out / op.groups;
  g.strips = (g.outputs + 15) / 16;
  g.pixels = op.image.count * op.out_h * op.out_w;

  g.top = (op.pad_h + op.stride_h - 1) / op.stride_h;
  g.left = (op.pad_w + op.stride_w - 1) / op.stride_w;
  const int64_t last_h = op.image.height + op.pad_h - (op.kernel_h - 1) * op.dilation_h - 1;
  const int64_t last_w = op.image.width + op.pad_w - (op.kernel_w - 1) * op.dilation_w - 1;
  g.bottom = last_h < 0 ? -1 : last_h / op.stride_h;
  g.right = last_w < 0 ? -1 : last_w / op.stride_w;
  return g;
}

inline void some_images(const taut::Bitplanes& op, const taut::Parallel& parallel) {
  const Geometry g = geometry(op);
  const int64_t size = op.image.count * g.image;
  auto* memory = static_cast<uint64_t*>(taut::scratch<1>(size_t(size + g.steps) * 8));
  auto* step_at = reinterpret_cast<int64_t*>(memory);  // where a window's words lie
  uint64_t* x = memory + g.steps;
  for (int64_t i = 0; i < g.steps; ++i) {
    const int64_t h = i / g.words / op.kernel_w, w = i / g.words % op.kernel_w;
    step_at[i] = h * op.dilation_h * g.row + w * op.dilation_w * g.pixel + i % g.words;
  }
  pack_image(op, g.words, x, parallel);

  // Items of work: all pixels for the first outputs, then all for the next ones.
  const int64_t wide = (g.strips + kStrips16 - 1) / kStrips16;
  const int64_t blocks = (g.pixels + kPixels - 1) / kPixels;
  const int64_t work = g.steps * op.w_planes * op.levels.planes;
  parallel(op.groups * wide * blocks, 1 + 1024 / (work + 1), [&](int64_t begin, int64_t end) {
    int64_t outputs = begin / blocks, pixel = begin % blocks * kPixels;
    Place place(op, pixel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = outputs / wide, strip = outputs % wide * kStrips16;
      const int64_t count = g.pixels - pixel;
      if (g.strips - strip >= kStrips16) {
        some_pixels<kStrips16>(op, g, x, step_at, place, pixel, count, group, strip);
      } else {
        some_pixels<1>(op, g, x, step_at, place, pixel, count, group, strip);
      }
      pixel += kPixels;
      if (pixel >= g.pixels) pixel = 0, ++outputs, place = Place(op, 0);
    }
  });
}

// A few images at a time: their bits stay in the cache, and what is kept for them stays small even
// where few channels leave most bits of a word unused.
inline void bitplane_matmul(const taut::Bitplanes& op, const taut::Parallel& parallel) {
  if (op.out == 0 || op.image.count * op.out_h * op.out_w == 0) return;
  constexpr int64_t kWords = 1 << 21;
  const taut::Image& m = op.image;
  const int64_t words = (m.channels / op.groups + 63) / 64;
  const int64_t image = (m.height + 2 * op.pad_h) * (m.width + 2 * op.pad_w) * op.groups *
                        op.levels.planes * words;
  const int64_t step = 1 + kWords / (image + 1);
  for (int64_t n = 0; n < m.count; n += step) {
    taut::Bitplanes some = op;
    some.image.count = m.count - n < step ? m.count - n : step;
    if (op.x != nullptr) some.x += n * m.stride_n;
    if (op.x8 != nullptr) some.x8 += n * m.stride_n;
    if (op.x_signs != nullptr) some.x_signs += n * m.stride_n;
    const int64_t before = n * op.out_h * op.out_w * op.out;
    if (op.y != nullptr) some.y += before;
    if (op.beside != nullptr) some.beside += before;
    if (op.y_signs != nullptr) some.y_signs += before;
    some_images(some, parallel);
  }
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
