// Threads are lent: a kernel splits its work into [0, count) and whoever runs it (PyTorch, another
// engine, a test) calls the body on pieces of that range, from as many threads as it likes.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace taut {

struct Parallel {
  // Calls body(context, begin, end) on disjoint pieces that cover [0, count), each of at least
  // `grain` items unless the range itself is shorter.
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  void (*run)(int64_t count, int64_t grain, Body body, void* context);

  template <class F>
  void operator()(int64_t count, int64_t grain, F&& body) const {
    if (count <= 0) return;
    run(count, grain,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
  }
};

// All in the calling thread: for tests and for engines that run their operators in parallel.
inline constexpr Parallel serial{
    [](int64_t count, int64_t, Parallel::Body body, void* context) { body(context, 0, count); }};

}  // namespace taut
