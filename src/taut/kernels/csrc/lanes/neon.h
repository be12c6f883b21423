// Sixteen lanes in four 128-bit registers: the portable vectors, which the compiler maps to Neon.
#pragma once

#include "lanes/portable.h"
