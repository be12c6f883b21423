#include "lanes/avx512.h"
#include "lookup/generic.h"

void taut::lookup_matmul_avx512(const Lookup& op, const Parallel& parallel) {
  ::lookup_matmul(op, parallel);
}
