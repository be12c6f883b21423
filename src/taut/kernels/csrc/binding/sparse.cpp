#include <algorithm>
#include <optional>

#include "binding/check.h"
#include "bitmap/bitmap.h"
#include "blocks/blocks.h"
#include "sparse/sparse.h"

namespace {

// Refuses row starts that do not rise from 0 to `count`: one pass that compilers make vectors of.
void check_starts(const int32_t* starts, int64_t rows, int64_t count, const char* op) {
  int32_t falls = 0;
  for (int64_t i = 0; i < rows; ++i) falls |= int32_t(starts[i + 1] < starts[i]);
  STD_TORCH_CHECK(starts[0] == 0 && !falls && starts[rows] == count, op,
                  ": starts must rise from 0 to the number of values, ", count);
}

// How values are stored, and the table or the scales that belong to them. `table` has room for
// 256 floats and outlives the call of the kernel.
taut::SparseRows sparse_rows(const Tensor& starts, const Tensor& columns, const Tensor& values,
                             const std::optional<Tensor>& scale,
                             const std::optional<Tensor>& entries, int64_t in, float* table,
                             const char* op) {
  taut::SparseRows k{};
  k.starts = data<int32_t>(starts, op, "starts", ScalarType::Int, 1);
  STD_TORCH_CHECK(starts.size(0) > 0, op, ": starts must have one item more than there are rows");
  k.in = in, k.out = starts.size(0) - 1, k.count = values.numel();
  k.wide = columns.scalar_type() == ScalarType::Int;
  k.columns = data<void>(columns, op, "columns", k.wide ? ScalarType::Int : ScalarType::UInt16, 1);
  STD_TORCH_CHECK(columns.size(0) == k.count, op, ": there must be as many columns as values, ",
                  k.count, ", got ", columns.size(0));
  STD_TORCH_CHECK(in > 0 || k.count == 0, op, ": x has no columns, but weights have");
  STD_TORCH_CHECK(in < int64_t(1) << 27, op, ": more than 2**27 columns: ", in);
  check_starts(k.starts, k.out, k.count, op);
  const ScalarType type = values.scalar_type();
  k.values = data<void>(values, op, "values", type, 1);
  const bool scaled = type == ScalarType::Char, indexed = type == ScalarType::Byte;
  STD_TORCH_CHECK(scale.has_value() == scaled && entries.has_value() == indexed, op,
                  ": int8 values come with a scale, uint8 ones with a table, others with neither");
  if (scaled) {
    k.kind = taut::Values::kInt8;
    k.scale = data<float>(*scale, op, "scale", ScalarType::Float, 1);
    STD_TORCH_CHECK(scale->size(0) == k.out, op, ": scale must be [", k.out, "], got ",
                    shape_of(*scale));
  } else if (indexed) {
    k.kind = taut::Values::kIndex;
    const float* from = data<float>(*entries, op, "table", ScalarType::Float, 1);
    const int64_t n = entries->size(0);
    STD_TORCH_CHECK(1 <= n && n <= 256, op, ": table must have 1 … 256 entries, got ", n);
    std::fill(std::copy(from, from + n, table), table + 256, 0.0f);
    k.table = table;
    k.small_table = n <= 16;
  } else {
    k.kind = type == ScalarType::Half       ? taut::Values::kHalf
             : type == ScalarType::BFloat16 ? taut::Values::kBfloat16
                                            : taut::Values::kFloat;
    STD_TORCH_CHECK(k.kind != taut::Values::kFloat || type == ScalarType::Float, op,
                    ": values has the wrong dtype; see its docs");
  }
  return k;
}

Tensor sparse_matmul(const Tensor& x, const Tensor& starts, const Tensor& columns,
                     const Tensor& values, std::optional<Tensor> scale,
                     std::optional<Tensor> table) {
  constexpr auto op = "sparse_matmul";
  taut::SparseMatmul k{};
  float entries[256];
  k.x = data<float>(x, op, "x", ScalarType::Float, 2);
  k.batch = x.size(0);
  k.rows = sparse_rows(starts, columns, values, scale, table, x.size(1), entries, op);
  Tensor y = torch::stable::new_empty(x, {k.batch, k.rows.out});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kSparseMatmulVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// Outputs of a convolution along one side, or a negative number where the kernel does not fit.
int64_t conv_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                  int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? -1 : room / stride + 1;
}

Tensor sparse_conv2d(const Tensor& x, const Tensor& starts, const Tensor& columns,
                     const Tensor& values, std::optional<Tensor> scale,
                     std::optional<Tensor> table, std::vector<int64_t> kernel,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups) {
  constexpr auto op = "sparse_conv2d";
  taut::SparseConv k{};
  float entries[256];
  k.x = data<float>(x, op, "x", ScalarType::Float, 4);
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                      dilation.size() == 2,
                  op, ": kernel, stride, padding and dilation must be pairs");
  k.batch = x.size(0), k.channels = x.size(1), k.groups = groups;
  constexpr int64_t kMost = int64_t(1) << 20;
  int64_t reads = k.channels;  // floats of a padded sample
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(1 <= kernel[i] && 1 <= stride[i] && 0 <= padding[i] && 1 <= dilation[i] &&
                        std::max({kernel[i], stride[i], padding[i], dilation[i]}) < kMost,
                    op, ": kernel, stride and dilation must be positive, padding not negative");
    k.size[i] = x.size(2 + i), k.kernel[i] = kernel[i], k.stride[i] = stride[i];
    k.padding[i] = padding[i], k.dilation[i] = dilation[i];
    k.out_size[i] = conv_size(k.size[i], kernel[i], stride[i], padding[i], dilation[i]);
    STD_TORCH_CHECK(k.out_size[i] > 0, op, ": the kernel is larger than the padded image ",
                    shape_of(x));
    STD_TORCH_CHECK(!__builtin_mul_overflow(reads, k.size[i] + 2 * padding[i], &reads) &&
                        reads < int64_t(1) << 28,
                    op, ": a padded sample has more than 2**28 values");
  }
  STD_TORCH_CHECK(groups > 0 && k.channels % groups == 0, op, ": ", k.channels,
                  " channels do not split into ", groups, " groups");
  const int64_t in = k.channels / groups * kernel[0] * kernel[1];
  k.rows = sparse_rows(starts, columns, values, scale, table, in, entries, op);
  STD_TORCH_CHECK(k.rows.out % groups == 0, op, ": ", k.rows.out, " rows do not split into ",
                  groups, " groups");
  Tensor y =
      torch::stable::new_empty(x, {k.batch, k.rows.out, k.out_size[0], k.out_size[1]});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kSparseConvVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// Values that may be float32 or float16: their data, and whether they are the latter.
