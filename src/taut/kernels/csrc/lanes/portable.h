// Sixteen floats or integers at a time, in the compiler's vector types: runs on every machine, and
// is the pattern that the other headers of this folder follow.
#pragma once

#include <cstdint>
#include <cstring>

#include "scratch.h"

namespace {

constexpr int kPanels = 1;     // F16 registers across the outputs of a tile (decode/matmul.h)
constexpr int kDirectRows = 4;  // rows at a time for one sample
constexpr int kTileBatch = 4;  // samples of a tile

struct F16 {
  typedef float Vector __attribute__((vector_size(64)));
  Vector v;

  static F16 zero() { return {Vector{}}; }
  static F16 all(float x) { return {Vector{} + x}; }
  static F16 load(const float* p) {
    F16 r;
    std::memcpy(&r.v, p, 64);
    return r;
  }
  static F16 load_some(const float* p, int64_t n) {  // the first n, then zeros
    F16 r = zero();
    if (n > 0) std::memcpy(&r.v, p, size_t(n < 16 ? n : 16) * 4);
    return r;
  }
  void store(float* p) const { std::memcpy(p, &v, 64); }
  void store_some(float* p, int64_t n) const {
    if (n > 0) std::memcpy(p, &v, size_t(n < 16 ? n : 16) * 4);
  }
  F16 first(int64_t n) const {  // the first n lanes, zeros after them, whatever stood there
    F16 r = zero();
    for (int64_t i = 0; i < n && i < 16; ++i) r.v[i] = v[i];
    return r;
  }
  float sum() const {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = v[i] + v[i + 8];
    for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
  }
};

inline F16 operator+(F16 a, F16 b) { return {a.v + b.v}; }
inline F16 operator-(F16 a, F16 b) { return {a.v - b.v}; }
inline F16 operator*(F16 a, F16 b) { return {a.v * b.v}; }
inline F16 operator/(F16 a, F16 b) { return {a.v / b.v}; }
inline F16 multiply_add(F16 a, F16 b, F16 c) { return {a.v * b.v + c.v}; }  // a · b + c

struct I16 {
  typedef uint32_t Vector __attribute__((vector_size(64)));
  Vector v;

