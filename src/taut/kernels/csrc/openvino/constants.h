// The numbers of an operation's weight, as it finds them in one constant of bytes: arrays one after
// another, each starting at a multiple of 64. Which arrays, and of what size, the attributes say;
// nothing is read before its size was checked, and no byte may be left over.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "openvino/core/except.hpp"

namespace taut {

constexpr int64_t kMostBytes = int64_t(1) << 40;

// The product of counts that are not negative, refused beyond kMostBytes.
inline int64_t size_of(std::initializer_list<int64_t> counts) {
  int64_t size = 1;
  for (int64_t n : counts) {
    OPENVINO_ASSERT(n >= 0 && !__builtin_mul_overflow(size, n, &size) && size <= kMostBytes,
                    "taut: the attributes ask for arrays of absurd size");
  }
  return size;
}

class Arrays {
 public:
  Arrays(const uint8_t* at, size_t bytes) : at_(at), left_(int64_t(bytes)) {}

  template <class T>
  const T* next(const char* name, std::initializer_list<int64_t> counts) {
    const int64_t bytes = (size_of(counts) * int64_t(sizeof(T)) + 63) / 64 * 64;
    OPENVINO_ASSERT(bytes <= left_, "taut: the constant ends within ", name, ", which takes ",
                    bytes, " bytes; ", left_, " are left");
    const auto* from = reinterpret_cast<const T*>(at_);
    at_ += bytes, left_ -= bytes;
    return from;
  }

  void end() const {
    OPENVINO_ASSERT(left_ == 0, "taut: the constant has ", left_, " bytes more than it should");
  }

 private:
  const uint8_t* at_;
  int64_t left_;
};

}  // namespace taut
