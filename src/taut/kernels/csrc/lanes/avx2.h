// Sixteen floats or integers in two 256-bit registers (AVX2, FMA). See portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kPanels = 1;
constexpr int kDirectRows = 4;
constexpr int kTileBatch = 6;

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const int bound = n >= 8 ? 8 : n <= 0 ? 0 : int(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), lane);
}

struct F16 {
  __m256 lo, hi;

  static F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F16 load_some(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store_some(float* p, int64_t n) const {
    _mm256_maskstore_ps(p, first_lanes(n), lo);
    _mm256_maskstore_ps(p + 8, first_lanes(n - 8), hi);
  }
  F16 first(int64_t n) const {
    return {_mm256_and_ps(lo, _mm256_castsi256_ps(first_lanes(n))),
            _mm256_and_ps(hi, _mm256_castsi256_ps(first_lanes(n - 8)))};
  }
  float sum() const {
    const __m256 s = _mm256_add_ps(lo, hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
};

inline F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline F16 operator/(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline F16 multiply_add(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

struct I16 {
  __m256i lo, hi;

  static I16 all(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
  static I16 count_from(uint32_t x) {
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm256_add_epi32(_mm256_set1_epi32(int(x)), lane),
            _mm256_add_epi32(_mm256_set1_epi32(int(x + 8)), lane)};
  }
  static I16 load(const void* p) {
    const auto* words = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
  }
  static I16 load_bytes(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(raw), _mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8))};
  }
  static I16 load_shorts(const uint16_t* p) {
    const auto* words = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(words)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(words + 1))};
  }
  void store(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, hi);
  }
};

inline I16 operator+(I16 a, I16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I16 operator*(I16 a, I16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I16 operator^(I16 a, I16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline I16 operator&(I16 a, I16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline I16 operator|(I16 a, I16 b) {
  return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
inline I16 operator>>(I16 a, int n) {
  return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
}
inline I16 operator<<(I16 a, int n) {
  return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
inline __m256i high_product(__m256i a, __m256i b) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return _mm256_blend_epi32(even, odd, 0xaa);
}
inline I16 high_product(I16 a, I16 b) {
  return {high_product(a.lo, b.lo), high_product(a.hi, b.hi)};
}

inline F16 flip_signs(F16 x, I16 bits) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.lo, _mm256_and_ps(_mm256_castsi256_ps(bits.lo), sign)),
          _mm256_xor_ps(x.hi, _mm256_and_ps(_mm256_castsi256_ps(bits.hi), sign))};
}

inline I16 bits_of(F16 x) { return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)}; }
inline F16 floats_of(I16 bits) {
  return {_mm256_castsi256_ps(bits.lo), _mm256_castsi256_ps(bits.hi)};
}

inline uint32_t at_least(F16 a, F16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
  return uint32_t(lo | hi << 8);
}

inline F16 select(uint16_t bits, F16 yes, F16 no) {
  const __m256i of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_and_si256(_mm256_set1_epi32(bits), of_lane);
  const __m256i high = _mm256_and_si256(_mm256_set1_epi32(bits >> 8), of_lane);
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(_mm256_cmpeq_epi32(low, of_lane))),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(_mm256_cmpeq_epi32(high, of_lane)))};
}

struct PixelWords {
  uint64_t word[16];
  void clear() { std::memset(word, 0, sizeof word); }
  void set(uint32_t pixels, int bit) {
    for (int i = 0; i < 16; ++i) word[i] |= uint64_t(pixels >> i & 1) << bit;
  }
  void store(uint64_t* p) const { std::memcpy(p, word, sizeof word); }
};

inline F16 select_by_top(I16 bits, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(bits.lo)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(bits.hi))};
}

inline F16 load_quarters(const float* const (&at)[4]) {
  return {_mm256_loadu2_m128(at[1], at[0]), _mm256_loadu2_m128(at[3], at[2])};
}

inline F16 gather(const float* base, I16 index) {
  return {_mm256_i32gather_ps(base, index.lo, 4), _mm256_i32gather_ps(base, index.hi, 4)};
}

// Up to 16 entries stay in registers: vpermps reads one of eight, bit 3 chooses the half. A small
// table is repeated, so that higher bits of the index do no harm.
template <int Bits>
struct Table {
  const float* at;
  static Table load(const float* p) { return {p}; }
  F16 operator()(I16 index) const { return gather(at, index & I16::all((1u << Bits) - 1)); }
};

