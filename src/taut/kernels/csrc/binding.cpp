// The operations as PyTorch sees them, through its stable ABI: one build serves many versions.
// Nothing is computed here: arguments are checked, then a kernel runs on PyTorch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "cpu.h"
#include "hashed/hashed.h"
#include "lookup/lookup.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const taut::Parallel on_torch{
    [](int64_t count, int64_t grain, taut::Parallel::Body body, void* context) {
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        body(context, begin, end);
      });
    }};

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// The data of a tensor, once its type, number of dimensions and layout are what a kernel reads.
template <class T>
T* data(const Tensor& t, const char* op, const char* name, ScalarType type, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has the wrong dtype; see its docs");
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ",
                  shape_of(t));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor lookup_matmul(const Tensor& x, const Tensor& codes, const Tensor& table, int64_t bits,
                     int64_t group) {
  constexpr auto op = "lookup_matmul";
  STD_TORCH_CHECK(1 <= bits && bits <= 8, op, ": bits must lie in 1 … 8, got ", bits);
  taut::Lookup k{};
  k.x = data<float>(x, op, "x", ScalarType::Float, 2);
  k.codes = data<uint32_t>(codes, op, "codes", ScalarType::Int, 2);
  k.table = data<float>(table, op, "table", ScalarType::Float, 3);
  k.batch = x.size(0), k.in = x.size(1), k.out = codes.size(0);
  k.words = codes.size(1), k.bits = int(bits), k.group = group;
  STD_TORCH_CHECK(k.words == taut::lookup_words(k.in, k.bits), op, ": ", k.in, " columns of ",
                  bits, " bits take ", taut::lookup_words(k.in, k.bits), " words, got codes ",
                  shape_of(codes));
  STD_TORCH_CHECK(group > 0 && (group >= k.in || group % 128 == 0), op,
                  ": group must be a multiple of 128, got ", group);
  const int64_t groups = k.in == 0 ? table.size(1) : (k.in + group - 1) / group;
  STD_TORCH_CHECK((table.size(0) == 1 || table.size(0) == k.out) && table.size(1) == groups &&
                      table.size(2) == int64_t(1) << bits,
                  op, ": table must be [1 or ", k.out, ", ", groups, ", ", int64_t(1) << bits,
                  "], got ", shape_of(table));
  k.table_stride = table.size(0) == 1 ? 0 : table.size(1) * table.size(2);
  Tensor y = torch::stable::new_empty(x, {k.batch, k.out});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kLookupVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// The weight [out, in] that a hash draws from `buckets`, or gives their gradient to.
taut::Hashed hashed(const char* op, const float* buckets, int64_t count, int64_t out, int64_t in,
                    int64_t seed, int64_t run) {
  STD_TORCH_CHECK(run == 1 || run == 4 || run == 16 || run == 64, op,
                  ": run must be 1, 4, 16 or 64, got ", run);
  STD_TORCH_CHECK(0 <= seed && seed <= UINT32_MAX, op, ": seed must lie in [0, 2**32), got ", seed);
  STD_TORCH_CHECK(1 <= count && count <= INT32_MAX, op,
                  ": there must be 1 … 2**31 - 1 buckets, got ", count);
  STD_TORCH_CHECK(0 <= out && out <= INT32_MAX && 0 <= in && in <= INT32_MAX, op,
                  ": a weight has up to 2**31 - 1 rows and columns, got [", out, ", ", in, "]");
  return {buckets, count, out, in, uint32_t(seed), int(run)};
}

Tensor hashed_matmul(const Tensor& x, const Tensor& buckets, int64_t out, int64_t seed,
                     int64_t run) {
  constexpr auto op = "hashed_matmul";
  const taut::HashedProduct k{data<float>(x, op, "x", ScalarType::Float, 2), nullptr, x.size(0)};
  const auto* from = data<float>(buckets, op, "buckets", ScalarType::Float, 1);
  const auto weight = hashed(op, from, buckets.size(0), out, x.size(1), seed, run);
  Tensor y = torch::stable::new_empty(x, {k.batch, out});
  taut::choose(taut::kHashedVariants, taut::cpu_flags())
      .run.matmul(weight, {k.x, static_cast<float*>(y.mutable_data_ptr()), k.batch}, on_torch);
  return y;
}

Tensor hashed_weight(const Tensor& buckets, int64_t out, int64_t in, int64_t seed, int64_t run) {
  constexpr auto op = "hashed_weight";
  const auto* from = data<float>(buckets, op, "buckets", ScalarType::Float, 1);
  const auto weight = hashed(op, from, buckets.size(0), out, in, seed, run);
  Tensor dense = torch::stable::new_empty(buckets, {out, in});
  taut::choose(taut::kHashedVariants, taut::cpu_flags())
      .run.weight(weight, static_cast<float*>(dense.mutable_data_ptr()), on_torch);
  return dense;
}

Tensor hashed_gradient(const Tensor& weight, int64_t buckets, int64_t seed, int64_t run) {
  constexpr auto op = "hashed_gradient";
  const auto* from = data<float>(weight, op, "weight", ScalarType::Float, 2);
  const auto k = hashed(op, nullptr, buckets, weight.size(0), weight.size(1), seed, run);
  Tensor sums = torch::stable::new_empty(weight, {buckets});
  Tensor work = torch::stable::new_empty(weight, {taut::hashed_parts(k), buckets + 63});
  const taut::HashedGradient g{from, static_cast<float*>(sums.mutable_data_ptr()),
                               static_cast<float*>(work.mutable_data_ptr())};
  taut::choose(taut::kHashedVariants, taut::cpu_flags()).run.gradient(k, g, on_torch);
  return sums;
}

// ---- what the machine has, for doctor and the tests ----

template <class Function, size_t N>
std::string names(const taut::Variant<Function> (&variants)[N], int64_t flags) {
  std::string all;
  for (const auto& v : variants) {
    if ((v.needs & ~uint32_t(flags)) == 0) all += std::string(all.empty() ? "" : " ") + v.name;
  }
  return all;
}

// The variants of an operation that processors with these flags can run, the chosen one first.
std::string variants(std::string op, int64_t flags) {
  if (op == "lookup_matmul") return names(taut::kLookupVariants, flags);
  if (op == "hashed_matmul") return names(taut::kHashedVariants, flags);
  STD_TORCH_CHECK(false, "no operation is called ", op);
}

int64_t machine_flags() { return taut::machine_flags(); }

void restrict_flags(int64_t allowed) { taut::restrict_flags(uint32_t(allowed)); }

}  // namespace

STABLE_TORCH_LIBRARY(taut, m) {
  m.def("lookup_matmul(Tensor x, Tensor codes, Tensor table, int bits, int group) -> Tensor");
  m.def("hashed_matmul(Tensor x, Tensor buckets, int out, int seed, int run) -> Tensor");
  m.def("hashed_weight(Tensor buckets, int out, int columns, int seed, int run) -> Tensor");
  m.def("hashed_gradient(Tensor weight, int buckets, int seed, int run) -> Tensor");
  m.def("variants(str op, int flags) -> str");
  m.def("machine_flags() -> int");
  m.def("restrict_flags(int allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("lookup_matmul", TORCH_BOX(&lookup_matmul));
  m.impl("hashed_matmul", TORCH_BOX(&hashed_matmul));
  m.impl("hashed_weight", TORCH_BOX(&hashed_weight));
  m.impl("hashed_gradient", TORCH_BOX(&hashed_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(taut, CompositeExplicitAutograd, m) {
  m.impl("variants", TORCH_BOX(&variants));
  m.impl("machine_flags", TORCH_BOX(&machine_flags));
  m.impl("restrict_flags", TORCH_BOX(&restrict_flags));
}
