// lstm_cell and gru_cell: what follows a recurrent step's two products, in one pass.
//
//     lstm   enter, forget, content, leave = i + h
//            cell'  = σ(forget) · cell + σ(enter) · tanh(content)
//            hidden = σ(leave) · tanh(cell')
//     gru    reset, update, new of i, and of h (which has its bias)
//            n      = tanh(i.new + σ(i.reset + h.reset) · h.new)
//            hidden = n + σ(i.update + h.update) · (state − n)
#pragma once

#include <cstdint>

#include "cpu.h"
#include "parallel.h"

namespace taut {

struct Cell {
  const float *i, *h;   // [batch, gates · size]
  const float* state;   // [batch, size]: the cell of an LSTM, the hidden state of a GRU
  float *hidden, *cell; // [batch, size]; a GRU has no cell
  int64_t batch, size;
};

using RecurrentCell = void (*)(const Cell&, const Parallel&);

#define TAUT_VARIANT(name, needs)                            \
  void lstm_cell_##name(const Cell&, const Parallel&);       \
  void gru_cell_##name(const Cell&, const Parallel&);
#include "cells/variants.inc"
#undef TAUT_VARIANT

inline constexpr Variant<RecurrentCell> kLstmVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, lstm_cell_##name},
#include "cells/variants.inc"
#undef TAUT_VARIANT
};

inline constexpr Variant<RecurrentCell> kGruVariants[] = {
#define TAUT_VARIANT(name, needs) {#name, needs, gru_cell_##name},
#include "cells/variants.inc"
#undef TAUT_VARIANT
};

}  // namespace taut
