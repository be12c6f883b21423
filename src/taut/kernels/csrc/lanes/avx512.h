// Sixteen floats or integers in one 512-bit register (AVX-512 F, BW, DQ, VL). See portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kPanels = 2;
constexpr int kDirectRows = 8;
constexpr int kTileBatch = 12;

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}

struct F16 {
  __m512 v;

  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 all(float x) { return {_mm512_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F16 load_some(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_some(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  F16 first(int64_t n) const { return {_mm512_maskz_mov_ps(first_lanes(n), v)}; }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 multiply_add(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

struct I16 {
  __m512i v;

  static I16 all(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
  static I16 count_from(uint32_t x) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_add_epi32(_mm512_set1_epi32(int(x)), lane)};
  }
  static I16 load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static I16 load_bytes(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static I16 load_shorts(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(void* p) const { _mm512_storeu_si512(p, v); }
};

inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 operator*(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I16 operator^(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I16 operator&(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I16 operator|(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I16 operator>>(I16 a, int n) { return {_mm512_srli_epi32(a.v, unsigned(n))}; }
inline I16 operator<<(I16 a, int n) { return {_mm512_slli_epi32(a.v, unsigned(n))}; }
inline I16 high_product(I16 a, I16 b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_mov_epi32(even, 0xaaaa, odd)};
}

inline F16 flip_signs(F16 x, I16 bits) {
  const __m512i sign = _mm512_set1_epi32(int(0x80000000u));
  // x ^ (bits & sign)
  const __m512i raw = _mm512_ternarylogic_epi32(_mm512_castps_si512(x.v), bits.v, sign, 0x78);
  return {_mm512_castsi512_ps(raw)};
}

inline I16 bits_of(F16 x) { return {_mm512_castps_si512(x.v)}; }
inline F16 floats_of(I16 bits) { return {_mm512_castsi512_ps(bits.v)}; }

inline uint32_t at_least(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

inline F16 select(uint16_t bits, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(bits, no.v, yes.v)};
}

struct PixelWords {
  __m512i lo, hi;
  void clear() { lo = hi = _mm512_setzero_si512(); }
  void set(uint32_t pixels, int bit) {
    const __m512i one = _mm512_set1_epi64(int64_t(uint64_t(1) << bit));
    lo = _mm512_mask_or_epi64(lo, __mmask8(pixels), lo, one);
    hi = _mm512_mask_or_epi64(hi, __mmask8(pixels >> 8), hi, one);
  }
  void store(uint64_t* p) const {
    _mm512_storeu_si512(p, lo);
    _mm512_storeu_si512(p + 8, hi);
  }
};

inline F16 select_by_top(I16 bits, F16 yes, F16 no) {
  return {_mm512_mask_mov_ps(no.v, _mm512_movepi32_mask(bits.v), yes.v)};
}

inline F16 load_quarters(const float* const (&at)[4]) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(at[0]));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at[1]), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(at[2]), 2);
  return {_mm512_insertf32x4(v, _mm_loadu_ps(at[3]), 3)};
}

inline F16 gather(const float* base, I16 index) {
  return {_mm512_i32gather_ps(index.v, base, 4)};
}

// All entries stay in registers: vpermps reads one of them, vpermi2ps one of a pair, and the next
// bits of the index choose among the pairs. A small table is repeated, so that higher bits of the
// index do no harm.
template <int Bits>
struct Table {
  static constexpr int kRegisters = Bits <= 4 ? 1 : 1 << (Bits - 4);
  __m512 part[kRegisters];

  static Table load(const float* p) {
    Table t;
    if constexpr (Bits == 1) {
      t.part[0] = _mm512_castsi512_ps(_mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    } else if constexpr (Bits == 2) {
      t.part[0] = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    } else if constexpr (Bits == 3) {
      t.part[0] = _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    } else {
      for (int i = 0; i < kRegisters; ++i) t.part[i] = _mm512_loadu_ps(p + 16 * i);
    }
    return t;
  }
  F16 operator()(I16 index) const {
    if constexpr (Bits <= 4) {
      return {_mm512_permutexvar_ps(index.v, part[0])};
    } else {
      __m512 found[kRegisters / 2];
      for (int i = 0; i < kRegisters / 2; ++i) {
        found[i] = _mm512_permutex2var_ps(part[2 * i], index.v, part[2 * i + 1]);
      }
      for (int bit = 5, n = kRegisters / 2; bit < Bits; ++bit, n /= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(index.v, _mm512_set1_epi32(1 << bit));
        for (int i = 0; i < n / 2; ++i) {
          found[i] = _mm512_mask_mov_ps(found[2 * i], odd, found[2 * i + 1]);
        }
      }
      return {found[0]};
    }
  }
};

inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4g + c]: in 128-bit lane l, column 4l + c of rows 4g … 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 p = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 q = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 s = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(out + (c + 0) * out_stride, _mm512_shuffle_f32x4(p, r, 0x88));
    _mm512_storeu_ps(out + (c + 8) * out_stride, _mm512_shuffle_f32x4(p, r, 0xdd));
    _mm512_storeu_ps(out + (c + 4) * out_stride, _mm512_shuffle_f32x4(q, s, 0x88));
    _mm512_storeu_ps(out + (c + 12) * out_stride, _mm512_shuffle_f32x4(q, s, 0xdd));
  }
}

inline void sums(const F16 (&v)[4], float* out) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i].v), _mm512_extractf32x8_ps(v[i].v, 1));
  }
  const __m256 pair =
      _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1)));
}

inline I16 minimum(I16 a, I16 b) { return {_mm512_min_epu32(a.v, b.v)}; }

inline F16 load_signed_bytes(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw))};
}

inline F16 load_halves(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline F16 expand(F16 kept, uint32_t mask) {
  return {_mm512_maskz_expand_ps(__mmask16(mask), kept.v)};
}

inline F16 spread(float a, float b, float c, float d) {
  const __m512i quarter = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return {_mm512_permutexvar_ps(quarter, _mm512_castps128_ps512(_mm_setr_ps(a, b, c, d)))};
}

inline void fold(F16 a, float (&out)[4]) {
  const __m256 s =
      _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

inline bool any(I16 a) { return _mm512_test_epi32_mask(a.v, a.v) != 0; }

}  // namespace
