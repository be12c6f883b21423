// Working memory that a thread keeps between calls, so that the steady state allocates nothing.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

// In an anonymous namespace, for files compiled for different processors must not share one copy.
namespace taut {
namespace {

// At least `bytes`, aligned to 64; valid until the thread asks again with the same slot.
template <int Slot>
inline void* scratch(size_t bytes) {
  struct Kept {
    void* at = nullptr;
    size_t size = 0;
    ~Kept() { std::free(at); }
  };
  static thread_local Kept kept;
  if (bytes > kept.size) {
    std::free(kept.at);
    kept.size = (bytes + 4095) / 4096 * 4096;
    kept.at = std::aligned_alloc(64, kept.size);
    if (kept.at == nullptr) {
      kept.size = 0;
      throw std::bad_alloc();
    }
  }
  return kept.at;
}

}  // namespace
}  // namespace taut
