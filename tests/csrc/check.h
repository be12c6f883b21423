// What the tests in C++ share: checks, buffers without a spare byte, threads, every variant.
//
// A file here is one operation. It includes this header and that of the operation, and holds
// TAUT_TEST(name) { … } with CHECKs; nothing else lists it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "parallel.h"

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

#define TAUT_TEST(name)                                                              \
  static void name();                                                                \
  static const bool name##_listed = (check::tests().push_back({#name, name}), true); \
  static void name()

// The case is printed when it fails: CHECK(a == b, "%s, %d bits", variant, bits).
#define CHECK(holds, ...)                                                        \
  do {                                                                           \
    if (!(holds)) {                                                              \
      ++check::failures();                                                       \
      std::fprintf(stderr, "%s:%d: %s does not hold: ", __FILE__, __LINE__, #holds); \
      std::fprintf(stderr, __VA_ARGS__);                                         \
      std::fputc('\n', stderr);                                                  \
    }                                                                            \
  } while (false)

// `count` items that end where their allocation ends and start `skew` items into it, so that a
// sanitizer sees the first byte read beyond them. Filled with 0xff: NaNs, or all bits set.
template <class T>
class Exact {
 public:
  static_assert(std::is_trivially_copyable_v<T>);
  explicit Exact(int64_t count, int64_t skew = 0)
      : count_(count), skew_(skew), block_(static_cast<T*>(std::malloc(bytes()))) {
    if (block_ == nullptr) std::abort();
    std::memset(static_cast<void*>(block_), 0xff, bytes());
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(block_); }

  T* data() { return block_ + skew_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  size_t bytes() const { return size_t(count_ + skew_) * sizeof(T); }

  int64_t count_, skew_;
  T* block_;
};

// The same numbers on every run and every machine.
class Random {
 public:
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 32);
  }
  int64_t between(int64_t low, int64_t high) {
    return low + int64_t(bits() % uint64_t(high - low + 1));
  }

 private:
  uint64_t state_ = 0x7a757421u;
};

// Three threads at once, each with its piece.
inline constexpr taut::Parallel three_threads{
    [](int64_t count, int64_t grain, taut::Parallel::Body body, void* context) {
      const int64_t least = grain < 1 ? 1 : grain;
      const int64_t pieces = count / least < 1 ? 1 : count / least > 3 ? 3 : count / least;
      std::vector<std::thread> all;
      for (int64_t i = 0; i < pieces; ++i) {
        all.emplace_back(body, context, count * i / pieces, count * (i + 1) / pieces);
      }
      for (auto& thread : all) thread.join();
    }};

// Calls use(name, run) with every variant that this machine can run.
template <class Function, size_t N, class Use>
void each_variant(const taut::Variant<Function> (&variants)[N], Use&& use) {
  for (const auto& v : variants) {
    if ((v.needs & ~taut::machine_flags()) == 0) use(v.name, v.run);
  }
}

// Whatever the processor has, dispatch finds the first variant that it can run; the last one runs
// anywhere, and none is out of reach.
template <class Function, size_t N>
void dispatch(const taut::Variant<Function> (&variants)[N]) {
  CHECK(variants[N - 1].needs == taut::kAny, "%s needs something", variants[N - 1].name);
  bool reached[N] = {};
  for (uint32_t flags = 0; flags < 64; ++flags) {
    size_t first = 0;
    while (variants[first].needs & ~flags) ++first;
    const auto& chosen = taut::choose(variants, flags);
    CHECK(&chosen == &variants[first], "flags %u: %s", flags, chosen.name);
    reached[first] = true;
  }
  for (size_t i = 0; i < N; ++i) CHECK(reached[i], "%s never runs", variants[i].name);
}

}  // namespace check
