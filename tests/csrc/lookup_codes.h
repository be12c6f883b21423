// Indices in the order that lookup/lookup.h describes, written down bit by bit.
#pragma once

#include "check.h"
#include "lookup/lookup.h"

namespace check {

struct Indices {
  int64_t in, out, words;
  int bits;
  std::vector<uint8_t> index;  // [out, in]
  Exact<uint32_t> codes;       // [out, words]; what no column uses stays set

  Indices(Random& random, int64_t in, int64_t out, int bits)
      : in(in), out(out), words(taut::lookup_words(in, bits)), bits(bits),
        index(size_t(in * out)), codes(words * out) {
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t k = 0; k < in; ++k) {
        const uint32_t value = random.bits() >> (32 - bits);
        index[size_t(o * in + k)] = uint8_t(value);
        write(o, k, value);
      }
    }
  }

  uint8_t at(int64_t o, int64_t k) const { return index[size_t(o * in + k)]; }

 private:
  void write(int64_t o, int64_t k, uint32_t value) {
    uint32_t* part = codes.data() + o * words;
    const int64_t strip = k / 16, strips = (in + 15) / 16;
    for (int b = 8; b > 0; b /= 2) {
      if (!(bits & b)) continue;
      const int64_t fields = 32 / b;
      const int shift = int(strip % fields) * b;
      const uint32_t mask = (1u << b) - 1;
      uint32_t& word = part[16 * (strip / fields) + k % 16];
      word = (word & ~(mask << shift)) | (value & mask) << shift;
      value >>= b;
      part += 16 * ((strips + fields - 1) / fields);
    }
  }
};

}  // namespace check
