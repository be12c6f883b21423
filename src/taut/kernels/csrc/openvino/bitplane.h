// bitplane_matmul in OpenVINO (bitplane/bitplane.h): binary, ternary, k-bit and learned levels.
#pragma once

#include "bitplane/bitplane.h"
#include "openvino/product.h"

namespace taut {

// What linear layers and convolutions share: the weight's planes and what inputs become.
struct BitLayout {
  int64_t planes = 1;        // of the weight
  int64_t input_planes = 0;  // 0: x is multiplied as it is
  int64_t levels = 1;
  int64_t per_channel = 0;   // whether each channel has thresholds of its own
  float offset = 0, pad = 0;

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("planes", planes);
    visitor.on_attribute("input_planes", input_planes);
    visitor.on_attribute("levels", levels);
    visitor.on_attribute("per_channel", per_channel);
    visitor.on_attribute("offset", offset);
    visitor.on_attribute("pad", pad);
  }

  Bitplanes read(Arrays& arrays, int64_t channels, int64_t out, int64_t groups,
                 int64_t taps) const {
    constexpr int64_t kMaxProducts = 1 << 24;  // of one sum: counts are floats in the end
    OPENVINO_ASSERT(1 <= planes && planes <= kMaxPlanes && 0 <= input_planes &&
                        input_planes <= kMaxPlanes && 1 <= levels && levels <= kMaxLevels &&
                        0 <= per_channel && per_channel <= 1,
                    "taut: at most 8 planes and 16 levels, got ", planes, ", ", input_planes,
                    " and ", levels);
    OPENVINO_ASSERT(channels / groups <= kMaxProducts / taps, "taut: sums of at most 2**24 ",
                    "products are exact, got ", taps, " × ", channels / groups);
    const int64_t strips = (out / groups + 15) / 16, words = (channels / groups + 63) / 64;
    const int64_t padded = groups * strips * 16;
    Bitplanes k{};
    k.out = out, k.groups = groups, k.w_planes = int(planes);
    k.w = arrays.next<uint64_t>("bits", {groups * strips, planes, taps, words, 16});
    k.w_scale = arrays.next<float>("plane_scale", {planes, padded});
    k.tap_sums = arrays.next<float>("sums", {taps + 1, padded});
    k.w_sums = k.tap_sums + taps * padded;
    k.x_offset = offset, k.pad = pad;
    if (input_planes == 0) return k;
    const int64_t each = per_channel != 0 ? channels : 1;
    k.x_scale = arrays.next<float>("input_scale", {input_planes});
    k.levels = {int(input_planes), int(levels),
                arrays.next<float>("thresholds", {levels - 1, each}), per_channel != 0,
                arrays.next<uint8_t>("pattern", {levels})};
    return k;
  }

  // Whether each input is one bit, so that signs say all of it.
  static bool cuts_in_two(const Levels& l) {
    return l.planes == 1 && l.count == 2 && (l.pattern[0] & 1) == 0 && (l.pattern[1] & 1) == 1;
  }
};

// What both have: signs on either side, and what follows the product in the same pass.
template <class Derived>
class BitProduct : public Product<Derived> {
 public:
  bool takes_signs() const { return bits_.input_planes > 0; }

 protected:
  // Signs are refused as the file is read: what an inference throws, OpenVINO does not always tell.
  void check_signs(bool channels_last) {
    signs_suit_ = channels_last && BitLayout::cuts_in_two(k_.levels);
    if (this->get_input_element_type(0) != ov::element::u8) return;
    NODE_VALIDATION_CHECK(this, BitLayout::cuts_in_two(k_.levels),
                          "taut: signs are taken by weights whose inputs are cut in two");
    NODE_VALIDATION_CHECK(this, channels_last, "taut: signs have their channels last");
  }

  void run_bits(Bitplanes k, const Call& c) const {
    OPENVINO_ASSERT(c.x_signs == nullptr || signs_suit_, "taut: x must be float32");
    k.x = c.x, k.x_signs = c.x_signs, k.y = c.y, k.y_signs = c.y_signs;
    k.after_scale = this->scale_, k.after_shift = this->shift_, k.beside = c.beside;
    k.rectify = this->relu_ != 0, k.y_thresholds = this->thresholds_;
    choose(kBitplaneVariants, cpu_flags()).run(k, on_openvino);
  }

  BitLayout bits_;
  Bitplanes k_{};

