// The operations as PyTorch sees them, through its stable ABI: one build serves many versions.
// Nothing is computed here: arguments are checked, then a kernel runs on PyTorch's threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bitplane/bitplane.h"
#include "cells/cells.h"
#include "bitmap/bitmap.h"
#include "blocks/blocks.h"
#include "cpu.h"
#include "lookup/lookup.h"
#include "sparse/sparse.h"

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

// ---- bitplane_matmul ----

constexpr int64_t kMaxProducts = 1 << 24;  // of one sum: counts are floats in the end
constexpr int64_t kMaxOutputs = 1 << 30;   // beyond all weights, and sizes do not overflow

int planes_of(const char* op, const Tensor& w) {
  STD_TORCH_CHECK(1 <= w.size(1) && w.size(1) <= taut::kMaxPlanes, op,
                  ": w may have 1 … 8 planes, got ", w.size(1));
  return int(w.size(1));
}

// The arguments that linear layers and convolutions share; w says how many planes, taps and words.
taut::Bitplanes bitplanes(const char* op, const Tensor& x, const Tensor& w, const Tensor& w_scale,
                          const Tensor& w_sums, const Tensor& x_scale, const Tensor& thresholds,
                          const Tensor& pattern, double x_offset, int64_t out, int64_t groups,
                          int64_t channels, int64_t taps) {
  STD_TORCH_CHECK(0 <= out && out <= kMaxOutputs, op, ": out must lie in 0 … 2**30, got ", out);
  STD_TORCH_CHECK(0 < groups && groups <= kMaxOutputs && channels % groups == 0 &&
                      out % groups == 0,
                  op, ": ", channels, " channels and ", out, " outputs do not fall into ", groups,
                  " groups");
  STD_TORCH_CHECK(taps <= kMaxProducts && channels / groups <= kMaxProducts / taps, op,
                  ": sums of at most 2**24 products are exact, got ", taps, " × ",
                  channels / groups);
  const int64_t padded = groups * ((out / groups + 15) / 16 * 16);
  taut::Bitplanes k{};
  k.w = data<uint64_t>(w, op, "w", ScalarType::Long, 5);
  k.w_planes = planes_of(op, w), k.out = out, k.groups = groups, k.x_offset = float(x_offset);
  STD_TORCH_CHECK(w.size(0) == padded / 16 && w.size(2) == taps &&
                      w.size(3) == (channels / groups + 63) / 64 && w.size(4) == 16,
                  op, ": w must be [", padded / 16, ", planes, ", taps, ", ",
                  (channels / groups + 63) / 64, ", 16], got ", shape_of(w));
  k.w_scale = data<float>(w_scale, op, "w_scale", ScalarType::Float, 2);
  STD_TORCH_CHECK(w_scale.size(0) == k.w_planes && w_scale.size(1) == padded, op,
                  ": w_scale must be [", k.w_planes, ", ", padded, "], got ", shape_of(w_scale));
  k.tap_sums = data<float>(w_sums, op, "w_sums", ScalarType::Float, 2);
  STD_TORCH_CHECK(w_sums.size(0) == taps + 1 && w_sums.size(1) == padded, op, ": w_sums must be [",
                  taps + 1, ", ", padded, "], got ", shape_of(w_sums));
  k.w_sums = k.tap_sums + taps * padded;
  k.x_scale = data<float>(x_scale, op, "x_scale", ScalarType::Float, 1);
  STD_TORCH_CHECK(1 <= x_scale.size(0) && x_scale.size(0) <= taut::kMaxPlanes, op,
                  ": x may have 1 … 8 planes, got ", x_scale.size(0));
  k.levels.planes = int(x_scale.size(0));
  if (x.scalar_type() == ScalarType::Char) {
    STD_TORCH_CHECK(k.levels.planes == 8, op, ": int8 has 8 planes, got ", k.levels.planes);
    k.x8 = static_cast<const int8_t*>(x.data_ptr());
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32 or int8");
    k.x = static_cast<const float*>(x.data_ptr());
  }
  k.levels.thresholds = data<float>(thresholds, op, "thresholds", ScalarType::Float, 2);
  k.levels.pattern = data<uint8_t>(pattern, op, "pattern", ScalarType::Byte, 1);
  STD_TORCH_CHECK(1 <= pattern.size(0) && pattern.size(0) <= taut::kMaxLevels, op,
                  ": x may have 1 … 16 levels, got ", pattern.size(0));
  k.levels.count = int(pattern.size(0));
  k.levels.per_channel = thresholds.size(1) != 1;
  STD_TORCH_CHECK(thresholds.size(0) == k.levels.count - 1 &&
                      (thresholds.size(1) == 1 || thresholds.size(1) == channels),
                  op, ": ", k.levels.count, " levels have thresholds [", k.levels.count - 1,
                  ", 1 or ", channels, "], got ", shape_of(thresholds));
  return k;
}

