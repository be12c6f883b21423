#include "lanes/neon.h"
#include "lookup/generic.h"

void taut::lookup_matmul_neon(const Lookup& op, const Parallel& parallel) {
  ::lookup_matmul(op, parallel);
}
