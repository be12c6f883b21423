// The product with a matrix that is decoded on the way, shared by all operations whose weights are
// written in some code:
//
//     y[n, o] = Σ_k x[n, k] · W[o, k]        x: [batch, in], y: [batch, out], both row-major
//
// A Decoder names the weights of row o in blocks of 128 columns, as eight strips of sixteen:
//
//     Row row(int64_t o) const                               what is the same along a row
//     void block(const Row&, int64_t b, F16 (&w)[8]) const   W[o, 128·b + 16·s …] for s in 0 … 7
//
// What it gives for columns beyond `in` does not matter. Few samples: every decoded strip is
// multiplied at once, out of registers. Many: a tile of rows is decoded once, transposed into the
// first-level cache, and used for the whole batch.
//
// Included after one of lanes/*.h, which define F16.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "scratch.h"

namespace {

struct Product {
  const float* x;
  float* y;
  int64_t batch, in, out;
  int64_t x_stride, y_stride;  // from one sample to the next, in floats
};

constexpr int64_t kBlock = 128;
constexpr int64_t kStrips = kBlock / 16;
constexpr int64_t kDirectBatch = 4;  // up to here strips are used out of registers

// Rows o … o + Rows - 1 times samples n … n + Batch - 1.
template <int Rows, int Batch, class Decoder>
void direct(const Decoder& decoder, const Product& p, int64_t o, int64_t n) {
  F16 sum[Rows][Batch][2];  // two, so that one's latency hides the other's
  for (auto& row : sum) {
    for (auto& cell : row) cell[0] = cell[1] = F16::zero();
  }
  const float* x = p.x + n * p.x_stride;
  typename Decoder::Row rows[Rows];
  for (int r = 0; r < Rows; ++r) rows[r] = decoder.row(o + r);
  const int64_t whole = p.in / kBlock;
  for (int64_t b = 0; b < whole; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      F16 w[kStrips];
      decoder.block(rows[r], b, w);
#pragma GCC unroll 8
      for (int s = 0; s < kStrips; ++s) {
#pragma GCC unroll 8
        for (int j = 0; j < Batch; ++j) {
          const F16 xs = F16::load(x + j * p.x_stride + b * kBlock + 16 * s);
          sum[r][j][s % 2] = multiply_add(w[s], xs, sum[r][j][s % 2]);
        }
      }
    }
  }
  if (const int64_t rest = p.in - whole * kBlock; rest > 0) {
    for (int r = 0; r < Rows; ++r) {
      F16 w[kStrips];
      decoder.block(rows[r], whole, w);
      for (int s = 0; s < kStrips && 16 * s < rest; ++s) {
        const F16 valid = w[s].first(rest - 16 * s);
        for (int j = 0; j < Batch; ++j) {
          const float* at = x + j * p.x_stride + whole * kBlock + 16 * s;
          sum[r][j][0] = multiply_add(valid, F16::load_some(at, rest - 16 * s), sum[r][j][0]);
        }
      }
    }
  }
  for (int j = 0; j < Batch; ++j) {
    float* y = p.y + (n + j) * p.y_stride + o;
    if constexpr (Rows % 4 == 0) {
      for (int four = 0; four < Rows; four += 4) {
        F16 each[4];
        for (int r = 0; r < 4; ++r) each[r] = sum[four + r][j][0] + sum[four + r][j][1];
        sums(each, y + four);
      }
    } else {
      for (int r = 0; r < Rows; ++r) y[r] = (sum[r][j][0] + sum[r][j][1]).sum();
    }
  }
}

template <int Batch, class Decoder>
void direct_rows(const Decoder& decoder, const Product& p, int64_t begin, int64_t end, int64_t n) {
  constexpr int kRows = Batch == 1 ? kDirectRows : 4;
  int64_t o = begin;
  for (; o + kRows <= end; o += kRows) direct<kRows, Batch>(decoder, p, o, n);
  for (; o < end; ++o) direct<1, Batch>(decoder, p, o, n);
}

constexpr int64_t kTileRows = 16 * kPanels;
constexpr int64_t kTileColumns = 2 * kBlock;  // the tile stays in the first-level cache
constexpr int64_t kChain = 64;

// Decodes W[o …, k …] and leaves it transposed: tile[column][row], zeros beyond the matrix.
template <class Decoder>
void decode_tile(const Decoder& decoder, const Product& p, int64_t o, int64_t k, int64_t columns,
                 float* tile, float* rows) {
  for (int64_t panel = 0; panel < kPanels; ++panel) {
    for (int64_t column = 0; column < columns; column += kBlock) {
      for (int64_t r = 0; r < 16; ++r) {
        float* to = rows + r * kBlock;
        const int64_t row = o + 16 * panel + r;
        if (row >= p.out) {
          for (int64_t s = 0; s < kStrips; ++s) F16::zero().store(to + 16 * s);
          continue;
        }
        F16 w[kStrips];
        decoder.block(decoder.row(row), (k + column) / kBlock, w);
        for (int64_t s = 0; s < kStrips; ++s) w[s].store(to + 16 * s);
      }
      for (int64_t s = 0; s < kStrips; ++s) {
        float* to = tile + (column + 16 * s) * kTileRows + 16 * panel;
        transpose(rows + 16 * s, kBlock, to, kTileRows);
      }
    }
  }
}

