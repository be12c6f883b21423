#include <algorithm>

#include "binding/check.h"
#include "lookup/lookup.h"
#include "lookup/lstm.h"
#include "lookup_int8/lookup_int8.h"

namespace {

// What a product of so many columns looks up; x and y are the caller's.
taut::Lookup lookup(const char* op, int64_t batch, int64_t in, const Tensor& codes,
                    const Tensor& table, int64_t bits, int64_t group) {
  STD_TORCH_CHECK(1 <= bits && bits <= 8, op, ": bits must lie in 1 … 8, got ", bits);
  taut::Lookup k{};
  k.codes = data<uint32_t>(codes, op, "codes", ScalarType::Int, 2);
  k.table = data<float>(table, op, "table", ScalarType::Float, 3);
  k.batch = batch, k.in = in, k.out = codes.size(0);
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
  return k;
}

Tensor lookup_matmul(const Tensor& x, const Tensor& codes, const Tensor& table, int64_t bits,
                     int64_t group) {
  constexpr auto op = "lookup_matmul";
  const float* from = data<float>(x, op, "x", ScalarType::Float, 2);
  taut::Lookup k = lookup(op, x.size(0), x.size(1), codes, table, bits, group);
  Tensor y = torch::stable::new_empty(x, {k.batch, k.out});
  k.x = from, k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kLookupVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// [steps + 2, batch, size]: the hidden states, the given one first, and the last cell.
Tensor lookup_lstm(const Tensor& inputs, const Tensor& hidden, const Tensor& cell,
                   const Tensor& codes, const Tensor& table, int64_t bits, int64_t group) {
  constexpr auto op = "lookup_lstm";
  const float* from = data<float>(inputs, op, "inputs", ScalarType::Float, 3);
  const int64_t steps = inputs.size(0), batch = inputs.size(1), size = hidden.size(1);
  const taut::Lookup k = lookup(op, batch, size, codes, table, bits, group);
  STD_TORCH_CHECK(inputs.size(2) == 4 * size && k.out == 4 * size, op, ": inputs must be [steps, ",
                  "batch, ", 4 * size, "] and the weight have ", 4 * size, " rows, got ",
                  shape_of(inputs), " and ", k.out);
  for (const Tensor* t : {&hidden, &cell}) {
    data<float>(*t, op, "hidden and cell", ScalarType::Float, 2);
    STD_TORCH_CHECK(t->size(0) == batch && t->size(1) == size, op, ": hidden and cell must be [",
                    batch, ", ", size, "], got ", shape_of(*t));
  }
  Tensor y = torch::stable::new_empty(inputs, {steps + 2, batch, size});
  Tensor gates = torch::stable::new_empty(inputs, {batch, 4 * size});
  auto* states = static_cast<float*>(y.mutable_data_ptr());
  float* last = states + (steps + 1) * batch * size;
  std::copy_n(static_cast<const float*>(hidden.data_ptr()), batch * size, states);
  std::copy_n(static_cast<const float*>(cell.data_ptr()), batch * size, last);
  taut::lookup_lstm(k, from, static_cast<float*>(gates.mutable_data_ptr()), states, last, steps,
                    on_torch);
  return y;
}

Tensor lookup_matmul_int8(const Tensor& x, const Tensor& codes, const Tensor& table,
                          const Tensor& scale, int64_t bits) {
  constexpr auto op = "lookup_matmul_int8";
  STD_TORCH_CHECK(1 <= bits && bits <= 8, op, ": bits must lie in 1 … 8, got ", bits);
  taut::LookupInt8 k{};
  k.x = data<int8_t>(x, op, "x", ScalarType::Char, 2);
  k.codes = data<uint32_t>(codes, op, "codes", ScalarType::Int, 2);
  k.table = data<int8_t>(table, op, "table", ScalarType::Char, 2);
  k.scale = data<float>(scale, op, "scale", ScalarType::Float, 1);
  k.batch = x.size(0), k.in = x.size(1), k.out = codes.size(0);
  k.words = codes.size(1), k.bits = int(bits);
  STD_TORCH_CHECK(k.in <= taut::kLookupInt8Columns, op, ": at most ", taut::kLookupInt8Columns,
                  " columns are added up in 32 bits, got ", k.in);
  STD_TORCH_CHECK(k.words == taut::lookup_words(k.in, k.bits), op, ": ", k.in, " columns of ",
                  bits, " bits take ", taut::lookup_words(k.in, k.bits), " words, got codes ",
                  shape_of(codes));
  STD_TORCH_CHECK((table.size(0) == 1 || table.size(0) == k.out) &&
                      table.size(1) == int64_t(1) << bits,
                  op, ": table must be [1 or ", k.out, ", ", int64_t(1) << bits, "], got ",
                  shape_of(table));
  STD_TORCH_CHECK(scale.size(0) == k.out, op, ": scale must be [", k.out, "], got ",
                  shape_of(scale));
  k.table_stride = table.size(0) == 1 ? 0 : table.size(1);
  Tensor y = torch::stable::new_empty(scale, {k.batch, k.out});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kLookupInt8Variants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

const taut::List listed{
    {"lookup_lstm", taut::names<taut::kLookupVariants>},
    {"lookup_matmul", taut::names<taut::kLookupVariants>},
    {"lookup_matmul_int8", taut::names<taut::kLookupInt8Variants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "lookup_lstm(Tensor inputs, Tensor hidden, Tensor cell, Tensor codes, Tensor table, int bits, "
      "int group) -> Tensor");
  m.def("lookup_matmul(Tensor x, Tensor codes, Tensor table, int bits, int group) -> Tensor");
  m.def(
      "lookup_matmul_int8(Tensor x, Tensor codes, Tensor table, Tensor scale, int bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("lookup_lstm", TORCH_BOX(&lookup_lstm));
  m.impl("lookup_matmul", TORCH_BOX(&lookup_matmul));
  m.impl("lookup_matmul_int8", TORCH_BOX(&lookup_matmul_int8));
}
