#include <algorithm>

#include "binding/check.h"
#include "bitplane/bitplane.h"

namespace {

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

// y is [count, out, height, width] with its channels last in memory.
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
  Tensor y = torch::stable::empty({x.size(0), out, k.out_h, k.out_w}, ScalarType::Float, std::nullopt,
                                  std::nullopt, std::nullopt,
                                  torch::headeronly::MemoryFormat::ChannelsLast);
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

const taut::List listed{
    {"bitplane_matmul", taut::names<taut::kBitplaneVariants>},
    {"bitplane_conv2d", taut::names<taut::kBitplaneVariants>},
    {"bitplane_real", taut::names<taut::kBitplaneRealVariants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "bitplane_matmul(Tensor x, Tensor w, Tensor w_scale, Tensor w_sums, Tensor x_scale, "
      "Tensor thresholds, Tensor pattern, float x_offset, int out) -> Tensor");
  m.def(
      "bitplane_conv2d(Tensor x, Tensor w, Tensor w_scale, Tensor w_sums, Tensor x_scale, "
      "Tensor thresholds, Tensor pattern, float x_offset, float pad, int out, int groups, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("bitplane_real(Tensor x, Tensor w, Tensor w_scale, int out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("bitplane_matmul", TORCH_BOX(&bitplane_matmul));
  m.impl("bitplane_conv2d", TORCH_BOX(&bitplane_conv2d));
  m.impl("bitplane_real", TORCH_BOX(&bitplane_real));
}
