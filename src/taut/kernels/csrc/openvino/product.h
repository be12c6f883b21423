// What all of Taut's operations in OpenVINO share.
//
//     y = max(scale[o] · product(x, weight) + shift[o] + beside, 0)
//
// Inputs: x float32; a constant of bytes, which begins with scale and shift and goes on with the
// weight (constants.h); and, if there is a third one, `beside`, of the shape of y. The maximum is
// taken where `relu` is 1. Bias, batch norm, the sum of a residual block and ReLU are all in it.
//
// Products of bits hand signs on instead of numbers that the next one would only cut: where `signs`
// is 1, a second output is [y ≥ threshold[o]], a byte each; where it is 2, that is the only one. The
// thresholds end the constant. x may then be such signs.
//
// Whatever a file says is checked before a kernel sees it: bad constants throw.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "cpu.h"
#include "openvino/constants.h"
#include "openvino/core/parallel.hpp"
#include "openvino/op/constant.hpp"
#include "openvino/op/op.hpp"
#include "parallel.h"

namespace taut {

// OpenVINO's own threads: as many as the inference was given.
inline const Parallel on_openvino{
    [](int64_t count, int64_t grain, Parallel::Body body, void* context) {
      const int64_t most = std::max<int64_t>(count / std::max<int64_t>(grain, 1), 1);
      const int pieces = int(std::min<int64_t>(parallel_get_max_threads(), most));
      if (pieces <= 1) return body(context, 0, count);
      ov::parallel_nt_static(pieces, [&](int i, int n) {
        body(context, count * i / n, count * (i + 1) / n);
      });
    }};

// The bytes of a constant where kernels may read them: aligned, and alive as long as the operation.
class Held {
 public:
  explicit Held(std::shared_ptr<ov::op::v0::Constant> from)
      : from_(std::move(from)), size_(from_->get_byte_size()) {
    at_ = static_cast<const uint8_t*>(from_->get_data_ptr());
    if (reinterpret_cast<uintptr_t>(at_) % 64 != 0) {
      copy_ = ov::Tensor(ov::element::u8, {size_ + 64});
      auto* to = copy_.data<uint8_t>();
      to += (64 - reinterpret_cast<uintptr_t>(to) % 64) % 64;
      std::memcpy(to, at_, size_);
      at_ = to;
    }
  }
  bool is(const void* data) const { return from_->get_data_ptr() == data; }
  const uint8_t* data() const { return at_; }
  size_t size() const { return size_; }

 private:
  std::shared_ptr<ov::op::v0::Constant> from_;
  size_t size_;
  ov::Tensor copy_;
  const uint8_t* at_;
};

// What one evaluation reads and writes: x or x_signs; y, y_signs or both.
struct Call {
  const float* x;
  const uint8_t* x_signs;
  const ov::Shape& x_shape;
  float* y;
  uint8_t* y_signs;
  const ov::Shape& y_shape;
  const float* beside;
};

template <class Derived>
class Product : public ov::op::Op {
 public:
  void validate_and_infer_types() override {
    auto& self = static_cast<Derived&>(*this);
    NODE_VALIDATION_CHECK(this, get_input_size() == 2 || get_input_size() == 3,
                          "taut: x, a constant and maybe what is added are expected, got ",
                          get_input_size(), " inputs");
    for (size_t i = 0; i < get_input_size(); i += 2) {
      const bool signs = i == 0 && get_input_element_type(i) == ov::element::u8 && self.takes_signs();
      NODE_VALIDATION_CHECK(this, signs || get_input_element_type(i).compatible(ov::element::f32),
                            "taut: input ", i, " must be float32, got ", get_input_element_type(i));
    }
    const auto constant =
        ov::as_type_ptr<ov::op::v0::Constant>(input_value(1).get_node_shared_ptr());
    NODE_VALIDATION_CHECK(this, constant && constant->get_element_type() == ov::element::u8 &&
                                    constant->get_shape().size() == 1,
                          "taut: the weight must be a constant of bytes in one dimension");
    if (!held_ || !held_->is(constant->get_data_ptr())) held_ = std::make_shared<Held>(constant);
    check("out", out_, 1, INT32_MAX);
    check("relu", relu_, 0, 1);
    Arrays arrays(held_->data(), held_->size());
    scale_ = arrays.next<float>("scale", {out_});
    shift_ = arrays.next<float>("shift", {out_});
    plain_ = std::all_of(scale_, scale_ + out_, [](float s) { return s == 1; }) &&
             std::all_of(shift_, shift_ + out_, [](float s) { return s == 0; });
    self.read(arrays);
    check("signs", signs_, 0, self.takes_signs() ? 2 : 0);
    if (signs_ != 0) thresholds_ = arrays.next<float>("thresholds of what follows", {out_});
    arrays.end();
    const ov::PartialShape shape = self.shape(get_input_partial_shape(0));
    set_output_size(signs_ == 1 ? 2 : 1);
    if (signs_ != 2) set_output_type(0, ov::element::f32, shape);
    if (signs_ != 0) set_output_type(signs_ == 1 ? 1 : 0, ov::element::u8, shape);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("out", out_);
    visitor.on_attribute("relu", relu_);
    auto& self = static_cast<Derived&>(*this);
    self.visit(visitor);
    if (self.takes_signs()) visitor.on_attribute("signs", signs_);
    return true;
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    auto copy = std::make_shared<Derived>();
    copy->take(static_cast<const Derived&>(*this));
    copy->out_ = out_, copy->relu_ = relu_, copy->signs_ = signs_, copy->held_ = held_;
    copy->set_arguments(inputs);
    copy->validate_and_infer_types();
    return copy;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    const auto& self = static_cast<const Derived&>(*this);
    const ov::Tensor& x = inputs[0];
    const ov::Shape shape = self.shape(ov::PartialShape(x.get_shape())).to_shape();
    const bool signs = x.get_element_type() == ov::element::u8 && self.takes_signs();
    OPENVINO_ASSERT(signs || x.get_element_type() == ov::element::f32, "taut: x must be float32");
    for (auto& output : outputs) {
      if (output.get_shape() != shape) output.set_shape(shape);
    }
    const float* beside = nullptr;
    if (inputs.size() > 2) {
      OPENVINO_ASSERT(inputs[2].get_element_type() == ov::element::f32 &&
                          inputs[2].get_shape() == shape,
                      "taut: what is added must be float32 of the shape ", shape, ", got ",
                      inputs[2].get_shape());
      beside = inputs[2].data<const float>();
    }
    self.run({signs ? nullptr : x.data<const float>(), signs ? x.data<const uint8_t>() : nullptr,
              x.get_shape(), signs_ == 2 ? nullptr : outputs[0].data<float>(),
              signs_ == 0 ? nullptr : outputs[signs_ == 1 ? 1 : 0].data<uint8_t>(), shape, beside});
    return true;
  }