 private:
  bool signs_suit_ = false;
};

class BitplaneMatmulOp : public BitProduct<BitplaneMatmulOp> {
 public:
  OPENVINO_OP("BitplaneMatmul", "taut");
  void take(const BitplaneMatmulOp& other) { in_ = other.in_, bits_ = other.bits_; }

  void visit(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("in", in_);
    bits_.visit(visitor);
  }

  void read(Arrays& arrays) {
    check("in", in_, 1, INT32_MAX);
    k_ = bits_.read(arrays, in_, out_, 1, 1);
    if (takes_signs()) check_signs(true);
  }

  ov::PartialShape shape(const ov::PartialShape& x) const { return linear_shape(x, in_, out_); }

  void run(const Call& c) const {
    const int64_t batch = rows_of(c.x_shape);
    if (bits_.input_planes == 0) {
      const BitWeights k{c.x, k_.w, k_.w_scale, c.y, batch, in_, out_, k_.w_planes};
      choose(kBitplaneRealVariants, cpu_flags()).run(k, on_openvino);
      return finish(c.y, c.beside, batch, 1);
    }
    Bitplanes k = k_;
    k.image = {1, in_, 1, batch, 0, 1, 0, in_};
    k.kernel_h = k.kernel_w = k.stride_h = k.stride_w = k.dilation_h = k.dilation_w = 1;
    k.out_h = 1, k.out_w = batch;
    run_bits(k, c);
  }

 private:
  int64_t in_ = 0;
};

// x: [n, channels, height, width], or [n, height, width, channels] where `channels_last` is 1.
// y and what is added to it: [n, height, width, out].
class BitplaneConv2dOp : public BitProduct<BitplaneConv2dOp> {
 public:
  OPENVINO_OP("BitplaneConv2d", "taut");
  void take(const BitplaneConv2dOp& other) {
    window_ = other.window_, bits_ = other.bits_, channels_last_ = other.channels_last_;
  }

  void visit(ov::AttributeVisitor& visitor) {
    window_.visit(visitor);
    bits_.visit(visitor);
    visitor.on_attribute("channels_last", channels_last_);
  }

  void read(Arrays& arrays) {
    window_.check(out_);
    check("channels_last", channels_last_, 0, 1);
    check("input_planes", bits_.input_planes, 1, kMaxPlanes);
    k_ = bits_.read(arrays, window_.channels, out_, window_.groups, window_.taps());
    check_signs(channels_last_ != 0);
  }

  ov::PartialShape shape(const ov::PartialShape& x) const {
    if (x.rank().is_dynamic()) return ov::PartialShape::dynamic(4);
    const int first = channels_last_ != 0 ? 1 : 2;
    OPENVINO_ASSERT(x.size() == 4 && x[channels_last_ != 0 ? 3 : 1].compatible(window_.channels),
                    "taut: x must have 4 dimensions and ", window_.channels, " channels, got ", x);
    return {x[0], window_.places(x[first], 0), window_.places(x[first + 1], 1), out_};
  }

  void run(const Call& call) const {
    Bitplanes k = k_;
    const auto n = int64_t(call.x_shape[0]), c = window_.channels;
    const int first = channels_last_ != 0 ? 1 : 2;
    const auto h = int64_t(call.x_shape[first]), w = int64_t(call.x_shape[first + 1]);
    if (channels_last_ != 0) {
      k.image = {n, c, h, w, h * w * c, 1, w * c, c};
    } else {
      k.image = {n, c, h, w, c * h * w, h * w, w, 1};
    }
    k.kernel_h = window_.kernel[0], k.kernel_w = window_.kernel[1];
    k.stride_h = window_.stride[0], k.stride_w = window_.stride[1];
    k.pad_h = window_.padding[0], k.pad_w = window_.padding[1];
    k.dilation_h = window_.dilation[0], k.dilation_w = window_.dilation[1];
    k.out_h = int64_t(call.y_shape[1]), k.out_w = int64_t(call.y_shape[2]);
    const double pixels = double(h + 2 * k.pad_h) * double(w + 2 * k.pad_w) * double(n);
    OPENVINO_ASSERT(pixels * double(c + 64) < 0x1p42, "taut: the padded image is too large");
    run_bits(k, call);
  }

 private:
  Window window_;
  int64_t channels_last_ = 0;
};

}  // namespace taut
