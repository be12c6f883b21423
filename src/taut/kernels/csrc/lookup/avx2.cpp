#include "lanes/avx2.h"
#include "lookup/generic.h"

void taut::lookup_matmul_avx2(const Lookup& op, const Parallel& parallel) {
  ::lookup_matmul(op, parallel);
}
