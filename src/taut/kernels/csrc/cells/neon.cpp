#include "lanes/neon.h"
#include "cells/generic.h"

void taut::lstm_cell_neon(const Cell& op, const Parallel& parallel) { ::lstm_cell(op, parallel); }

void taut::gru_cell_neon(const Cell& op, const Parallel& parallel) { ::gru_cell(op, parallel); }
