// sparse_matmul and sparse_conv2d in OpenVINO (sparse/sparse.h): compressed rows, whose values may
// be indices into a table.
#pragma once

#include "openvino/product.h"
#include "sparse/sparse.h"

namespace taut {

// How rows are stored. `values`: 0 float, 1 half, 2 bfloat16, 3 int8 with a scale for each row,
// 4 indices into a table of `entries`.
struct RowLayout {
  int64_t count = 0, values = 0, entries = 0;

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("count", count);
    visitor.on_attribute("values", values);
    visitor.on_attribute("entries", entries);
  }

  SparseRows read(Arrays& arrays, int64_t in, int64_t out) const {
    constexpr int64_t kWidths[] = {4, 2, 2, 1, 1};
    OPENVINO_ASSERT(0 <= count && count <= INT32_MAX && 0 <= values && values <= 4,
                    "taut: no sparse weight has ", count, " values of the kind ", values);
    OPENVINO_ASSERT(in < int64_t(1) << 27, "taut: more than 2**27 columns: ", in);
    OPENVINO_ASSERT((values == 4) == (entries > 0) && entries <= 256 && entries >= 0,
                    "taut: indices point into 1 … 256 entries, got ", entries);
    SparseRows k{};
    k.in = in, k.out = out, k.count = count, k.kind = Values(values), k.wide = in > (1 << 16);
    k.starts = arrays.next<int32_t>("starts", {out + 1});
    k.columns = arrays.next<uint8_t>("columns", {count, k.wide ? 4 : 2});
    k.values = arrays.next<uint8_t>("values", {count, kWidths[values]});
    if (k.kind == Values::kInt8) k.scale = arrays.next<float>("row_scale", {out});
    if (k.kind == Values::kIndex) k.table = arrays.next<float>("table", {256});
    k.small_table = entries <= 16;
    bool rise = k.starts[0] == 0 && k.starts[out] == count;
    for (int64_t i = 0; i < out; ++i) rise &= k.starts[i] <= k.starts[i + 1];
    OPENVINO_ASSERT(rise, "taut: starts must rise from 0 to the number of values, ", count);
    return k;
  }
};

class SparseMatmulOp : public Product<SparseMatmulOp> {
 public:
  OPENVINO_OP("SparseMatmul", "taut");
  void take(const SparseMatmulOp& other) { in_ = other.in_, rows_ = other.rows_; }

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in", in_);
    rows_.visit(visitor);
  }

  void read(Arrays& arrays) {
    check("in", in_, 1, INT32_MAX);
    k_ = rows_.read(arrays, in_, out_);
  }

  ov::PartialShape shape(const ov::PartialShape& x) const { return linear_shape(x, in_, out_); }

  void run(const Call& c) const {
    const taut::SparseMatmul k{k_, c.x, c.y, rows_of(c.x_shape)};
    choose(kSparseMatmulVariants, cpu_flags()).run(k, on_openvino);
    finish(c.y, c.beside, k.batch, 1);
  }

 private:
  int64_t in_ = 0;
  RowLayout rows_;
  SparseRows k_{};
};

// x: [n, channels, height, width]; y and what is added to it: [n, out, height, width].
class SparseConv2dOp : public Product<SparseConv2dOp> {
 public:
  OPENVINO_OP("SparseConv2d", "taut");
  void take(const SparseConv2dOp& other) { window_ = other.window_, rows_ = other.rows_; }

  void visit(ov::AttributeVisitor& visitor) {
    window_.visit(visitor);
    rows_.visit(visitor);
  }

  void read(Arrays& arrays) {
    window_.check(out_);
    k_ = rows_.read(arrays, size_of({window_.channels / window_.groups, window_.taps()}), out_);
  }

  ov::PartialShape shape(const ov::PartialShape& x) const {
    if (x.rank().is_dynamic()) return ov::PartialShape::dynamic(4);
    OPENVINO_ASSERT(x.size() == 4 && x[1].compatible(window_.channels),
                    "taut: x must have 4 dimensions and ", window_.channels, " channels, got ", x);
    return {x[0], out_, window_.places(x[2], 0), window_.places(x[3], 1)};
  }

  void run(const Call& c) const {
    SparseConv k{};
    k.rows = k_, k.x = c.x, k.y = c.y;
    k.batch = int64_t(c.x_shape[0]), k.channels = window_.channels, k.groups = window_.groups;
    int64_t reads = k.channels;  // floats of a padded sample
    for (int i = 0; i < 2; ++i) {
      k.size[i] = int64_t(c.x_shape[2 + i]), k.out_size[i] = int64_t(c.y_shape[2 + i]);
      k.kernel[i] = window_.kernel[i], k.stride[i] = window_.stride[i];
      k.padding[i] = window_.padding[i], k.dilation[i] = window_.dilation[i];
      OPENVINO_ASSERT(!__builtin_mul_overflow(reads, k.size[i] + 2 * k.padding[i], &reads) &&
                          reads < int64_t(1) << 28,
                      "taut: a padded sample has more than 2**28 values");
    }
    choose(kSparseConvVariants, cpu_flags()).run(k, on_openvino);
    finish(c.y, c.beside, k.batch, k.out_size[0] * k.out_size[1]);
  }

 private:
  Window window_;
  RowLayout rows_;
  SparseRows k_{};
};

}  // namespace taut
