#include "lanes/avx2.h"

namespace {

constexpr int kPixels = 2, kStrips16 = 1;

struct Words {
  __m256i part[4];
  static Words load(const uint64_t* p) {
    Words w;
    for (int i = 0; i < 4; ++i) w.part[i] = _mm256_loadu_si256((const __m256i*)(p + 4 * i));
    return w;
  }
};

struct Bits {
  __m256i v;
  static Bits all(const uint64_t* p) { return {_mm256_set1_epi64x(int64_t(*p))}; }
};

// Counts by table: the bits of each half byte by shuffle, summed over the bytes of a word.
inline __m256i count(__m256i v) {
  const __m256i table = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i half = _mm256_set1_epi8(15);
  const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(v, half));
  const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), half));
  return _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256());
}

struct Counts {
  __m256i part[4];
  static Counts zero() {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
  }
  void add(const Words& w, const Bits& b) {
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm256_add_epi64(part[i], count(_mm256_xor_si256(w.part[i], b.v)));
    }
  }
  F16 floats() const {
    const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    __m256 each[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i a = _mm256_permutevar8x32_epi32(part[2 * i], low_halves);
      const __m256i b = _mm256_permutevar8x32_epi32(part[2 * i + 1], low_halves);
      each[i] = _mm256_cvtepi32_ps(_mm256_blend_epi32(a, b, 0xf0));
    }
    return {each[0], each[1]};
  }
};

}  // namespace

#include "bitplane/generic.h"

void taut::bitplane_matmul_avx2(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_avx2(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
