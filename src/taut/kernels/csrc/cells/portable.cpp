#include "lanes/portable.h"
#include "cells/generic.h"

void taut::lstm_cell_portable(const Cell& op, const Parallel& parallel) { ::lstm_cell(op, parallel); }

void taut::gru_cell_portable(const Cell& op, const Parallel& parallel) { ::gru_cell(op, parallel); }
