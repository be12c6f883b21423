// Tables and sums without vector instructions of our own.
#pragma once

#include <cstring>

namespace {

constexpr int kRows = 2, kSamples = 2;
using Item = int16_t;
constexpr int kOffset = 0;
constexpr int place(int lane, int byte) { return 4 * lane + byte; }

template <int Bits>
struct ByteTable {
  uint8_t entry[1 << (Bits < 4 ? 4 : Bits)];

  static ByteTable load(const uint8_t* p) {
    ByteTable t;
    std::memcpy(t.entry, p, sizeof t.entry);
    return t;
  }
  I16 operator()(I16 index) const {
    uint8_t bytes[64];
    index.store(bytes);
    for (auto& b : bytes) b = entry[b];
    return I16::load(bytes);
  }
};

struct Weights {
  int16_t value[64];
  explicit Weights(I16 w) {
    int8_t bytes[64];
    w.store(bytes);
    for (int i = 0; i < 64; ++i) value[i] = bytes[i];
  }
};

struct Sums {
  int32_t each[4];
  static Sums zero() { return {}; }
  void add(const Weights& w, const Item* x) {
    for (int i = 0; i < 64; ++i) each[i % 4] += w.value[i] * x[i];
  }
  int32_t total() const { return (each[0] + each[1]) + (each[2] + each[3]); }
};

}  // namespace
