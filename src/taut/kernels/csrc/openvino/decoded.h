// lookup_matmul, lookup_matmul_int8 and hashed_matmul in OpenVINO: weights as indices
// (lookup/lookup.h), those times whole numbers (lookup_int8/lookup_int8.h), or weights drawn from
// buckets by a hash (hashed/hashed.h).
#pragma once

#include <algorithm>
#include <vector>

#include "hashed/hashed.h"
#include "lookup/lookup.h"
#include "lookup_int8/lookup_int8.h"
#include "openvino/product.h"

namespace taut {

class LookupMatmulOp : public Product<LookupMatmulOp> {
 public:
  OPENVINO_OP("LookupMatmul", "taut");
  void take(const LookupMatmulOp& other) {
    in_ = other.in_, bits_ = other.bits_, tables_ = other.tables_, group_ = other.group_;
  }

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in", in_);
    visitor.on_attribute("bits", bits_);
    visitor.on_attribute("tables", tables_);
    visitor.on_attribute("group", group_);
  }

  void read(Arrays& arrays) {
    check("in", in_, 1, INT32_MAX);
    check("bits", bits_, 1, 8);
    check("group", group_, 1, INT32_MAX);
    NODE_VALIDATION_CHECK(this, tables_ == 1 || tables_ == out_, "taut: there must be 1 or ", out_,
                          " tables, got ", tables_);
    NODE_VALIDATION_CHECK(this, group_ >= in_ || group_ % 128 == 0,
                          "taut: group must be a multiple of 128, got ", group_);
    const int64_t groups = (in_ + group_ - 1) / group_, entries = int64_t(1) << bits_;
    k_.in = in_, k_.out = out_, k_.bits = int(bits_), k_.group = group_;
    k_.words = lookup_words(in_, int(bits_));
    k_.codes = arrays.next<uint32_t>("codes", {out_, k_.words});
    k_.table = arrays.next<float>("table", {tables_, groups, entries});
    k_.table_stride = tables_ == 1 ? 0 : groups * entries;
  }

  ov::PartialShape shape(const ov::PartialShape& x) const { return linear_shape(x, in_, out_); }

  void run(const Call& c) const {
    auto k = k_;
    k.x = c.x, k.y = c.y, k.batch = rows_of(c.x_shape);
    choose(kLookupVariants, cpu_flags()).run(k, on_openvino);
    finish(c.y, c.beside, k.batch, 1);
  }

 private:
  int64_t in_ = 0, bits_ = 1, tables_ = 1, group_ = 1;
  Lookup k_{};
};

// It rounds x itself: n = nearest(x / step) in [low, high], y = scale · Σ n · table.
class LookupMatmulInt8Op : public Product<LookupMatmulInt8Op> {
 public:
  OPENVINO_OP("LookupMatmulInt8", "taut");
  void take(const LookupMatmulInt8Op& other) {
    in_ = other.in_, bits_ = other.bits_, low_ = other.low_, high_ = other.high_;
  }

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in", in_);
    visitor.on_attribute("bits", bits_);
    visitor.on_attribute("low", low_);
    visitor.on_attribute("high", high_);
  }

  void read(Arrays& arrays) {
    check("in", in_, 1, kLookupInt8Columns);
    check("bits", bits_, 1, 8);
    check("low", low_, -128, 0);
    check("high", high_, 1, 127);
    k_.in = in_, k_.out = out_, k_.bits = int(bits_), k_.table_stride = 0;
    k_.words = lookup_words(in_, int(bits_));
    k_.codes = arrays.next<uint32_t>("codes", {out_, k_.words});
    k_.table = reinterpret_cast<const int8_t*>(
        arrays.next<uint8_t>("table", {int64_t(1) << bits_}));
    k_.scale = arrays.next<float>("steps of rows", {out_});
    step_ = *arrays.next<float>("step", {1});
    NODE_VALIDATION_CHECK(this, step_ > 0, "taut: step must be above 0, got ", step_);
  }

  ov::PartialShape shape(const ov::PartialShape& x) const { return linear_shape(x, in_, out_); }

  void run(const Call& c) const {
    thread_local std::vector<int8_t> whole;
    auto k = k_;
    k.batch = rows_of(c.x_shape), k.y = c.y;
    whole.resize(size_t(k.batch * in_));
    constexpr float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number
    const float low = float(low_), high = float(high_);
    for (size_t i = 0; i < whole.size(); ++i) {
      const float n = std::min(high, std::max(low, c.x[i] / step_));  // NaN becomes low
      whole[i] = int8_t(int32_t(n + magic - magic));
    }
    k.x = whole.data();
    choose(kLookupInt8Variants, cpu_flags()).run(k, on_openvino);
    finish(c.y, c.beside, k.batch, 1);
  }

 private:
  int64_t in_ = 0, bits_ = 1, low_ = 0, high_ = 0;
  float step_ = 1;
  LookupInt8 k_{};
};

class HashedMatmulOp : public Product<HashedMatmulOp> {
 public:
  OPENVINO_OP("HashedMatmul", "taut");
  void take(const HashedMatmulOp& other) {
    in_ = other.in_, count_ = other.count_, seed_ = other.seed_, width_ = other.width_;
  }

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in", in_);
    visitor.on_attribute("count", count_);
    visitor.on_attribute("seed", seed_);
    visitor.on_attribute("run", width_);
  }

  void read(Arrays& arrays) {
    check("in", in_, 1, INT32_MAX);
    check("count", count_, 1, INT32_MAX);
    check("seed", seed_, 0, UINT32_MAX);
    NODE_VALIDATION_CHECK(this, width_ == 1 || width_ == 4 || width_ == 16 || width_ == 64,
                          "taut: run must be 1, 4, 16 or 64, got ", width_);
    k_ = {arrays.next<float>("buckets", {count_ + kHashReach}), count_, out_, in_,
          uint32_t(seed_), int(width_)};
  }

  ov::PartialShape shape(const ov::PartialShape& x) const { return linear_shape(x, in_, out_); }

  void run(const Call& c) const {
    const int64_t batch = rows_of(c.x_shape);
    choose(kHashedVariants, cpu_flags()).run.matmul(k_, {c.x, c.y, batch}, on_openvino);
    finish(c.y, c.beside, batch, 1);
  }

 private:
  int64_t in_ = 0, count_ = 1, seed_ = 0, width_ = 1;
  Hashed k_{};
};

}  // namespace taut