template <int Bits>
  requires(Bits <= 4)
struct Table<Bits> {
  __m256 low, high;

  static Table load(const float* p) {
    const auto* raw = reinterpret_cast<const __m128i*>(p);
    if constexpr (Bits == 1) {
      const __m256 both = _mm256_castsi256_ps(_mm256_broadcastq_epi64(_mm_loadl_epi64(raw)));
      return {both, both};
    } else if constexpr (Bits == 2) {
      const __m256 both = _mm256_castsi256_ps(_mm256_broadcastsi128_si256(_mm_loadu_si128(raw)));
      return {both, both};
    } else {
      return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + (Bits == 4 ? 8 : 0))};
    }
  }
  __m256 operator()(__m256i index) const {
    const __m256 found = _mm256_permutevar8x32_ps(low, index);
    if constexpr (Bits < 4) return found;
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(found, _mm256_permutevar8x32_ps(high, index), bit3);
  }
  F16 operator()(I16 index) const { return {(*this)(index.lo), (*this)(index.hi)}; }
};

inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int rows = 0; rows < 16; rows += 8) {
    for (int columns = 0; columns < 16; columns += 8) {
      __m256 a[8], b[8];
      for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + (rows + i) * in_stride + columns);
      for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
      }
      for (int c = 0; c < 4; ++c) {
        float* to = out + columns * out_stride + rows;
        _mm256_storeu_ps(to + c * out_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
        _mm256_storeu_ps(to + (c + 4) * out_stride, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
      }
    }
  }
}

inline void sums(const F16 (&v)[4], float* out) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(v[i].lo, v[i].hi);
  const __m256 pair =
      _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1)));
}

inline I16 minimum(I16 a, I16 b) {
  return {_mm256_min_epu32(a.lo, b.lo), _mm256_min_epu32(a.hi, b.hi)};
}

inline F16 load_signed_bytes(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(raw, 8)))};
}

inline F16 load_halves(const uint16_t* p) {
  const auto* words = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(words)), _mm256_cvtph_ps(_mm_loadu_si128(words + 1))};
}

// For each mask of eight lanes: which of the kept values a lane takes, and 128 where it takes none.
struct Expansions {
  uint8_t from[256][8];
  constexpr Expansions() : from{} {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, next = 0; i < 8; ++i) {
        from[mask][i] = mask >> i & 1 ? uint8_t(next++) : uint8_t(128);
      }
    }
  }
};
inline constexpr Expansions kExpansions;

inline __m256 expand(__m256 kept, uint32_t mask) {
  const auto* raw = reinterpret_cast<const __m128i*>(kExpansions.from[mask & 255]);
  const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64(raw));
  const __m256 none = _mm256_castsi256_ps(_mm256_srai_epi32(from, 31));
  return _mm256_andnot_ps(none, _mm256_permutevar8x32_ps(kept, from));
}

inline F16 expand(F16 kept, uint32_t mask) {
  // The upper lanes start after as many values as the lower ones took.
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const int taken = __builtin_popcount(mask & 255);
  const __m256i at = _mm256_add_epi32(lane, _mm256_set1_epi32(taken));
  const __m256 low = _mm256_permutevar8x32_ps(kept.lo, at);
  const __m256 high = _mm256_permutevar8x32_ps(kept.hi, at);
  const __m256 beyond = _mm256_castsi256_ps(_mm256_cmpgt_epi32(at, _mm256_set1_epi32(7)));
  return {expand(kept.lo, mask), expand(_mm256_blendv_ps(low, high, beyond), mask >> 8)};
}

inline F16 spread(float a, float b, float c, float d) {
  return {_mm256_set_m128(_mm_set1_ps(b), _mm_set1_ps(a)),
          _mm256_set_m128(_mm_set1_ps(d), _mm_set1_ps(c))};
}

inline void fold(F16 a, float (&out)[4]) {
  const __m256 s = _mm256_add_ps(a.lo, a.hi);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

inline bool any(I16 a) {
  const __m256i both = _mm256_or_si256(a.lo, a.hi);
  return !_mm256_testz_si256(both, both);
}

}  // namespace
