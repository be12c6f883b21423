#include "lanes/avx512.h"

namespace {

constexpr int kPixels = 4, kStrips16 = 1;

struct Words {
  __m512i lo, hi;
  static Words load(const uint64_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 8)}; }
};

struct Bits {
  __m512i v;
  static Bits all(const uint64_t* p) { return {_mm512_set1_epi64(int64_t(*p))}; }
};

// Counts by table: the bits of each half byte by shuffle, summed over the bytes of a word.
inline __m512i count(__m512i v) {
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i half = _mm512_set1_epi8(15);
  const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(v, half));
  const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), half));
  return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
}

struct Counts {
  __m512i lo, hi;
  static Counts zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
  void add(const Words& w, const Bits& b) {
    lo = _mm512_add_epi64(lo, count(_mm512_xor_si512(w.lo, b.v)));
    hi = _mm512_add_epi64(hi, count(_mm512_xor_si512(w.hi, b.v)));
  }
  F16 floats() const {
    const __m512i low_halves =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return {_mm512_cvtepi32_ps(_mm512_permutex2var_epi32(lo, low_halves, hi))};
  }
};

}  // namespace

#include "bitplane/generic.h"

void taut::bitplane_matmul_avx512(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_avx512(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
