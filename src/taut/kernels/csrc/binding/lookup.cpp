#include "binding/check.h"
#include "lookup/lookup.h"
#include "lookup_int8/lookup_int8.h"

namespace {

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
    {"lookup_matmul", taut::names<taut::kLookupVariants>},
    {"lookup_matmul_int8", taut::names<taut::kLookupInt8Variants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def("lookup_matmul(Tensor x, Tensor codes, Tensor table, int bits, int group) -> Tensor");
  m.def(
      "lookup_matmul_int8(Tensor x, Tensor codes, Tensor table, Tensor scale, int bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("lookup_matmul", TORCH_BOX(&lookup_matmul));
  m.impl("lookup_matmul_int8", TORCH_BOX(&lookup_matmul_int8));
}
