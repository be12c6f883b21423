#include "lanes/portable.h"
#include "lookup/generic.h"

void taut::lookup_matmul_portable(const Lookup& op, const Parallel& parallel) {
  ::lookup_matmul(op, parallel);
}
