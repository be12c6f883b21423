#include "lookup_int8/avx512.h"

namespace {

// vpdpbusd adds four products of an unsigned byte and a signed one: weights are made unsigned.
using Item = int8_t;
constexpr int kOffset = 128;
constexpr int place(int lane, int byte) { return 4 * lane + byte; }

struct Weights {
  __m512i v;
  explicit Weights(I16 bytes) : v(bytes.v) {}
};

struct Sums {
  __m512i v;
  static Sums zero() { return {_mm512_setzero_si512()}; }
  void add(const Weights& w, const Item* x) {
    v = _mm512_dpbusd_epi32(v, w.v, _mm512_loadu_si512(x));
  }
  int32_t total() const { return _mm512_reduce_add_epi32(v); }
};

}  // namespace

#include "lookup_int8/generic.h"

void taut::lookup_matmul_int8_avx512_vnni(const LookupInt8& op, const Parallel& parallel) {
  ::lookup_matmul_int8(op, parallel);
}
