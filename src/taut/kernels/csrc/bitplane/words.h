// Words and counts without vector instructions; the compiler has a count for one word everywhere.
#pragma once

#include <cstdint>

namespace {

constexpr int kPixels = 2, kStrips16 = 1;

struct Words {
  const uint64_t* at;
  static Words load(const uint64_t* p) { return {p}; }
};

struct Bits {
  uint64_t v;
  static Bits all(const uint64_t* p) { return {*p}; }
};

struct Counts {
  float each[16];  // counts are whole numbers below 2**24: exact
  static Counts zero() { return {}; }
  void add(const Words& w, const Bits& b) {
    for (int i = 0; i < 16; ++i) each[i] += float(__builtin_popcountll(w.at[i] ^ b.v));
  }
  F16 floats() const { return F16::load(each); }
};

}  // namespace
