// Words and counts in 512-bit registers; the file that includes this says how a word is counted:
// `__m512i count(__m512i)`, the set bits of each of eight.
#pragma once

namespace {

struct Words {
  __m512i lo, hi;
  static Words load(const uint64_t* p) { return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 8)}; }
};

struct Bits {
  __m512i v;
  static Bits all(const uint64_t* p) { return {_mm512_set1_epi64(int64_t(*p))}; }
};

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
