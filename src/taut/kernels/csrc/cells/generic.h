// The algorithm of lstm_cell and gru_cell. Included after one of lanes/*.h.
#pragma once

#include "cells/cells.h"

namespace {

// e^x by 2^n · e^r with |r| <= ln 2 / 2 and e^r by its Taylor polynomial, within two units in the
// last place; beyond ±87 it stays where float32 ends. NaN stays NaN.
inline F16 exponential(F16 x) {
  const F16 top = F16::all(87.0f), bottom = F16::all(-87.0f);
  x = select(uint16_t(at_least(x, top)), top, x);
  x = select(uint16_t(at_least(bottom, x)), bottom, x);
  const F16 magic = F16::all(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
  const F16 shifted = multiply_add(x, F16::all(1.44269504f), magic);
  const F16 n = shifted - magic;
  F16 r = multiply_add(n, F16::all(-0.693359375f), x);  // ln 2 in two parts
  r = multiply_add(n, F16::all(2.12194440e-4f), r);
  F16 p = F16::all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = multiply_add(p, r, F16::all(c));
  }
  return p * floats_of((bits_of(shifted) << 23) + I16::all(0x3f800000u));
}

inline F16 sigmoid(F16 x) {
  const F16 one = F16::all(1);
  return one / (one + exponential(F16::zero() - x));
}

// Near zero by its own polynomial (1 − 2 / (e^2x + 1) would cancel).
inline F16 hyperbolic_tangent(F16 x) {
  const F16 one = F16::all(1), two = F16::all(2);
  const F16 wide = one - two / (exponential(two * x) + one);
  const F16 s = x * x;
  F16 p = F16::all(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                        -3.33332819422e-1f}) {
    p = multiply_add(p, s, F16::all(c));
  }
  const F16 narrow = multiply_add(p * s, x, x);
  return select(uint16_t(at_least(s, F16::all(0.390625f))), wide, narrow);
}

template <class Strip>
void each_strip(const taut::Cell& op, const taut::Parallel& parallel, Strip&& strip) {
  const int64_t strips = (op.size + 15) / 16;
  parallel(op.batch * strips, 512, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t sample = at / strips, column = at % strips * 16;
      strip(sample, column, op.size - column);
    }
  });
}

inline void lstm_cell(const taut::Cell& op, const taut::Parallel& parallel) {
  each_strip(op, parallel, [&](int64_t n, int64_t column, int64_t valid) {
    F16 gate[4];
    for (int g = 0; g < 4; ++g) {
      const int64_t at = (n * 4 + g) * op.size + column;
      gate[g] = F16::load_some(op.i + at, valid) + F16::load_some(op.h + at, valid);
    }
    const int64_t at = n * op.size + column;
    const F16 kept = sigmoid(gate[1]) * F16::load_some(op.state + at, valid);
    const F16 cell = multiply_add(sigmoid(gate[0]), hyperbolic_tangent(gate[2]), kept);
    cell.store_some(op.cell + at, valid);
    (sigmoid(gate[3]) * hyperbolic_tangent(cell)).store_some(op.hidden + at, valid);
  });
}

inline void gru_cell(const taut::Cell& op, const taut::Parallel& parallel) {
  each_strip(op, parallel, [&](int64_t n, int64_t column, int64_t valid) {
    F16 i[3], h[3];
    for (int g = 0; g < 3; ++g) {
      const int64_t at = (n * 3 + g) * op.size + column;
      i[g] = F16::load_some(op.i + at, valid), h[g] = F16::load_some(op.h + at, valid);
    }
    const int64_t at = n * op.size + column;
    const F16 next = hyperbolic_tangent(multiply_add(sigmoid(i[0] + h[0]), h[2], i[2]));
    const F16 state = F16::load_some(op.state + at, valid);
    multiply_add(sigmoid(i[1] + h[1]), state - next, next).store_some(op.hidden + at, valid);
  });
}

}  // namespace
