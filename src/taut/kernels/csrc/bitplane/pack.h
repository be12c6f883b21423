// Activations become bits, with the thresholds of the levels on the way: an image of floats (in any
// layout) or of int8 turns into pixels of words, [height + 2 pad][width + 2 pad][group][plane][word],
// whose border is not set.
#pragma once

#include <cstring>

#include "bitplane/bitplane.h"

namespace {

// Plane q is bit q of the first level's pattern, flipped by each threshold that is reached and that
// parts two levels whose patterns differ in that bit. Masks of sixteen ones, or none.
struct Flips {
  bool sign;  // one threshold, one plane that it sets: the common case
  uint32_t start[taut::kMaxPlanes];
  uint32_t at[taut::kMaxLevels - 1][taut::kMaxPlanes];

  explicit Flips(const taut::Levels& levels) {
    for (int q = 0; q < levels.planes; ++q) {
      start[q] = levels.pattern[0] >> q & 1 ? 0xffff : 0;
      for (int j = 0; j + 1 < levels.count; ++j) {
        at[j][q] = (levels.pattern[j] ^ levels.pattern[j + 1]) >> q & 1 ? 0xffff : 0;
      }
    }
    sign = levels.count == 2 && levels.planes == 1 && start[0] == 0 && at[0][0] != 0;
  }
};

// One pixel whose channels lie side by side, by one threshold for all of them.
inline void pack_signs(const float* x, F16 threshold, int64_t channels, uint64_t* to) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) {
    uint64_t word = 0;
    for (int s = 0; s < 4; ++s) {
      word |= uint64_t(at_least(F16::load(x + c + 16 * s), threshold)) << (16 * s);
    }
    *to++ = word;
  }
  if (c < channels) {
    uint64_t word = 0;
    for (int s = 0; s < 4 && c + 16 * s < channels; ++s) {
      const int64_t valid = channels - c - 16 * s;
      const uint32_t mask = valid >= 16 ? 0xffff : (1u << valid) - 1;
      const F16 values = F16::load_some(x + c + 16 * s, valid);
      word |= uint64_t(at_least(values, threshold) & mask) << (16 * s);
    }
    *to = word;
  }
}

// One pixel whose channels lie side by side.
inline void pack_pixel(const taut::Levels& levels, const Flips& flips, const float* x,
                       int64_t groups, int64_t channels, int64_t words, uint64_t* to) {
  for (int64_t g = 0; g < groups; ++g, x += channels, to += levels.planes * words) {
    if (flips.sign && !levels.per_channel) {
      pack_signs(x, F16::all(levels.thresholds[0]), channels, to);
      continue;
    }
    for (int64_t k = 0; k < words; ++k) {
      uint64_t word[taut::kMaxPlanes] = {};
      for (int64_t s = 0; s < 4; ++s) {
        const int64_t channel = 64 * k + 16 * s, valid = channels - channel;
        if (valid <= 0) break;
        const F16 values = F16::load_some(x + channel, valid);
        uint32_t bits[taut::kMaxPlanes];
        for (int q = 0; q < levels.planes; ++q) bits[q] = flips.start[q];
        const float* t = levels.thresholds + (levels.per_channel ? g * channels + channel : 0);
        for (int j = 0; j + 1 < levels.count; ++j) {
          const F16 threshold = levels.per_channel
                                    ? F16::load_some(t + j * groups * channels, valid)
                                    : F16::all(t[j]);
          const uint32_t reached = at_least(values, threshold);
          for (int q = 0; q < levels.planes; ++q) bits[q] ^= reached & flips.at[j][q];
        }
        const uint32_t mask = valid >= 16 ? 0xffff : (1u << valid) - 1;
        for (int q = 0; q < levels.planes; ++q) word[q] |= uint64_t(bits[q] & mask) << (16 * s);
      }
      for (int q = 0; q < levels.planes; ++q) to[q * words + k] = word[q];
    }
  }
}

// Sixteen pixels side by side in memory, channel after channel.
inline void pack_plane(const taut::Levels& levels, const Flips& flips, const float* x,
                       int64_t stride_c, int64_t valid, int64_t group, int64_t groups,
                       int64_t channels, int64_t words, int64_t pixel, uint64_t* to) {
  for (int64_t k = 0; k < words; ++k) {
    PixelWords word[taut::kMaxPlanes];
    for (int q = 0; q < levels.planes; ++q) word[q].clear();
    const int64_t end = channels - 64 * k < 64 ? channels - 64 * k : 64;
    for (int64_t c = 0; c < end; ++c) {
      const int64_t channel = group * channels + 64 * k + c;
      const float* from = x + channel * stride_c;
      const F16 values = valid >= 16 ? F16::load(from) : F16::load_some(from, valid);
      uint32_t bits[taut::kMaxPlanes];
      for (int q = 0; q < levels.planes; ++q) bits[q] = flips.start[q];
      for (int j = 0; j + 1 < levels.count; ++j) {
        const int64_t at = levels.per_channel ? j * groups * channels + channel : j;
        const uint32_t reached = at_least(values, F16::all(levels.thresholds[at]));
        for (int q = 0; q < levels.planes; ++q) bits[q] ^= reached & flips.at[j][q];
      }
      for (int q = 0; q < levels.planes; ++q) word[q].set(bits[q], int(c));
    }
    for (int q = 0; q < levels.planes; ++q) {
      uint64_t each[16];
      word[q].store(each);
      for (int64_t i = 0; i < valid && i < 16; ++i) to[i * pixel + q * words + k] = each[i];
    }
  }
}

