#include "lanes/avx512.h"

namespace {

constexpr int kPixels = 6, kStrips16 = 2;

inline __m512i count(__m512i v) { return _mm512_popcnt_epi64(v); }

}  // namespace

#include "bitplane/avx512.h"
#include "bitplane/generic.h"

void taut::bitplane_matmul_avx512_vpopcntdq(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_avx512_vpopcntdq(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
