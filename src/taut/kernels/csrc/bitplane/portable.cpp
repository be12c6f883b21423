#include "lanes/portable.h"

#include "bitplane/words.h"

#include "bitplane/generic.h"

void taut::bitplane_matmul_portable(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_portable(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
