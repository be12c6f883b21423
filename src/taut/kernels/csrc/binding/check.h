// What the bindings share: PyTorch's threads, checks of tensors, and the list of operations. PyTorch
// is met through its stable ABI, so that one build serves many versions. Nothing is computed in this
// folder: arguments are checked, then a kernel runs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "cpu.h"
#include "parallel.h"

namespace taut {

// An operation, and the names of the variants that processors with these flags can run.
struct Operation {
  const char* name;
  std::string (*variants)(int64_t flags);
};

// All that the bindings have listed.
std::vector<Operation>& operations();

template <const auto& Variants>
std::string names(int64_t flags) {
  std::string all;
  for (const auto& v : Variants) {
    if ((v.needs & ~uint32_t(flags)) == 0) all += std::string(all.empty() ? "" : " ") + v.name;
  }
  return all;
}

// Lists operations while the library is loaded.
struct List {
  List(std::initializer_list<Operation> some) {
    operations().insert(operations().end(), some.begin(), some.end());
  }
};

}  // namespace taut

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const taut::Parallel on_torch{
    [](int64_t count, int64_t grain, taut::Parallel::Body body, void* context) {
      torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        body(context, begin, end);
      });
    }};

inline std::string shape_of(const Tensor& t) {
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

}  // namespace