// The bits of an int8 themselves, two's complement: plane 7 counts as −128.
inline void pack_bytes(const int8_t* x, int64_t stride, int64_t groups, int64_t channels,
                       int64_t words, uint64_t* to) {
  for (int64_t g = 0; g < groups; ++g, to += 8 * words) {
    for (int64_t k = 0; k < words; ++k) {
      uint64_t word[8] = {};
      const int64_t end = channels - 64 * k < 64 ? channels - 64 * k : 64;
      for (int64_t c = 0; c < end; ++c) {
        const auto value = uint64_t(uint8_t(x[(g * channels + 64 * k + c) * stride]));
        for (int q = 0; q < 8; ++q) word[q] |= (value >> q & 1) << c;
      }
      for (int q = 0; q < 8; ++q) to[q * words + k] = word[q];
    }
  }
}

// Signs that are bytes already, whose lowest bit counts; channels side by side.
inline void pack_flags(const uint8_t* x, int64_t groups, int64_t channels, int64_t words,
                       uint64_t* to) {
  for (int64_t g = 0; g < groups; ++g, x += channels, to += words) {
    for (int64_t k = 0; k < words; ++k) {
      uint64_t word = 0;
      const int64_t end = channels - 64 * k < 64 ? channels - 64 * k : 64;
#if defined(__AVX512BW__)
      if (end == 64) {
        const __m512i all = _mm512_loadu_si512(x + 64 * k);
        to[k] = _mm512_test_epi8_mask(all, _mm512_set1_epi8(1));
        continue;
      }
#endif
      for (int64_t c = 0; c < end; c += 8) {
        uint64_t eight = 0;  // the first in the lowest byte, and bit, of little-endian machines
        std::memcpy(&eight, x + 64 * k + c, size_t(end - c < 8 ? end - c : 8));
        word |= ((eight & 0x0101010101010101u) * 0x0102040810204080u >> 56) << c;
      }
      to[k] = word;
    }
  }
}

inline void pack_image(const taut::Bitplanes& op, int64_t words, uint64_t* packed,
                       const taut::Parallel& parallel) {
  const taut::Image& m = op.image;
  const int64_t channels = m.channels / op.groups;
  const int64_t pixel = op.groups * op.levels.planes * words;
  const int64_t width = m.width + 2 * op.pad_w, height = m.height + 2 * op.pad_h;
  if (words == 0) return;
  const Flips flips(op.levels);
  // A linear layer's samples are one long row: cut rows into pieces that threads can share.
  constexpr int64_t kPiece = 64;
  const int64_t pieces = m.width > 0 ? (m.width + kPiece - 1) / kPiece : 1;  // the first pads
  const int64_t grain = 1 + 16384 / (m.channels * kPiece + 1);
  parallel(m.count * height * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i % pieces, h = i / pieces % height - op.pad_h, n = i / pieces / height;
      uint64_t* row = packed + (n * height + h + op.pad_h) * width * pixel;
      if (h < 0 || h >= m.height) {
        if (piece == 0) std::memset(row, 0, size_t(width * pixel) * 8);
        continue;
      }
      if (piece == 0) {
        std::memset(row, 0, size_t(op.pad_w * pixel) * 8);
        std::memset(row + (op.pad_w + m.width) * pixel, 0, size_t(op.pad_w * pixel) * 8);
      }
      const int64_t from = piece * kPiece, to = m.width - from < kPiece ? m.width : from + kPiece;
      const int64_t at = n * m.stride_n + h * m.stride_h;
      uint64_t* out = row + op.pad_w * pixel;
      if (op.x_signs != nullptr) {
        for (int64_t w = from; w < to; ++w) {
          pack_flags(op.x_signs + at + w * m.stride_w, op.groups, channels, words, out + w * pixel);
        }
      } else if (op.x8 != nullptr) {
        for (int64_t w = from; w < to; ++w) {
          pack_bytes(op.x8 + at + w * m.stride_w, m.stride_c, op.groups, channels, words,
                     out + w * pixel);
        }
      } else if (m.stride_c == 1) {
        for (int64_t w = from; w < to; ++w) {
          pack_pixel(op.levels, flips, op.x + at + w * m.stride_w, op.groups, channels, words,
                     out + w * pixel);
        }
      } else {
        for (int64_t w = from; w < to; w += 16) {
          for (int64_t g = 0; g < op.groups; ++g) {
            pack_plane(op.levels, flips, op.x + at + w, m.stride_c, to - w, g, op.groups, channels,
                       words, pixel, out + w * pixel + g * op.levels.planes * words);
          }
        }
      }
    }
  });
}

}  // namespace