  bool takes_signs() const { return false; }

 protected:
  template <class N>
  void check(const char* name, N value, int64_t low, int64_t high) const {
    NODE_VALIDATION_CHECK(this, low <= value && value <= high, "taut: ", name, " must lie in [",
                          low, ", ", high, "], got ", value);
  }

  // What follows the product, for kernels that do not have it. y: [rows, out, inner].
  void finish(float* y, const float* beside, int64_t rows, int64_t inner) const {
    if (plain_ && beside == nullptr && relu_ == 0) return;
    for (int64_t row = 0; row < rows; ++row) {
      if (inner == 1) {
        for (int64_t o = 0; o < out_; ++o) y[o] = y[o] * scale_[o] + shift_[o];
      } else {
        for (int64_t o = 0; o < out_; ++o) {
          const float scale = scale_[o], shift = shift_[o];
          float* to = y + o * inner;
          for (int64_t j = 0; j < inner; ++j) to[j] = to[j] * scale + shift;
        }
      }
      const int64_t count = out_ * inner;
      if (beside != nullptr) {
        for (int64_t i = 0; i < count; ++i) y[i] += beside[i];
        beside += count;
      }
      if (relu_ != 0) {
        for (int64_t i = 0; i < count; ++i) y[i] = y[i] < 0 ? 0 : y[i];  // NaN stays
      }
      y += count;
    }
  }

  int64_t out_ = 0, relu_ = 0, signs_ = 0;
  const float* scale_ = nullptr;
  const float* shift_ = nullptr;
  const float* thresholds_ = nullptr;
  bool plain_ = false;  // whether they change nothing

 private:
  std::shared_ptr<Held> held_;
};

// The shape of x with its last dimension, which must be `in`, replaced.
inline ov::PartialShape linear_shape(ov::PartialShape x, int64_t in, int64_t out) {
  if (x.rank().is_dynamic()) return x;
  OPENVINO_ASSERT(x.size() > 0 && x[x.size() - 1].compatible(in), "taut: x must have ", in,
                  " columns, got ", x);
  x[x.size() - 1] = out;
  return x;
}

inline int64_t rows_of(const ov::Shape& x) {
  return int64_t(ov::shape_size(x)) / int64_t(x.back());
}

// A window that moves over an image.
struct Window {
  int64_t channels = 0, groups = 1;
  std::vector<int64_t> kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("channels", channels);
    visitor.on_attribute("groups", groups);
    visitor.on_attribute("kernel", kernel);
    visitor.on_attribute("stride", stride);
    visitor.on_attribute("padding", padding);
    visitor.on_attribute("dilation", dilation);
  }

  void check(int64_t out) const {
    OPENVINO_ASSERT(0 < channels && channels < INT32_MAX && 0 < groups && groups <= channels &&
                        channels % groups == 0 && out % groups == 0,
                    "taut: ", channels, " channels and ", out, " outputs do not fall into ", groups,
                    " groups");
    for (const auto* pair : {&kernel, &stride, &padding, &dilation}) {
      const int64_t least = pair == &padding ? 0 : 1;
      OPENVINO_ASSERT(pair->size() == 2 && std::min((*pair)[0], (*pair)[1]) >= least &&
                          std::max((*pair)[0], (*pair)[1]) < (1 << 20),
                      "taut: kernel, stride, padding and dilation must be pairs of small numbers");
    }
  }

  int64_t taps() const { return kernel[0] * kernel[1]; }

  // How far windows go along one side of so many pixels.
  ov::Dimension places(const ov::Dimension& size, int i) const {
    if (size.is_dynamic()) return ov::Dimension::dynamic();
    const int64_t reach = dilation[i] * (kernel[i] - 1) + 1;
    const int64_t room = size.get_length() + 2 * padding[i] - reach;
    OPENVINO_ASSERT(room >= 0 && size.get_length() < (1 << 20),
                    "taut: the kernel is larger than the padded image, or that too large");
    return room / stride[i] + 1;
  }
};

}  // namespace taut
