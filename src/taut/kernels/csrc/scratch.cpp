#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace taut {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

std::atomic<int64_t> held{0};

void* allocate(size_t bytes) {
  void* at = nullptr;
  return posix_memalign(&at, 64, bytes) == 0 ? at : nullptr;
}

struct Kept {
  void* at = nullptr;
  size_t size = 0;

  void resize(size_t to) {
    std::free(at);
    held -= int64_t(size);
    at = to == 0 ? nullptr : allocate(to);
    size = at == nullptr ? 0 : to;
    held += int64_t(size);
    if (to > 0 && at == nullptr) throw std::bad_alloc();
  }
  ~Kept() { resize(0); }
};

}  // namespace

void* scratch_memory(int slot, size_t bytes) {
  static thread_local Kept kept[3];
  if constexpr (kSanitized) {
    kept[slot].resize(bytes);  // without a spare byte, and no longer where the last piece was
  } else if (bytes > kept[slot].size) {
    kept[slot].resize((bytes + 4095) / 4096 * 4096);
  }
  return kept[slot].at;
}

int64_t scratch_bytes() { return held; }

}  // namespace taut
