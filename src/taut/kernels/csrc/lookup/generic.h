// The algorithm of lookup_matmul: a Decoder for decode/matmul.h. Included after one of lanes/*.h.
#pragma once

#include "decode/matmul.h"
#include "lookup/lookup.h"

namespace {

// Grouped: whether tables change along a row.
template <int Bits, bool Grouped>
struct IndexDecoder {
  const taut::Lookup op;
  int64_t part_at[4];  // where those of 8, 4, 2, 1 bits begin in a row

  explicit IndexDecoder(const taut::Lookup& lookup) : op(lookup) {
    const int64_t strips = (op.in + 15) / 16;
    int64_t at = 0;
    for (int i = 0, bits = 8; i < 4; ++i, bits /= 2) {
      part_at[i] = at;
      if (Bits & bits) at += 16 * ((strips * bits + 31) / 32);
    }
  }

  struct Row {
    const uint32_t* codes;
    const float* table;
  };

  Row row(int64_t o) const {
    return {op.codes + o * op.words, op.table + o * op.table_stride};
  }

  void block(const Row& r, int64_t b, F16 (&w)[kStrips]) const {
    const float* entries = Grouped ? r.table + (b * kBlock / op.group << Bits) : r.table;
    const auto table = Table<Bits>::load(entries);
    // A block's strips fill two words of 8-bit parts, one of 4, half of one of 2, a quarter of 1.
    I16 eight[2], four, two, one;
    if constexpr (Bits & 8) {
      const int64_t words = (op.in + 63) / 64;  // the last block may have but one
      eight[0] = I16::load(r.codes + part_at[0] + 32 * b);
      eight[1] = 2 * b + 1 < words ? I16::load(r.codes + part_at[0] + 32 * b + 16) : eight[0];
    }
    if constexpr (Bits & 4) four = I16::load(r.codes + part_at[1] + 16 * b);
    if constexpr (Bits & 2) two = I16::load(r.codes + part_at[2] + b / 2 * 16) >> int(b % 2 * 16);
    if constexpr (Bits & 1) one = I16::load(r.codes + part_at[3] + b / 4 * 16) >> int(b % 4 * 8);
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (Bits == 8) {
        w[s] = table(eight[s / 4] >> (s % 4 * 8));
      } else if constexpr (Bits == 4 || Bits == 2 || Bits == 1) {
        const I16 word = Bits == 4 ? four : Bits == 2 ? two : one;
        w[s] = table(word >> (s * Bits));
      } else {
        I16 index = I16::all(0);
        int at = 0;
        if constexpr (Bits & 4) {
          index = (four >> (4 * s)) & I16::all(15);
          at = 4;
        }
        if constexpr (Bits & 2) {
          index = index | ((two >> (2 * s)) & I16::all(3)) << at;
          at += 2;
        }
        if constexpr (Bits & 1) index = index | ((one >> s) & I16::all(1)) << at;
        w[s] = table(index);
      }
    }
  }
};

template <int Bits = 1>
void lookup_matmul(const taut::Lookup& op, const taut::Parallel& parallel) {
  if constexpr (Bits <= 8) {
    if (op.bits != Bits) return lookup_matmul<Bits + 1>(op, parallel);
    const Product product{op.x, op.y, op.batch, op.in, op.out, op.in, op.out};
    if (op.group < op.in) {
      decoded_matmul(IndexDecoder<Bits, true>(op), product, parallel);
    } else {
      decoded_matmul(IndexDecoder<Bits, false>(op), product, parallel);
    }
  }
}

}  // namespace