const void* floats_or_halves(const Tensor& values, const char* op, int64_t dim, bool& half) {
  half = values.scalar_type() == ScalarType::Half;
  return data<void>(values, op, "values", half ? ScalarType::Half : ScalarType::Float, dim);
}

Tensor block_matmul(const Tensor& x, const Tensor& starts, const Tensor& columns,
                    const Tensor& values, int64_t out) {
  constexpr auto op = "block_matmul";
  taut::BlockMatmul k{};
  k.x = data<float>(x, op, "x", ScalarType::Float, 2);
  k.starts = data<int32_t>(starts, op, "starts", ScalarType::Int, 1);
  k.columns = data<uint16_t>(columns, op, "columns", ScalarType::UInt16, 1);
  k.values = floats_or_halves(values, op, 2, k.half);
  k.batch = x.size(0), k.in = x.size(1), k.out = out;
  k.count = values.size(0), k.rows = values.size(1);
  STD_TORCH_CHECK(k.rows == 4 || k.rows == 16, op, ": blocks must have 4 or 16 rows, got ",
                  k.rows);
  STD_TORCH_CHECK(columns.size(0) == k.count, op, ": there must be as many columns as blocks, ",
                  k.count, ", got ", columns.size(0));
  STD_TORCH_CHECK(k.in > 0 || k.count == 0, op, ": x has no columns, but weights have");
  STD_TORCH_CHECK(out >= 0 && starts.size(0) == (out + k.rows - 1) / k.rows + 1, op, ": ", out,
                  " outputs in blocks of ", k.rows, " take ", (out + k.rows - 1) / k.rows + 1,
                  " starts, got ", starts.size(0));
  check_starts(k.starts, starts.size(0) - 1, k.count, op);
  Tensor y = torch::stable::new_empty(x, {k.batch, k.out});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kBlockMatmulVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

Tensor bitmap_matmul(const Tensor& x, const Tensor& masks, const Tensor& starts,
                     const Tensor& values) {
  constexpr auto op = "bitmap_matmul";
  taut::BitmapMatmul k{};
  k.x = data<float>(x, op, "x", ScalarType::Float, 2);
  k.masks = data<uint16_t>(masks, op, "masks", ScalarType::UInt16, 2);
  k.starts = data<int32_t>(starts, op, "starts", ScalarType::Int, 2);
  k.values = floats_or_halves(values, op, 1, k.half);
  k.batch = x.size(0), k.in = x.size(1), k.out = masks.size(0), k.count = values.size(0);
  STD_TORCH_CHECK(masks.size(1) == (k.in + 15) / 16, op, ": ", k.in, " columns take ",
                  (k.in + 15) / 16, " masks, got ", shape_of(masks));
  STD_TORCH_CHECK(starts.size(0) == k.out && starts.size(1) == (k.in + 127) / 128, op,
                  ": starts must be [", k.out, ", ", (k.in + 127) / 128, "], got ",
                  shape_of(starts));
  Tensor y = torch::stable::new_empty(x, {k.batch, k.out});
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kBitmapMatmulVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

const taut::List listed{
    {"sparse_matmul", taut::names<taut::kSparseMatmulVariants>},
    {"sparse_conv2d", taut::names<taut::kSparseConvVariants>},
    {"block_matmul", taut::names<taut::kBlockMatmulVariants>},
    {"bitmap_matmul", taut::names<taut::kBitmapMatmulVariants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "sparse_matmul(Tensor x, Tensor starts, Tensor columns, Tensor values, Tensor? scale, "
      "Tensor? table) -> Tensor");
  m.def(
      "sparse_conv2d(Tensor x, Tensor starts, Tensor columns, Tensor values, Tensor? scale, "
      "Tensor? table, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> Tensor");
  m.def(
      "block_matmul(Tensor x, Tensor starts, Tensor columns, Tensor values, int out) -> Tensor");
  m.def("bitmap_matmul(Tensor x, Tensor masks, Tensor starts, Tensor values) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("sparse_matmul", TORCH_BOX(&sparse_matmul));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("block_matmul", TORCH_BOX(&block_matmul));
  m.impl("bitmap_matmul", TORCH_BOX(&bitmap_matmul));
}
