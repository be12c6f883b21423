// Reading compressed rows sixteen at a time, whatever their values and columns are stored as.
// Included after one of lanes/*.h.
#pragma once

#include <cstring>

#include "sparse/sparse.h"

namespace {

struct FloatValues {
  using Item = float;
  F16 operator()(const float* p) const { return F16::load(p); }
};
struct HalfValues {
  using Item = uint16_t;
  F16 operator()(const uint16_t* p) const { return load_halves(p); }
};
struct Bfloat16Values {
  using Item = uint16_t;
  F16 operator()(const uint16_t* p) const { return floats_of(I16::load_shorts(p) << 16); }
};
struct Int8Values {
  using Item = int8_t;
  F16 operator()(const int8_t* p) const { return load_signed_bytes(p); }
};
struct SmallTableValues {
  using Item = uint8_t;
  Table<4> table;
  F16 operator()(const uint8_t* p) const { return table(I16::load_bytes(p)); }
};
struct TableValues {
  using Item = uint8_t;
  const float* table;
  F16 operator()(const uint8_t* p) const { return gather(table, I16::load_bytes(p)); }
};

struct ShortColumns {
  using Item = uint16_t;
  I16 operator()(const uint16_t* p) const { return I16::load_shorts(p); }
};
struct WideColumns {
  using Item = int32_t;
  I16 operator()(const int32_t* p) const { return I16::load(p); }
};

// Calls use(read_values) with what reads these values.
template <class Use>
void with_values(const taut::SparseRows& rows, const Use& use) {
  switch (rows.kind) {
    case taut::Values::kFloat: return use(FloatValues{});
    case taut::Values::kHalf: return use(HalfValues{});
    case taut::Values::kBfloat16: return use(Bfloat16Values{});
    case taut::Values::kInt8: return use(Int8Values{});
    case taut::Values::kIndex:
      if (rows.small_table) return use(SmallTableValues{Table<4>::load(rows.table)});
      return use(TableValues{rows.table});
  }
}

// Sixteen items of an array from j on; where it ends before, a copy of those that are left.
template <class Read>
auto read_sixteen(const Read& read, const void* array, int64_t j, int64_t count) {
  const auto* at = static_cast<const typename Read::Item*>(array) + j;
  if (j + 16 <= count) return read(at);
  typename Read::Item aside[16] = {};
  std::memcpy(aside, at, size_t(count - j) * sizeof(*at));
  return read(aside);
}

// Read at once; a sum is also started anew after as many, sooner where there are fewer sums.
constexpr int64_t kTerms = 32 * kPanels;

// Values of the terms j … j + n - 1, in `room` (a multiple of sixteen) unless they are floats.
inline const float* read_values(const taut::SparseRows& rows, int64_t j, int64_t n, float* room) {
  if (rows.kind == taut::Values::kFloat) return static_cast<const float*>(rows.values) + j;
  with_values(rows, [&](const auto& read) {
    for (int64_t i = 0; i < n; i += 16) {
      read_sixteen(read, rows.values, j + i, rows.count).store(room + i);
    }
  });
  return room;
}

// Columns of the terms j … j + n - 1, limited to those that exist: in `room` (a multiple of
// sixteen) unless they are 16 bits wide and good as they stand.
inline const uint16_t* good_columns(const taut::SparseRows& rows, int64_t j, int64_t n,
                                    uint32_t* room) {
  const I16 last = I16::all(uint32_t(rows.in - 1));
  I16 beyond = I16::all(0);
  for (int64_t i = 0; i < n; i += 16) {
    const I16 column = rows.wide ? read_sixteen(WideColumns{}, rows.columns, j + i, rows.count)
                                 : read_sixteen(ShortColumns{}, rows.columns, j + i, rows.count);
    const I16 good = minimum(column, last);
    beyond = beyond | (good ^ column);
    good.store(room + i);
  }
  if (rows.wide || any(beyond)) return nullptr;
  return static_cast<const uint16_t*>(rows.columns) + j;
}

// sum[…] += Σ value[t] · base[place(t) + …] for t < n. Strips are read downward, lest caches fetch
// what follows the last one too.
template <int Sums, int Strips, class Place>
void add_terms(const float* value, const Place& place, int64_t n, const float* base,
               F16 (&total)[Strips]) {
  F16 sum[Sums][Strips];
  for (auto& part : sum) {
    for (auto& s : part) s = F16::zero();
  }
  int64_t t = 0;
  for (; t + Sums <= n; t += Sums) {
#pragma GCC unroll 8
    for (int i = 0; i < Sums; ++i) {
      const F16 v = F16::all(value[t + i]);
      const float* x = base + place(t + i);
#pragma GCC unroll 4
      for (int s = Strips - 1; s >= 0; --s) {
        sum[i][s] = multiply_add(v, F16::load(x + 16 * s), sum[i][s]);
      }
    }
  }
  for (; t < n; ++t) {
    const F16 v = F16::all(value[t]);
    const float* x = base + place(t);
    for (int s = Strips - 1; s >= 0; --s) {
      sum[0][s] = multiply_add(v, F16::load(x + 16 * s), sum[0][s]);
    }
  }
  for (int s = 0; s < Strips; ++s) {
    for (int i = 1; i < Sums; ++i) sum[0][s] = sum[0][s] + sum[i][s];
    total[s] = total[s] + sum[0][s];
  }
}

// to[…] = Σ over row o of value · base[place + …], for 16 · Strips samples. The place of a column
// is offset[column], or column · 16 · Strips without such a table.
template <int Strips>
void sum_row(const taut::SparseRows& rows, const uint32_t* offset, int64_t o, const float* base,
             float* to) {
  // As many sums as there are registers for: their latencies overlap.
  constexpr int kSums = 4 * kPanels / Strips > 0 ? 4 * kPanels / Strips : 1;
  F16 total[Strips];
  for (auto& t : total) t = F16::zero();
  float value_room[kTerms];
  uint32_t column_room[kTerms];
  for (int64_t j = rows.starts[o], end = rows.starts[o + 1]; j < end; j += kTerms) {
    const int64_t n = end - j < kTerms ? end - j : kTerms;
    const float* value = read_values(rows, j, n, value_room);
    const uint16_t* column = good_columns(rows, j, n, column_room);
    const auto add = [&](const auto* at) {
      if (offset == nullptr) {
        const auto place = [at](int64_t t) { return uint64_t(at[t]) * (16 * Strips); };
        add_terms<kSums>(value, place, n, base, total);
      } else {
        const auto place = [at, offset](int64_t t) { return uint64_t(offset[at[t]]); };
        add_terms<kSums>(value, place, n, base, total);
      }
    };
    if (column != nullptr) {
      add(column);
    } else {
      add(column_room);
    }
  }
  if (rows.kind == taut::Values::kInt8) {
    for (auto& t : total) t = t * F16::all(rows.scale[o]);
  }
  for (int s = 0; s < Strips; ++s) total[s].store(to + 16 * s);
}

// Row o times one sample.
template <class ReadValues, class ReadColumns>
float dot(const taut::SparseRows& rows, const ReadValues& values, const ReadColumns& columns,
          const float* x, int64_t o) {
  const I16 last = I16::all(uint32_t(rows.in - 1));
  const auto* value = static_cast<const typename ReadValues::Item*>(rows.values);
  const auto* column = static_cast<const typename ReadColumns::Item*>(rows.columns);
  int64_t j = rows.starts[o];
  const int64_t end = rows.starts[o + 1];
  F16 sum[4] = {F16::zero(), F16::zero(), F16::zero(), F16::zero()};
  for (; j + 64 <= end; j += 64) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F16 xs = gather(x, minimum(columns(column + j + 16 * i), last));
      sum[i] = multiply_add(values(value + j + 16 * i), xs, sum[i]);
    }
  }
  for (; j < end; j += 16) {  // what a further row holds must not meet x: it may be no number
    const F16 v = read_sixteen(values, rows.values, j, rows.count).first(end - j);
    const I16 at = minimum(read_sixteen(columns, rows.columns, j, rows.count), last);
    sum[0] = multiply_add(v, gather(x, at).first(end - j), sum[0]);
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

}  // namespace
