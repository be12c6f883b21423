#include "lanes/avx512.h"
#include "hashed/generic.h"

void taut::hashed_matmul_avx512(const Hashed& op, const HashedProduct& p, const Parallel& parallel) {
  ::hashed_matmul(op, p, parallel);
}

void taut::hashed_weight_avx512(const Hashed& op, float* weight, const Parallel& parallel) {
  ::hashed_weight(op, weight, parallel);
}

void taut::hashed_gradient_avx512(const Hashed& op, const HashedGradient& g, const Parallel& parallel) {
  ::hashed_gradient(op, g, parallel);
}
