// Sixteen bytes of a table in each lane of 512-bit registers: vpshufb reads one of sixteen, and the
// next bits of the index choose among them.
#pragma once

#include "lanes/avx512.h"

namespace {

constexpr int kRows = 4, kSamples = 4;

template <int Bits>
struct ByteTable {
  static constexpr int kRegisters = Bits <= 4 ? 1 : 1 << (Bits - 4);
  __m512i part[kRegisters];

  static ByteTable load(const uint8_t* p) {
    ByteTable t;
    for (int i = 0; i < kRegisters; ++i) {
      const auto* bytes = reinterpret_cast<const __m128i*>(p + 16 * i);
      t.part[i] = _mm512_broadcast_i32x4(_mm_load_si128(bytes));
    }
    return t;
  }
  I16 operator()(I16 index) const {
    const __m512i low = Bits <= 4 ? index.v : _mm512_and_si512(index.v, _mm512_set1_epi8(15));
    __m512i found[kRegisters];
    for (int i = 0; i < kRegisters; ++i) found[i] = _mm512_shuffle_epi8(part[i], low);
    for (int bit = 4, n = kRegisters; bit < Bits; ++bit, n /= 2) {
      const __mmask64 odd = _mm512_test_epi8_mask(index.v, _mm512_set1_epi8(char(1 << bit)));
      for (int i = 0; i < n / 2; ++i) {
        found[i] = _mm512_mask_mov_epi8(found[2 * i], odd, found[2 * i + 1]);
      }
    }
    return {found[0]};
  }
};

}  // namespace
