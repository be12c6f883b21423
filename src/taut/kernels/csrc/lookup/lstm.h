// lookup_lstm: all steps of an LSTM whose recurrent weights are looked up. Nothing but the two
// kernels, one after the other; a step of a small layer takes less time than a call from Python.
#pragma once

#include "cells/cells.h"
#include "lookup/lookup.h"

namespace taut {

// products: x is not read; each step's is the hidden state before it. gates: [batch, 4 · size],
// working memory. inputs: [steps, batch, 4 · size]; hidden: [steps + 1, batch, size], whose first
// is given; cell: [batch, size], given, and left as it is after the last step.
void lookup_lstm(Lookup products, const float* inputs, float* gates, float* hidden, float* cell,
                 int64_t steps, const Parallel& parallel);

}  // namespace taut
