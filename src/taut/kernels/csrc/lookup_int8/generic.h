// The algorithm of lookup_matmul_int8. Included after one of lanes/*.h and a definition of
//
//     kRows, kSamples   of a tile whose sums fit the registers
//     Item              what activations are kept as, and place(lane, byte) where among the 64 Items
//                       of a vector one lies
//     kOffset           what is added to every weight to make it unsigned: 128, or 0
//     ByteTable<Bits>   load(p) 2**Bits bytes (sixteen at least); (index) looks up 64 of them
//     Weights           64 bytes made ready to be multiplied
//     Sums              zero(), add(weights, items), total(): of 64 products each
//
// Where the entries of a shared table are evenly spaced, as whole numbers are, nothing is looked up:
//
//     Σ x · (base + slope · index) = base · Σ x + slope · Σ x · index
//
// A block is 128 columns, as two vectors of 64 bytes. Masking the nibbles of a word leaves byte j of
// dword l with column 16·(2j + h) + l, h being 1 for the high ones; activations are brought into
// that order once, and not the weights. (8-bit indices are bytes already: 16·(4h + j) + l.)
#pragma once

#include <cstring>
#include <type_traits>

#include "lookup/parts.h"
#include "lookup_int8/lookup_int8.h"
#include "scratch.h"

namespace {

constexpr int64_t kBlock = 128;

// The activations in the order of the weights, zeros beyond the last column.
struct Samples {
  Item* at;
  uint32_t* sums;  // of each sample
  int64_t blocks;

  const Item* block(int64_t n, int64_t b) const { return at + (n * blocks + b) * kBlock; }
};

inline void reorder(const taut::LookupInt8& op, const Samples& samples, int64_t n) {
  uint32_t sum = 0;
  for (int64_t b = 0; b < samples.blocks; ++b) {
    const int8_t* from = op.x + n * op.in + b * kBlock;
    int8_t last[kBlock] = {};
    if (const int64_t rest = op.in - b * kBlock; rest < kBlock) {
      std::memcpy(last, from, size_t(rest));
      from = last;
    }
    for (int i = 0; i < kBlock; ++i) sum += uint32_t(from[i]);
    Item* to = samples.at + (n * samples.blocks + b) * kBlock;
    const int of_vector = op.bits == 8 ? 64 : 16, of_byte = op.bits == 8 ? 16 : 32;
    for (int h = 0; h < 2; ++h, to += 64, from += of_vector) {
      for (int l = 0; l < 16; ++l) {
        for (int j = 0; j < 4; ++j) to[place(l, j)] = from[j * of_byte + l];
      }
    }
  }
  samples.sums[n] = sum;
}

// What sums of products become: slope · sum + base · the sample's. Modulo 2**32, as the sums are.
struct Line {
  uint32_t slope = 1, base = -uint32_t(kOffset);
  bool even = false;  // whether entries lie on it

  static Line of(const taut::LookupInt8& op) {
    const int entries = 1 << op.bits;
    if (op.table_stride != 0 || op.bits == 8) return {};  // indices are to be signed bytes, too
    const int slope = op.table[1] - op.table[0];
    for (int i = 2; i < entries; ++i) {
      if (op.table[i] - op.table[i - 1] != slope) return {};
    }
    return {uint32_t(slope), uint32_t(int32_t(op.table[0])), true};
  }
};

// In place of a table: what is looked up is the index.
struct Indices {
  I16 operator()(I16 index) const { return index; }
};

template <int Bits>
ByteTable<Bits> load_table(const int8_t* from) {
  alignas(64) uint8_t bytes[1 << (Bits < 4 ? 4 : Bits)] = {};
  for (int i = 0; i < 1 << Bits; ++i) bytes[i] = uint8_t(from[i] + kOffset);
  return ByteTable<Bits>::load(bytes);
}

// Some rows of indices, looked up on the way.
template <int Bits, int Rows, class Table>
struct Encoded {
  const uint32_t* part[Rows][4];
  const Table* table[Rows];
  int64_t in;

  void block(int r, int64_t b, I16 (&w)[2]) const {
    I16 low, high;
    if constexpr (Bits == 8) {
      const int64_t words = (in + 63) / 64;  // the last block may have but one
      low = I16::load(part[r][0] + 32 * b);
      high = 2 * b + 1 < words ? I16::load(part[r][0] + 32 * b + 16) : low;
    } else {
      low = high = I16::all(0);
      int at = 0;
      if constexpr (Bits & 4) {
        const I16 word = I16::load(part[r][1] + 16 * b), mask = I16::all(0x0f0f0f0f);
        low = word & mask, high = (word >> 4) & mask;
        at = 4;
      }
      if constexpr (Bits & 2) {  // sixteen bits of each lane: its nibbles become its bytes
        const I16 word = I16::load(part[r][2] + b / 2 * 16) >> int(b % 2 * 16);
        I16 wide = word & I16::all(0xffff);
        wide = (wide | wide << 8) & I16::all(0x00ff00ff);
        wide = wide | wide << 4;
        const I16 mask = I16::all(0x03030303);
        low = low | (wide & mask) << at;
        high = high | ((wide >> 2) & mask) << at;
        at += 2;
      }
      if constexpr (Bits & 1) {  // eight bits of each lane: its pairs become its bytes
        const I16 word = I16::load(part[r][3] + b / 4 * 16) >> int(b % 4 * 8);
        I16 wide = word & I16::all(0xff);
        wide = (wide | wide << 12) & I16::all(0x000f000f);
        wide = wide | wide << 6;
        const I16 mask = I16::all(0x01010101);
        low = low | (wide & mask) << at;
        high = high | ((wide >> 1) & mask) << at;
      }
    }
    w[0] = (*table[r])(low), w[1] = (*table[r])(high);
  }
};

// Rows that were looked up before, for many samples.
struct Decoded {
  const uint8_t* at;
  int64_t stride;

