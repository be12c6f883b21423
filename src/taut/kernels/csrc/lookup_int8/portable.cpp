#include "lanes/portable.h"
#include "lookup_int8/bytes.h"
#include "lookup_int8/generic.h"

void taut::lookup_matmul_int8_portable(const LookupInt8& op, const Parallel& parallel) {
  ::lookup_matmul_int8(op, parallel);
}
