#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace taut {
namespace {

uint32_t read_flags() {
  uint32_t flags = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2) flags |= kAvx2;
  if (avx512) flags |= kAvx512;
  if (avx512 && __builtin_cpu_supports("avx512vpopcntdq")) flags |= kVpopcntdq;
  if (avx512 && __builtin_cpu_supports("avx512vnni")) flags |= kVnni;
#elif defined(__aarch64__)
  flags |= kNeon;  // part of every 64-bit Arm processor
#endif
  return flags;
}

std::atomic<uint32_t> allowed{~0u};

}  // namespace

uint32_t machine_flags() {
  static const uint32_t flags = read_flags();
  return flags;
}

double clock_ghz() {
  constexpr int64_t kSteps = 10'000'000;
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    uint64_t x = 0;
    for (int64_t i = 0; i < kSteps; ++i) {
      x += 1;
      asm volatile("" : "+r"(x));
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(kSteps) / took.count() * 1e-9);
  }
  return best;
}

uint32_t cpu_flags() { return machine_flags() & allowed.load(std::memory_order_relaxed); }

void restrict_flags(uint32_t flags) { allowed.store(flags, std::memory_order_relaxed); }

}  // namespace taut
