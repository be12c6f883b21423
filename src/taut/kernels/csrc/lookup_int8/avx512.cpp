#include "lookup_int8/avx512.h"

namespace {

// vpmaddwd adds two products of 16 bits: the even bytes, then the odd ones.
using Item = int16_t;
constexpr int kOffset = 0;
constexpr int place(int lane, int byte) { return byte % 2 * 32 + 2 * lane + byte / 2; }

struct Weights {
  __m512i even, odd;
  explicit Weights(I16 bytes)
      : even(_mm512_srai_epi16(_mm512_slli_epi16(bytes.v, 8), 8)),
        odd(_mm512_srai_epi16(bytes.v, 8)) {}
};

struct Sums {
  __m512i v;
  static Sums zero() { return {_mm512_setzero_si512()}; }
  void add(const Weights& w, const Item* x) {
    v = _mm512_add_epi32(v, _mm512_madd_epi16(w.even, _mm512_loadu_si512(x)));
    v = _mm512_add_epi32(v, _mm512_madd_epi16(w.odd, _mm512_loadu_si512(x + 32)));
  }
  int32_t total() const { return _mm512_reduce_add_epi32(v); }
};

}  // namespace

#include "lookup_int8/generic.h"

void taut::lookup_matmul_int8_avx512(const LookupInt8& op, const Parallel& parallel) {
  ::lookup_matmul_int8(op, parallel);
}