  static I16 all(uint32_t x) { return {Vector{} + x}; }
  static I16 count_from(uint32_t x) {
    I16 r = all(x);
    for (int i = 0; i < 16; ++i) r.v[i] += i;
    return r;
  }
  static I16 load(const void* p) {
    I16 r;
    std::memcpy(&r.v, p, 64);
    return r;
  }
  static I16 load_bytes(const uint8_t* p) {
    I16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  static I16 load_shorts(const uint16_t* p) {
    I16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  void store(void* p) const { std::memcpy(p, &v, 64); }
};

inline I16 operator+(I16 a, I16 b) { return {a.v + b.v}; }
inline I16 operator*(I16 a, I16 b) { return {a.v * b.v}; }  // the low 32 bits
inline I16 operator^(I16 a, I16 b) { return {a.v ^ b.v}; }
inline I16 operator&(I16 a, I16 b) { return {a.v & b.v}; }
inline I16 operator|(I16 a, I16 b) { return {a.v | b.v}; }
inline I16 operator>>(I16 a, int n) { return {a.v >> n}; }
inline I16 operator<<(I16 a, int n) { return {a.v << n}; }
inline I16 high_product(I16 a, I16 b) {  // the high 32 bits of a · b
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = uint32_t((uint64_t(a.v[i]) * b.v[i]) >> 32);
  return r;
}

inline I16 bits_of(F16 x) {
  I16 r;
  std::memcpy(&r.v, &x.v, 64);
  return r;
}

// Flips the sign of the lanes whose top bit is set in `bits`.
inline F16 flip_signs(F16 x, I16 bits) {
  const I16 raw = bits_of(x) ^ (bits & I16::all(0x80000000u));
  std::memcpy(&x.v, &raw.v, 64);
  return x;
}

// Bit i: whether a[i] >= b[i]; never for NaN.
inline uint32_t at_least(F16 a, F16 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(a.v[i] >= b.v[i]) << i;
  return bits;
}

// Lanes of floats whose bits these are.
inline F16 floats_of(I16 bits) {
  F16 r;
  std::memcpy(&r.v, &bits.v, 64);
  return r;
}

// Lane i: yes[i] where bit i is set, else no[i].
inline F16 select(uint16_t bits, F16 yes, F16 no) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = bits >> i & 1 ? yes.v[i] : no.v[i];
  return r;
}

// A 64-bit word for each of sixteen pixels, of which one bit is set at a time.
struct PixelWords {
  uint64_t word[16];
  void clear() { std::memset(word, 0, sizeof word); }
  void set(uint32_t pixels, int bit) {
    for (int i = 0; i < 16; ++i) word[i] |= uint64_t(pixels >> i & 1) << bit;
  }
  void store(uint64_t* p) const { std::memcpy(p, word, sizeof word); }
};

// `yes` in the lanes whose top bit is set in `bits`, `no` in the others.
inline F16 select_by_top(I16 bits, F16 yes, F16 no) {
  typedef int32_t Signed __attribute__((vector_size(64)));
  return {reinterpret_cast<const Signed&>(bits.v) < 0 ? yes.v : no.v};
}

inline F16 load_quarters(const float* const (&at)[4]) {  // four floats from each
  F16 r;
  for (int i = 0; i < 4; ++i) std::memcpy(reinterpret_cast<char*>(&r.v) + 16 * i, at[i], 16);
  return r;
}

inline F16 gather(const float* base, I16 index) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = base[index.v[i]];
  return r;
}

// A table of 2**Bits floats, from which sixteen indices below 2**Bits are looked up at once.
template <int Bits>
struct Table {
  const float* at;
  static Table load(const float* p) { return {p}; }
  F16 operator()(I16 index) const {  // only the lowest Bits of each index count
    return gather(at, index & I16::all((1u << Bits) - 1));
  }
};

// The columns of a 16 × 16 matrix become rows: out[c * stride + r] = in[r * in_stride + c].
inline void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  }
}

// The sums of four vectors.
inline void sums(const F16 (&v)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = v[i].sum();
}

// The smaller of two unsigned numbers, lane by lane.
inline I16 minimum(I16 a, I16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}

inline F16 load_signed_bytes(const int8_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}

// Sixteen IEEE half-precision numbers. Multiplying by 2**112 moves the exponent and makes
// subnormals normal; what has the highest exponent (infinite or no number) gets float's.
inline F16 load_halves(const uint16_t* p) {
  const I16 half = I16::load_shorts(p);
  const I16 magnitude = (half & I16::all(0x7fff)) << 13;
  F16 r = floats_of(magnitude) * F16::all(0x1p112f);
  I16 special = I16::all(0);
  for (int i = 0; i < 16; ++i) special.v[i] = magnitude.v[i] >= 0x0f800000u ? 0x7f800000u : 0;
  I16 raw;
  std::memcpy(&raw.v, &r.v, 64);
  return flip_signs(floats_of(raw | special), half << 16);
}

// Spreads the first lanes, in order, over those whose bit is set; the others become zero.
inline F16 expand(F16 kept, uint32_t mask) {
  F16 r = F16::zero();
  for (int i = 0, from = 0; i < 16; ++i) {
    if (mask >> i & 1) r.v[i] = kept.v[from++];
  }
  return r;
}

// Each of four floats in four lanes side by side.
inline F16 spread(float a, float b, float c, float d) {
  F16 r;
  for (int i = 0; i < 4; ++i) r.v[i] = a, r.v[4 + i] = b, r.v[8 + i] = c, r.v[12 + i] = d;
  return r;
}

// out[i] = the sum of lanes i, 4 + i, 8 + i, 12 + i.
inline void fold(F16 a, float (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = (a.v[i] + a.v[8 + i]) + (a.v[4 + i] + a.v[12 + i]);
}

// Whether any bit is set.
inline bool any(I16 a) {
  uint32_t all = 0;
  for (int i = 0; i < 16; ++i) all |= a.v[i];
  return all != 0;
}

}  // namespace
