// The operations as PyTorch sees them, through its stable ABI: one build serves many versions.
// Nothing is computed here: arguments are checked, then a kernel runs on PyTorch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu.h"
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

// ---- what the machine has, for doctor and the tests ----

template <class Function, size_t N>
std::string names(const taut::Variant<Function> (&variants)[N], int64_t flags) {
  std::string all;
  for (const auto& v : variants) {
    if ((v.needs & ~uint32_t(flags)) == 0) all += std::string(all.empty() ? "" : " ") + v.name;
  }
  return all;
}

struct Operation {
  const char* name;
  std::string (*variants)(int64_t flags);
};

// Every operation, a line each.
const Operation kOperations[] = {
    {"lookup_matmul", [](int64_t flags) { return names(taut::kLookupVariants, flags); }},
};

std::string operations() {
  std::string all;
  for (const auto& op : kOperations) all += std::string(all.empty() ? "" : " ") + op.name;
  return all;
}

// The variants of an operation that processors with these flags can run, the chosen one first.
std::string variants(std::string op, int64_t flags) {
  for (const auto& each : kOperations) {
    if (op == each.name) return each.variants(flags);
  }
  STD_TORCH_CHECK(false, "no operation is called ", op, "; there are ", operations());
}

// What compiled this library, and the PyTorch whose headers it read.
std::string build() {
#if defined(__clang__)
  return "clang " __clang_version__ ", PyTorch " TORCH_VERSION;
#else
  return "g++ " __VERSION__ ", PyTorch " TORCH_VERSION;
#endif
}

int64_t machine_flags() { return taut::machine_flags(); }

void restrict_flags(int64_t allowed) { taut::restrict_flags(uint32_t(allowed)); }

}  // namespace

STABLE_TORCH_LIBRARY(taut, m) {
  m.def("lookup_matmul(Tensor x, Tensor codes, Tensor table, int bits, int group) -> Tensor");
  m.def("operations() -> str");
  m.def("variants(str op, int flags) -> str");
  m.def("build() -> str");
  m.def("machine_flags() -> int");
  m.def("restrict_flags(int allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("lookup_matmul", TORCH_BOX(&lookup_matmul)); }

STABLE_TORCH_LIBRARY_IMPL(taut, CompositeExplicitAutograd, m) {
  m.impl("operations", TORCH_BOX(&operations));
  m.impl("variants", TORCH_BOX(&variants));
  m.impl("build", TORCH_BOX(&build));
  m.impl("machine_flags", TORCH_BOX(&machine_flags));
  m.impl("restrict_flags", TORCH_BOX(&restrict_flags));
}
