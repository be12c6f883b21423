#include "hashed/hashed.h"

#include "binding/check.h"

namespace {

// The weight [out, in] that a hash draws from so many buckets, or gives their gradient to.
taut::Hashed hashed(const char* op, int64_t count, int64_t out, int64_t in, int64_t seed,
                    int64_t run) {
  STD_TORCH_CHECK(run == 1 || run == 4 || run == 16 || run == 64, op,
                  ": run must be 1, 4, 16 or 64, got ", run);
  STD_TORCH_CHECK(0 <= seed && seed <= UINT32_MAX, op, ": seed must lie in [0, 2**32), got ", seed);
  STD_TORCH_CHECK(1 <= count && count <= INT32_MAX, op,
                  ": there must be 1 … 2**31 - 1 buckets, got ", count);
  STD_TORCH_CHECK(0 <= out && out <= INT32_MAX && 0 <= in && in <= INT32_MAX, op,
                  ": a weight has up to 2**31 - 1 rows and columns, got [", out, ", ", in, "]");
  return {nullptr, count, out, in, uint32_t(seed), int(run)};
}

const float* wrapped(const char* op, const Tensor& buckets, int64_t count) {
  const auto* from = data<float>(buckets, op, "buckets", ScalarType::Float, 1);
  STD_TORCH_CHECK(buckets.size(0) == count + taut::kHashReach, op, ": buckets must be [", count,
                  " + ", taut::kHashReach, "], the first ones once more behind the last, got ",
                  shape_of(buckets));
  return from;
}

Tensor hashed_matmul(const Tensor& x, const Tensor& buckets, int64_t count, int64_t out,
                     int64_t seed, int64_t run) {
  constexpr auto op = "hashed_matmul";
  const taut::HashedProduct k{data<float>(x, op, "x", ScalarType::Float, 2), nullptr, x.size(0)};
  auto weight = hashed(op, count, out, x.size(1), seed, run);
  weight.buckets = wrapped(op, buckets, count);
  Tensor y = torch::stable::new_empty(x, {k.batch, out});
  taut::choose(taut::kHashedVariants, taut::cpu_flags())
      .run.matmul(weight, {k.x, static_cast<float*>(y.mutable_data_ptr()), k.batch}, on_torch);
  return y;
}

Tensor hashed_weight(const Tensor& buckets, int64_t count, int64_t out, int64_t in, int64_t seed,
                     int64_t run) {
  constexpr auto op = "hashed_weight";
  auto weight = hashed(op, count, out, in, seed, run);
  weight.buckets = wrapped(op, buckets, count);
  Tensor dense = torch::stable::new_empty(buckets, {out, in});
  taut::choose(taut::kHashedVariants, taut::cpu_flags())
      .run.weight(weight, static_cast<float*>(dense.mutable_data_ptr()), on_torch);
  return dense;
}

Tensor hashed_gradient(const Tensor& weight, int64_t count, int64_t seed, int64_t run) {
  constexpr auto op = "hashed_gradient";
  const auto* from = data<float>(weight, op, "weight", ScalarType::Float, 2);
  const auto k = hashed(op, count, weight.size(0), weight.size(1), seed, run);
  Tensor sums = torch::stable::new_empty(weight, {count});
  Tensor work =
      torch::stable::new_empty(weight, {taut::hashed_parts(k), count + taut::kHashReach});
  const taut::HashedGradient g{from, static_cast<float*>(sums.mutable_data_ptr()),
                               static_cast<float*>(work.mutable_data_ptr())};
  taut::choose(taut::kHashedVariants, taut::cpu_flags()).run.gradient(k, g, on_torch);
  return sums;
}

const taut::List listed{
    {"hashed_matmul", taut::names<taut::kHashedVariants>},
    {"hashed_weight", taut::names<taut::kHashedVariants>},
    {"hashed_gradient", taut::names<taut::kHashedVariants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def("hashed_matmul(Tensor x, Tensor buckets, int count, int out, int seed, int run) -> Tensor");
  m.def(
      "hashed_weight(Tensor buckets, int count, int out, int columns, int seed, int run) "
      "-> Tensor");
  m.def("hashed_gradient(Tensor weight, int count, int seed, int run) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("hashed_matmul", TORCH_BOX(&hashed_matmul));
  m.impl("hashed_weight", TORCH_BOX(&hashed_weight));
  m.impl("hashed_gradient", TORCH_BOX(&hashed_gradient));
}
