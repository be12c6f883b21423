// Where the parts of a row of indices start. See lookup.h.
#pragma once

#include <cstdint>

namespace {

// at: of the parts of 8, 4, 2, 1 bits, of which the powers of two in Bits are there.
template <int Bits>
inline void find_parts(int64_t in, int64_t (&at)[4]) {
  const int64_t strips = (in + 15) / 16;
  int64_t words = 0;
  for (int i = 0, bits = 8; i < 4; ++i, bits /= 2) {
    at[i] = words;
    if (Bits & bits) words += 16 * ((strips * bits + 31) / 32);
  }
}

}  // namespace
