#include "lanes/avx2.h"
#include "cells/generic.h"

void taut::lstm_cell_avx2(const Cell& op, const Parallel& parallel) { ::lstm_cell(op, parallel); }

void taut::gru_cell_avx2(const Cell& op, const Parallel& parallel) { ::gru_cell(op, parallel); }
