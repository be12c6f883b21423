// Working memory that a thread keeps between calls, so that the steady state allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taut {

// At least `bytes`, aligned to 64; valid until the thread asks again with the same slot (0, 1, 2).
void* scratch_memory(int slot, size_t bytes);

// What all threads hold now, in bytes.
int64_t scratch_bytes();

template <int Slot>
inline void* scratch(size_t bytes) {
  static_assert(0 <= Slot && Slot < 3);
  return scratch_memory(Slot, bytes);
}

}  // namespace taut
