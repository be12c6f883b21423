// Small integers as the 16-bit floats that weights are stored in: both hold them exactly.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace check {

// IEEE half precision, for |x| <= 2048.
inline uint16_t half_of(int64_t x) {
  if (x == 0) return 0;
  const uint32_t size = uint32_t(std::abs(x));
  uint32_t power = 0;
  while (size >> (power + 1)) ++power;
  const uint32_t fraction = power <= 10 ? size << (10 - power) : size >> (power - 10);
  return uint16_t(uint32_t(x < 0) << 15 | (power + 15) << 10 | (fraction & 0x3ff));
}

// The upper half of a float, for |x| <= 256.
inline uint16_t bfloat16_of(int64_t x) {
  const auto value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

}  // namespace check