  void block(int r, int64_t b, I16 (&w)[2]) const {
    const uint8_t* from = at + r * stride + b * kBlock;
    w[0] = I16::load(from), w[1] = I16::load(from + 64);
  }
};

template <int Rows, int Batch, class Source>
void products(const taut::LookupInt8& op, const Samples& samples, const Line& line,
              const Source& source, int64_t o, int64_t n) {
  Sums sum[Rows][Batch];
  for (auto& row : sum) {
    for (auto& cell : row) cell = Sums::zero();
  }
  for (int64_t b = 0; b < samples.blocks; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      I16 bytes[2];
      source.block(r, b, bytes);
      const Weights first(bytes[0]), second(bytes[1]);
#pragma GCC unroll 8
      for (int j = 0; j < Batch; ++j) {
        const Item* x = samples.block(n + j, b);
        sum[r][j].add(first, x);
        sum[r][j].add(second, x + 64);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Batch; ++j) {
      const uint32_t found = uint32_t(sum[r][j].total());
      const uint32_t total = line.slope * found + line.base * samples.sums[n + j];
      op.y[(n + j) * op.out + o + r] = float(int32_t(total)) * op.scale[o + r];
    }
  }
}

template <int Rows, int Batch = kSamples, class Source>
void some_samples(const taut::LookupInt8& op, const Samples& samples, const Line& line,
                  const Source& source, int64_t o, int64_t n) {
  if constexpr (Batch > 0) {
    if (op.batch - n < Batch) return some_samples<Rows, Batch - 1>(op, samples, line, source, o, n);
    products<Rows, Batch>(op, samples, line, source, o, n);
  }
}

template <int Bits, int Rows, class Table>
void some_rows(const taut::LookupInt8& op, const Samples& samples, const Line& line,
               const Table& shared, int64_t o) {
  Table own[Rows];
  Encoded<Bits, Rows, Table> encoded;
  encoded.in = op.in;
  int64_t part_at[4];
  find_parts<Bits>(op.in, part_at);
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 4; ++i) encoded.part[r][i] = op.codes + (o + r) * op.words + part_at[i];
    encoded.table[r] = &shared;
    if constexpr (!std::is_same_v<Table, Indices>) {
      if (op.table_stride == 0) continue;
      own[r] = load_table<Bits>(op.table + (o + r) * op.table_stride);
      encoded.table[r] = &own[r];
    }
  }
  if constexpr (Rows == kRows) {
    if (op.batch == 1) return products<Rows, 1>(op, samples, line, encoded, o, 0);
    if (op.batch == 2) return products<Rows, 2>(op, samples, line, encoded, o, 0);
  }
  const int64_t stride = samples.blocks * kBlock;
  auto* rows = static_cast<uint8_t*>(taut::scratch<0>(size_t(Rows * stride)));
  for (int r = 0; r < Rows; ++r) {
    for (int64_t b = 0; b < samples.blocks; ++b) {
      I16 bytes[2];
      encoded.block(r, b, bytes);
      bytes[0].store(rows + r * stride + b * kBlock);
      bytes[1].store(rows + r * stride + b * kBlock + 64);
    }
  }
  const Decoded decoded{rows, stride};
  for (int64_t n = 0; n < op.batch; n += kSamples) {
    some_samples<Rows>(op, samples, line, decoded, o, n);
  }
}

template <int Bits, class Table>
void rows_of(const taut::LookupInt8& op, const Samples& samples, const Line& line,
             const Table& shared, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kRows <= end; o += kRows) some_rows<Bits, kRows>(op, samples, line, shared, o);
  for (; o < end; ++o) some_rows<Bits, 1>(op, samples, line, shared, o);
}

template <int Bits = 1>
void all_rows(const taut::LookupInt8& op, const Samples& samples, const Line& line, int64_t begin,
              int64_t end) {
  if constexpr (Bits <= 8) {
    if (op.bits != Bits) return all_rows<Bits + 1>(op, samples, line, begin, end);
    if (line.even) return rows_of<Bits>(op, samples, line, Indices{}, begin, end);
    rows_of<Bits>(op, samples, line, load_table<Bits>(op.table), begin, end);
  }
}

inline void lookup_matmul_int8(const taut::LookupInt8& op, const taut::Parallel& parallel) {
  const int64_t blocks = (op.in + kBlock - 1) / kBlock, items = op.batch * blocks * kBlock;
  const size_t bytes = size_t(items) * sizeof(Item);
  auto* memory = static_cast<char*>(taut::scratch<1>(bytes + size_t(op.batch) * 4));
  const Samples samples{reinterpret_cast<Item*>(memory),
                        reinterpret_cast<uint32_t*>(memory + bytes), blocks};
  const Line line = Line::of(op);
  parallel(op.batch, 1 + 65536 / (op.in + 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) reorder(op, samples, n);
  });
  const int64_t tiles = (op.out + kRows - 1) / kRows;
  const int64_t work = kRows * (op.in + 1) * (op.batch + 4);
  parallel(tiles, 1 + (1 << 18) / work, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kRows < op.out ? end * kRows : op.out;
    all_rows(op, samples, line, begin * kRows, last);
  });
}

}  // namespace
