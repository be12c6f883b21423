// Where the parts of a row of indices start. See lookup.h.
#pragma once

#include <cstdint>

namespace {

// part: those of 8, 4, 2, 1 bits, of which the powers of two in Bits are there.
template <int Bits>
inline void find_parts(const uint32_t* row, int64_t in, const uint32_t* (&part)[4]) {
  const int64_t strips = (in + 15) / 16;
  for (int i = 0, bits = 8; i < 4; ++i, bits /= 2) {
    if (!(Bits & bits)) continue;
    part[i] = row;
    row += 16 * ((strips * bits + 31) / 32);
  }
}

}  // namespace
