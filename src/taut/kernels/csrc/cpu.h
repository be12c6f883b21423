// What the processor can do, as flags that can be invented: dispatch is a function of them.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace taut {

enum Cpu : uint32_t {
  kAny = 0,
  kAvx2 = 1,       // AVX2, FMA, F16C
  kAvx512 = 2,     // AVX-512 F, BW, DQ, VL, beside AVX2
  kVpopcntdq = 4,  // 64-bit population counts
  kVnni = 8,       // sums of four int8 products
  kNeon = 16,
};

// The flags of this machine, read once.
uint32_t machine_flags();

// The clock in GHz, by timing additions that wait for one another: a cycle each.
double clock_ghz();

// The flags in force: the machine's, or fewer after restrict_flags (for tests).
uint32_t cpu_flags();
void restrict_flags(uint32_t allowed);

// One way to run an operation: its name, what it needs, and the function.
template <class Function>
struct Variant {
  const char* name;
  uint32_t needs;
  Function run;
};

// The first variant whose needs are met. Lists are ordered from fast to portable, and the last one
// needs nothing.
template <class Function, size_t N>
const Variant<Function>& choose(const Variant<Function> (&variants)[N], uint32_t flags) {
  for (const auto& variant : variants) {
    if ((variant.needs & ~flags) == 0) return variant;
  }
  return variants[N - 1];
}

}  // namespace taut
