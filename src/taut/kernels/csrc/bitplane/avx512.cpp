#include "lanes/avx512.h"

namespace {

constexpr int kPixels = 4, kStrips16 = 1;

// Counts by table: the bits of each half byte by shuffle, summed over the bytes of a word.
inline __m512i count(__m512i v) {
  const __m512i table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i half = _mm512_set1_epi8(15);
  const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(v, half));
  const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), half));
  return _mm512_sad_epu8(_mm512_add_epi8(low, high), _mm512_setzero_si512());
}

}  // namespace

#include "bitplane/avx512.h"
#include "bitplane/generic.h"

void taut::bitplane_matmul_avx512(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_avx512(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
