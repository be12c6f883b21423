#include "lookup/lstm.h"

void taut::lookup_lstm(Lookup products, const float* inputs, float* gates, float* hidden,
                       float* cell, int64_t steps, const Parallel& parallel) {
  const uint32_t flags = cpu_flags();
  const LookupMatmul matmul = choose(kLookupVariants, flags).run;
  const RecurrentCell step = choose(kLstmVariants, flags).run;
  const int64_t size = products.in, state = products.batch * size;
  products.y = gates;
  for (int64_t t = 0; t < steps; ++t) {
    products.x = hidden + t * state;
    matmul(products, parallel);
    float* next = hidden + (t + 1) * state;
    step({inputs + t * 4 * state, gates, cell, next, cell, products.batch, size}, parallel);
  }
}
