// lstm_cell and gru_cell: every variant against double precision, on buffers without a spare byte.
#include <algorithm>
#include <cmath>

#include "cells/cells.h"
#include "check.h"

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Buffers {
  check::Exact<float> i, h, state;

  Buffers(int64_t batch, int64_t size, int gates)
      : i(batch * gates * size, 1), h(batch * gates * size, 1), state(batch * size, 1) {
    check::Random random;
    for (auto* buffer : {&i, &h, &state}) {
      for (int64_t k = 0; k < buffer->size(); ++k) {
        (*buffer)[k] = float(random.between(-4000, 4000)) / 1000;
      }
    }
  }
};

void run(int64_t batch, int64_t size, bool lstm, const taut::Parallel& parallel) {
  Buffers b(batch, size, lstm ? 4 : 3);
  const auto each = [&](const char* name, taut::RecurrentCell kernel) {
    check::Exact<float> hidden(batch * size), cell(lstm ? batch * size : 0);
    kernel({.i = b.i.data(), .h = b.h.data(), .state = b.state.data(), .hidden = hidden.data(),
            .cell = cell.data(), .batch = batch, .size = size},
           parallel);
    double worst = 0;
    for (int64_t at = 0; at < batch * size; ++at) {
      const int64_t row = at / size * (lstm ? 4 : 3) * size + at % size;
      const auto in = [&](int gate) { return double(b.i[row + gate * size]); };
      const auto back = [&](int gate) { return double(b.h[row + gate * size]); };
      const double state = b.state[at];
      if (lstm) {
        const auto sum = [&](int gate) { return in(gate) + back(gate); };
        const double next = sigmoid(sum(1)) * state + sigmoid(sum(0)) * std::tanh(sum(2));
        const double wanted = sigmoid(sum(3)) * std::tanh(next);
        worst = std::max({worst, std::abs(cell[at] - next), std::abs(hidden[at] - wanted)});
        if (!std::isfinite(cell[at] + hidden[at])) worst = 1;
      } else {
        const double fresh = std::tanh(in(2) + sigmoid(in(0) + back(0)) * back(2));
        const double wanted = fresh + sigmoid(in(1) + back(1)) * (state - fresh);
        worst = std::max(worst, std::abs(hidden[at] - wanted));
        if (!std::isfinite(hidden[at])) worst = 1;
      }
    }
    CHECK(worst < 2e-6, "%s, %s: errs by %g; batch %lld, size %lld", lstm ? "lstm" : "gru", name,
          worst, (long long)batch, (long long)size);
  };
  if (lstm) {
    check::each_variant(taut::kLstmVariants, each);
  } else {
    check::each_variant(taut::kGruVariants, each);
  }
}

}  // namespace

TAUT_TEST(cells_at_every_size) {
  for (const bool lstm : {true, false}) {
    for (int64_t size : {0, 1, 15, 16, 17, 31, 32, 33, 100}) {
      for (int64_t batch : {0, 1, 3}) run(batch, size, lstm, taut::serial);
    }
    run(40, 1023, lstm, check::three_threads);
  }
}

TAUT_TEST(cells_are_dispatched) {
  check::dispatch(taut::kLstmVariants);
  check::dispatch(taut::kGruVariants);
}
