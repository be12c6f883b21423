#include "lanes/neon.h"

#include "bitplane/words.h"

#include "bitplane/generic.h"

void taut::bitplane_matmul_neon(const Bitplanes& op, const Parallel& parallel) {
  ::bitplane_matmul(op, parallel);
}

void taut::bitplane_real_neon(const BitWeights& op, const Parallel& parallel) {
  ::bitplane_real(op, parallel);
}