// y[n …, o …] += (or =, for the first columns) x[n …, k …] · tile. A sum is started anew every
// kChain columns: rounding errors grow with the length of a chain of additions.
template <int Batch>
void times_tile(const Product& p, const float* tile, int64_t o, int64_t n, int64_t k,
                int64_t columns) {
  for (int64_t from = 0; from < columns; from += kChain) {
    F16 sum[Batch][kPanels];
    for (auto& row : sum) {
      for (auto& cell : row) cell = F16::zero();
    }
    const float* x = p.x + n * p.x_stride + k;
    const int64_t to = columns - from < kChain ? columns : from + kChain;
    for (int64_t c = from; c < to; ++c) {
      F16 w[kPanels];
      for (int panel = 0; panel < kPanels; ++panel) {
        w[panel] = F16::load(tile + c * kTileRows + 16 * panel);
      }
#pragma GCC unroll 16
      for (int j = 0; j < Batch; ++j) {
        const F16 value = F16::all(x[j * p.x_stride + c]);
        for (int panel = 0; panel < kPanels; ++panel) {
          sum[j][panel] = multiply_add(w[panel], value, sum[j][panel]);
        }
      }
    }
    for (int j = 0; j < Batch; ++j) {
      for (int panel = 0; panel < kPanels; ++panel) {
        float* y = p.y + (n + j) * p.y_stride + o + 16 * panel;
        const int64_t valid = p.out - o - 16 * panel;
        if (valid >= 16) {  // masks cost as much as the sums
          if (k + from > 0) sum[j][panel] = F16::load(y) + sum[j][panel];
          sum[j][panel].store(y);
        } else {
          if (k + from > 0) sum[j][panel] = F16::load_some(y, valid) + sum[j][panel];
          sum[j][panel].store_some(y, valid);
        }
      }
    }
  }
}

template <class Decoder>
void tiled_rows(const Decoder& decoder, const Product& p, int64_t begin, int64_t end) {
  const size_t size = size_t(kTileRows * kTileColumns + 16 * kBlock) * sizeof(float);
  float* tile = static_cast<float*>(taut::scratch<0>(size));
  float* rows = tile + kTileRows * kTileColumns;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t o = t * kTileRows;
    for (int64_t k = 0; k < p.in; k += kTileColumns) {
      const int64_t columns = p.in - k < kTileColumns ? p.in - k : kTileColumns;
      decode_tile(decoder, p, o, k, columns, tile, rows);
      int64_t n = 0;
      for (; n + kTileBatch <= p.batch; n += kTileBatch) {
        times_tile<kTileBatch>(p, tile, o, n, k, columns);
      }
      for (; n + 4 <= p.batch; n += 4) times_tile<4>(p, tile, o, n, k, columns);
      for (; n < p.batch; ++n) times_tile<1>(p, tile, o, n, k, columns);
    }
  }
}

template <class Decoder>
void decoded_matmul(const Decoder& decoder, const Product& p, const taut::Parallel& parallel) {
  if (p.in == 0) {
    for (int64_t n = 0; n < p.batch; ++n) {
      for (int64_t o = 0; o < p.out; ++o) p.y[n * p.y_stride + o] = 0;
    }
  } else if (p.batch <= kDirectBatch) {
    // Fours of rows are never split: sums of four and of one are added up in another order, and
    // the number of threads must not show.
    const int64_t grain = 1 + 8192 / p.in;
    parallel((p.out + 3) / 4, grain, [&](int64_t first, int64_t last) {
      const int64_t begin = 4 * first, end = 4 * last < p.out ? 4 * last : p.out;
      if (p.batch == 4) return direct_rows<4>(decoder, p, begin, end, 0);
      if (p.batch & 2) direct_rows<2>(decoder, p, begin, end, 0);
      if (p.batch & 1) direct_rows<1>(decoder, p, begin, end, p.batch & 2);
    });
  } else {
    const int64_t tiles = (p.out + kTileRows - 1) / kTileRows;
    const int64_t grain = 1 + 32768 / (p.in * p.batch);
    parallel(tiles, grain, [&](int64_t begin, int64_t end) {
      tiled_rows(decoder, p, begin, end);
    });
  }
}

}  // namespace