Tensor bitplane_matmul(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                       const Tensor& w_sums, const Tensor& x_scale, const Tensor& thresholds,
                       const Tensor& pattern, double x_offset, int64_t out) {
  constexpr auto op = "bitplane_matmul";
  STD_TORCH_CHECK(x.is_cpu(), op, ": x must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op,
                  ": x must be contiguous and have 2 dimensions, got ", shape_of(x));
  const int64_t batch = x.size(0), in = x.size(1);
  auto k = bitplanes(op, x, w, w_scale, w_sums, x_scale, thresholds, pattern, x_offset, out, 1, in, 1);
  k.image = {1, in, 1, batch, 0, 1, 0, in};
  k.kernel_h = k.kernel_w = k.stride_h = k.stride_w = k.dilation_h = k.dilation_w = 1;
  k.out_h = 1, k.out_w = batch;
  Tensor y = torch::stable::empty({batch, out}, ScalarType::Float);
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kBitplaneVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// y comes as [count, height, width, out]: channels last.
Tensor bitplane_conv2d(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                       const Tensor& w_sums, const Tensor& x_scale, const Tensor& thresholds,
                       const Tensor& pattern, double x_offset, double pad, int64_t out,
                       int64_t groups, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  constexpr auto op = "bitplane_conv2d";
  STD_TORCH_CHECK(x.is_cpu(), op, ": x must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", shape_of(x));
  for (const auto* pair : {&kernel, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, op, ": kernel, stride, padding and dilation are pairs");
    for (int64_t n : *pair) {
      STD_TORCH_CHECK(n >= (pair == &padding ? 0 : 1) && n < (1 << 20), op,
                      ": kernel, stride and dilation are at least 1, padding at least 0; got ", n);
    }
  }
  auto k = bitplanes(op, x, w, w_scale, w_sums, x_scale, thresholds, pattern, x_offset, out, groups,
                     x.size(1), kernel[0] * kernel[1]);
  k.image = {x.size(0), x.size(1), x.size(2), x.size(3),
             x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  STD_TORCH_CHECK(k.image.stride_c == 1 || k.image.stride_w == 1, op,
                  ": x must have its channels, or its columns, side by side");
  k.kernel_h = kernel[0], k.kernel_w = kernel[1], k.stride_h = stride[0], k.stride_w = stride[1];
  k.pad_h = padding[0], k.pad_w = padding[1];
  k.dilation_h = dilation[0], k.dilation_w = dilation[1], k.pad = float(pad);
  // Bytes of all bits, in floating point, where nothing overflows; no size counts as none.
  double bytes = 8.0 * groups * k.levels.planes * std::max<int64_t>(w.size(3), 1);
  bytes *= double(std::max<int64_t>(k.image.count, 1)) *
           std::max(double(k.image.height) + 2 * k.pad_h, 1.0) *
           std::max(double(k.image.width) + 2 * k.pad_w, 1.0);
  STD_TORCH_CHECK(bytes < 0x1p45, op, ": the padded image is too large: x is ", shape_of(x),
                  ", padded by ", k.pad_h, " × ", k.pad_w);
  const int64_t room_h = k.image.height + 2 * k.pad_h - k.dilation_h * (k.kernel_h - 1) - 1;
  const int64_t room_w = k.image.width + 2 * k.pad_w - k.dilation_w * (k.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, op, ": the kernel is larger than the padded image");
  k.out_h = room_h / k.stride_h + 1, k.out_w = room_w / k.stride_w + 1;
  Tensor y = torch::stable::empty({x.size(0), k.out_h, k.out_w, out}, ScalarType::Float);
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kBitplaneVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

Tensor bitplane_real(const Tensor& x, const Tensor& w, const Tensor& w_scale, int64_t out) {
  constexpr auto op = "bitplane_real";
  STD_TORCH_CHECK(0 <= out && out <= kMaxOutputs, op, ": out must lie in 0 … 2**30, got ", out);
  taut::BitWeights k{};
  k.x = data<float>(x, op, "x", ScalarType::Float, 2);
  k.w = data<uint64_t>(w, op, "w", ScalarType::Long, 5);
  k.w_scale = data<float>(w_scale, op, "w_scale", ScalarType::Float, 2);
  k.batch = x.size(0), k.in = x.size(1), k.out = out, k.planes = planes_of(op, w);
  const int64_t strips = (out + 15) / 16;
  STD_TORCH_CHECK(w.size(0) == strips && w.size(2) == 1 && w.size(3) == (k.in + 63) / 64 &&
                      w.size(4) == 16,
                  op, ": w must be [", strips, ", planes, 1, ", (k.in + 63) / 64, ", 16], got ",
                  shape_of(w));
  STD_TORCH_CHECK(w_scale.size(0) == k.planes && w_scale.size(1) == 16 * strips, op,
                  ": w_scale must be [", k.planes, ", ", 16 * strips, "], got ", shape_of(w_scale));
  Tensor y = torch::stable::empty({k.batch, out}, ScalarType::Float);
  k.y = static_cast<float*>(y.mutable_data_ptr());
  taut::choose(taut::kBitplaneRealVariants, taut::cpu_flags()).run(k, on_torch);
  return y;
}

// ---- recurrent cells ----

// [cell's or one part, batch, size]: the hidden state, then an LSTM's cell.
Tensor recurrent_cell(const char* op, int gates, taut::RecurrentCell run, const Tensor& i,
                      const Tensor& h, const Tensor& state) {
  taut::Cell k{};
  k.i = data<float>(i, op, "i", ScalarType::Float, 2);
  k.h = data<float>(h, op, "h", ScalarType::Float, 2);
  k.state = data<float>(state, op, "state", ScalarType::Float, 2);
  k.batch = state.size(0), k.size = state.size(1);
  for (const Tensor* t : {&i, &h}) {
    STD_TORCH_CHECK(t->size(0) == k.batch && t->size(1) == gates * k.size, op,
                    ": i and h must be [", k.batch, ", ", gates * k.size, "], got ", shape_of(*t));
  }
  const int64_t parts = gates == 4 ? 2 : 1;
  Tensor y = torch::stable::empty({parts, k.batch, k.size}, ScalarType::Float);
  k.hidden = static_cast<float*>(y.mutable_data_ptr());
  k.cell = k.hidden + k.batch * k.size;
  run(k, on_torch);
  return y;
}

Tensor lstm_cell(const Tensor& i, const Tensor& h, const Tensor& cell) {
  const auto& variant = taut::choose(taut::kLstmVariants, taut::cpu_flags());
  return recurrent_cell("lstm_cell", 4, variant.run, i, h, cell);
}

Tensor gru_cell(const Tensor& i, const Tensor& h, const Tensor& state) {
  const auto& variant = taut::choose(taut::kGruVariants, taut::cpu_flags());
  return recurrent_cell("gru_cell", 3, variant.run, i, h, state);
}

// ---- sparse weights ----

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

// ---- what the machine has, for doctor and the tests ----

template <const auto& Variants>
std::string names(int64_t flags) {
  std::string all;
  for (const auto& v : Variants) {
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
    {"bitplane_conv2d", names<taut::kBitplaneVariants>},
    {"bitplane_matmul", names<taut::kBitplaneVariants>},
    {"bitplane_real", names<taut::kBitplaneRealVariants>},
    {"gru_cell", names<taut::kGruVariants>},
    {"lookup_matmul", names<taut::kLookupVariants>},
    {"lstm_cell", names<taut::kLstmVariants>},
    {"sparse_matmul", names<taut::kSparseMatmulVariants>},
    {"sparse_conv2d", names<taut::kSparseConvVariants>},
    {"block_matmul", names<taut::kBlockMatmulVariants>},
    {"bitmap_matmul", names<taut::kBitmapMatmulVariants>},
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
  m.def(
      "bitplane_matmul(Tensor x, Tensor w, Tensor w_scale, Tensor w_sums, Tensor x_scale, "
      "Tensor thresholds, Tensor pattern, float x_offset, int out) -> Tensor");
  m.def(
      "bitplane_conv2d(Tensor x, Tensor w, Tensor w_scale, Tensor w_sums, Tensor x_scale, "
      "Tensor thresholds, Tensor pattern, float x_offset, float pad, int out, int groups, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("bitplane_real(Tensor x, Tensor w, Tensor w_scale, int out) -> Tensor");
  m.def("gru_cell(Tensor i, Tensor h, Tensor state) -> Tensor");
  m.def("lstm_cell(Tensor i, Tensor h, Tensor cell) -> Tensor");
  m.def("lookup_matmul(Tensor x, Tensor codes, Tensor table, int bits, int group) -> Tensor");
  m.def("operations() -> str");
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
  m.def("variants(str op, int flags) -> str");
  m.def("build() -> str");
  m.def("machine_flags() -> int");
  m.def("restrict_flags(int allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("bitplane_matmul", TORCH_BOX(&bitplane_matmul));
  m.impl("bitplane_conv2d", TORCH_BOX(&bitplane_conv2d));
  m.impl("bitplane_real", TORCH_BOX(&bitplane_real));
  m.impl("gru_cell", TORCH_BOX(&gru_cell));
  m.impl("lstm_cell", TORCH_BOX(&lstm_cell));
  m.impl("lookup_matmul", TORCH_BOX(&lookup_matmul));
  m.impl("sparse_matmul", TORCH_BOX(&sparse_matmul));
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("block_matmul", TORCH_BOX(&block_matmul));
  m.impl("bitmap_matmul", TORCH_BOX(&bitmap_matmul));
}

STABLE_TORCH_LIBRARY_IMPL(taut, CompositeExplicitAutograd, m) {
  m.impl("operations", TORCH_BOX(&operations));
  m.impl("variants", TORCH_BOX(&variants));
  m.impl("build", TORCH_BOX(&build));
  m.impl("machine_flags", TORCH_BOX(&machine_flags));
  m.impl("restrict_flags", TORCH_BOX(&restrict_flags));
}
