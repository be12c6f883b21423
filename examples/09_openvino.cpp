// A compressed network in OpenVINO, without Python: loads Taut's operations and an exported model,
// and prints what the network answers to an input of ascending numbers from -1 to 1.
//
//     ./09_openvino taut_openvino.so net.onnx      (or the .xml that OpenVINO saved of it)
#include <cstdio>
#include <exception>

#include "openvino/openvino.hpp"

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s EXTENSION MODEL\n", words[0]);
    return 2;
  }
  try {
    ov::Core core;
    core.add_extension(words[1]);
    auto model = core.read_model(words[2]);
    ov::PartialShape shape = model->input().get_partial_shape();
    shape[0] = 1;  // one sample
    model->reshape(shape);
    const auto exact = ov::hint::inference_precision(ov::element::f32);
    auto request = core.compile_model(model, "CPU", exact).create_infer_request();

    ov::Tensor x = request.get_input_tensor();
    for (size_t i = 0; i < x.get_size(); ++i) {
      x.data<float>()[i] = 2.0f * float(i) / float(x.get_size() - 1) - 1;
    }
    request.infer();

    const ov::Tensor y = request.get_output_tensor();
    for (size_t i = 0; i < y.get_size(); ++i) std::printf("%.6g\n", y.data<float>()[i]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
