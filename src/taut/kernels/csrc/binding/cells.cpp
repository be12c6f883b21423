#include "binding/check.h"
#include "cells/cells.h"

namespace {

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

const taut::List listed{
    {"lstm_cell", taut::names<taut::kLstmVariants>},
    {"gru_cell", taut::names<taut::kGruVariants>},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def("lstm_cell(Tensor i, Tensor h, Tensor cell) -> Tensor");
  m.def("gru_cell(Tensor i, Tensor h, Tensor state) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("lstm_cell", TORCH_BOX(&lstm_cell));
  m.impl("gru_cell", TORCH_BOX(&gru_cell));
}
