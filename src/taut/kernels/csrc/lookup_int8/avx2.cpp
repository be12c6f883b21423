#include "lanes/avx2.h"

namespace {

// vpmaddwd adds two products of 16 bits: the even bytes, then the odd ones.
constexpr int kRows = 2, kSamples = 4;
using Item = int16_t;
constexpr int kOffset = 0;
constexpr int place(int lane, int byte) { return byte % 2 * 32 + 2 * lane + byte / 2; }

template <int Bits>
struct ByteTable {
  static constexpr int kRegisters = Bits <= 4 ? 1 : 1 << (Bits - 4);
  __m256i part[kRegisters];

  static ByteTable load(const uint8_t* p) {
    ByteTable t;
    for (int i = 0; i < kRegisters; ++i) {
      const auto* bytes = reinterpret_cast<const __m128i*>(p + 16 * i);
      t.part[i] = _mm256_broadcastsi128_si256(_mm_load_si128(bytes));
    }
    return t;
  }
  __m256i operator()(__m256i index) const {
    const __m256i low = Bits <= 4 ? index : _mm256_and_si256(index, _mm256_set1_epi8(15));
    __m256i found[kRegisters];
    for (int i = 0; i < kRegisters; ++i) found[i] = _mm256_shuffle_epi8(part[i], low);
    for (int bit = 4, n = kRegisters; bit < Bits; ++bit, n /= 2) {
      const __m256i odd = _mm256_slli_epi16(index, 7 - bit);  // the bit becomes its byte's sign
      for (int i = 0; i < n / 2; ++i) {
        found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], odd);
      }
    }
    return found[0];
  }
  I16 operator()(I16 index) const { return {(*this)(index.lo), (*this)(index.hi)}; }
};

inline __m256i even(__m256i bytes) { return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8); }
inline __m256i odd(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

struct Weights {
  __m256i part[4];
  explicit Weights(I16 w) : part{even(w.lo), even(w.hi), odd(w.lo), odd(w.hi)} {}
};

struct Sums {
  __m256i v;
  static Sums zero() { return {_mm256_setzero_si256()}; }
  void add(const Weights& w, const Item* x) {
    for (int i = 0; i < 4; ++i) {
      const auto* items = reinterpret_cast<const __m256i*>(x + 16 * i);
      v = _mm256_add_epi32(v, _mm256_madd_epi16(w.part[i], _mm256_loadu_si256(items)));
    }
  }
  int32_t total() const {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
};

}  // namespace

#include "lookup_int8/generic.h"

void taut::lookup_matmul_int8_avx2(const LookupInt8& op, const Parallel& parallel) {
  ::lookup_matmul_int8(op, parallel);
}
