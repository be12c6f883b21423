// sparse_matmul and sparse_conv2d: every variant against the sums written out. All numbers are
// small integers, so the floats are exact in whatever order they are added.
#include "sparse/sparse.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "narrow.h"

namespace {

enum class Stored { kFloat, kHalf, kBfloat16, kInt8, kFewEntries, kManyEntries };
constexpr Stored kAllStored[] = {Stored::kFloat, Stored::kHalf,       Stored::kBfloat16,
                                 Stored::kInt8,  Stored::kFewEntries, Stored::kManyEntries};

// Lengths of rows, taken in turn: around what is read at once, and empty ones.
constexpr int64_t kLengths[] = {17, 0, 1, 64, 129, 16, 63, 3, 300, 15, 33, 65, 0, 128};

// What is spoilt: columns that do not exist, and for tables entries that do not.
enum class Spoilt { kNothing, kColumns };

struct Rows {
  int64_t in, out, count;
  std::vector<int64_t> column;  // as the kernel is to read it
  std::vector<float> value;     // likewise, scales included
  check::Exact<int32_t> starts;
  check::Exact<uint16_t> columns;
  check::Exact<int32_t> wide_columns;
  check::Exact<float> floats, scale, table;
  check::Exact<uint16_t> halves;
  check::Exact<int8_t> bytes;
  Stored stored;
  bool wide;

  // Columns come from the first `used`.
  Rows(check::Random& random, int64_t in, int64_t out, Stored stored, bool wide, int64_t first,
       int64_t used, Spoilt spoilt, int64_t skew)
      : in(in), out(out), count(total(in, out, first)), column(size_t(count)), value(size_t(count)),
        starts(out + 1), columns(wide ? 0 : count, skew), wide_columns(wide ? count : 0, skew),
        floats(stored == Stored::kFloat ? count : 0, skew), scale(out, skew), table(256, skew),
        halves(stored == Stored::kHalf || stored == Stored::kBfloat16 ? count : 0, skew),
        bytes(stored >= Stored::kInt8 ? count : 0, skew), stored(stored), wide(wide) {
    const int64_t entries = stored == Stored::kFewEntries ? 13 : 256;
    for (int64_t i = 0; i < 256; ++i) table[i] = i < entries ? float(random.between(-50, 50)) : 0;
    starts[0] = 0;
    for (int64_t o = 0; o < out; ++o) {
      scale[o] = float(random.between(1, 3));
      starts[o + 1] = starts[o] + int32_t(length(in, first + o));
      for (int64_t j = starts[o]; j < starts[o + 1]; ++j) {
        write_value(random, j, o, spoilt == Spoilt::kNothing ? entries : 256);
        write_column(random, j, used, spoilt == Spoilt::kColumns && random.bits() >> 30 == 0);
      }
    }
  }

  taut::SparseRows get() {
    taut::SparseRows rows{};
    rows.starts = starts.data(), rows.scale = scale.data(), rows.table = table.data();
    rows.in = in, rows.out = out, rows.count = count, rows.wide = wide;
    rows.columns = wide ? static_cast<void*>(wide_columns.data()) : columns.data();
    rows.small_table = stored == Stored::kFewEntries;
    if (stored == Stored::kFloat) {
      rows.kind = taut::Values::kFloat, rows.values = floats.data();
    } else if (stored <= Stored::kBfloat16) {
      rows.kind = stored == Stored::kHalf ? taut::Values::kHalf : taut::Values::kBfloat16;
      rows.values = halves.data();
    } else {
      rows.kind = stored == Stored::kInt8 ? taut::Values::kInt8 : taut::Values::kIndex;
      rows.values = bytes.data();
    }
    return rows;
  }

 private:
  static int64_t length(int64_t in, int64_t o) {
    return in == 0 ? 0 : kLengths[size_t(o) % std::size(kLengths)];
  }
  static int64_t total(int64_t in, int64_t out, int64_t first) {
    int64_t sum = 0;
    for (int64_t o = 0; o < out; ++o) sum += length(in, first + o);
    return sum;
  }

  void write_value(check::Random& random, int64_t j, int64_t o, int64_t entries) {
    const int64_t number = random.between(-50, 50);
    float& to = value[size_t(j)] = float(number);
    if (stored == Stored::kFloat) {
      floats[j] = to;
    } else if (stored == Stored::kHalf) {
      halves[j] = check::half_of(number);
    } else if (stored == Stored::kBfloat16) {
      halves[j] = check::bfloat16_of(number);
    } else if (stored == Stored::kInt8) {
      bytes[j] = int8_t(number);
      to *= scale[o];
    } else {
      const int64_t index = random.between(0, entries - 1);
      bytes[j] = int8_t(uint8_t(index));
      to = table[stored == Stored::kFewEntries ? index % 16 : index];
    }
  }

  void write_column(check::Random& random, int64_t j, int64_t used, bool any) {
    const int64_t good = random.between(0, used - 1);
    const uint32_t raw = !any ? uint32_t(good) : wide ? random.bits() : random.bits() >> 16;
    if (wide) {
      wide_columns[j] = int32_t(raw);
    } else {
      columns[j] = uint16_t(raw);
    }
    column[size_t(j)] = std::min<int64_t>(raw, in - 1);
  }
};

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

struct Case {
  int64_t batch, in, out;
  Stored stored = Stored::kFloat;
  bool wide = false;
  int64_t first = 0;  // of the lengths
  Spoilt spoilt = Spoilt::kNothing;
  int64_t skew = 0;
};

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  // No weight is stored in the last column, and x is no number there.
  const bool spared = c.in > 1 && c.spoilt == Spoilt::kNothing;
  Rows rows(random, c.in, c.out, c.stored, c.wide, c.first, c.in - spared, c.spoilt, c.skew);
  check::Exact<float> x(c.batch * c.in, c.skew);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  for (int64_t n = 0; spared && n < c.batch; ++n) x[n * c.in + c.in - 1] = NAN;
  std::vector<float> wanted;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float sum = 0;
      for (int64_t j = rows.starts[o]; j < rows.starts[o + 1]; ++j) {
        sum += x[n * c.in + rows.column[size_t(j)]] * rows.value[size_t(j)];
      }
      wanted.push_back(sum);
    }
  }
  check::each_variant(taut::kSparseMatmulVariants, [&](const char* name, auto kernel) {
    check::Exact<float> y(c.batch * c.out, c.skew);
    kernel({.rows = rows.get(), .x = x.data(), .y = y.data(), .batch = c.batch}, parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !(y[i] == wanted[size_t(i)]);
    CHECK(wrong == 0, "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, stored %d, wide %d",
          name, (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.in,
          (long long)c.out, int(c.stored), c.wide);
  });
}

struct Pair {
  int64_t h, w;
};

struct ConvCase {
  int64_t batch, channels, out;
  Pair size, kernel;
  Pair stride{1, 1}, padding{0, 0}, dilation{1, 1};
  int64_t groups = 1;
  Stored stored = Stored::kFloat;
  bool wide = false;
  Spoilt spoilt = Spoilt::kNothing;
  int64_t skew = 0;
  bool no_number = false;  // here and there in x
};

int64_t outputs(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void run(const ConvCase& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t each = c.channels / c.groups, in = each * c.kernel.h * c.kernel.w;
  const Pair size{outputs(c.size.h, c.kernel.h, c.stride.h, c.padding.h, c.dilation.h),
                  outputs(c.size.w, c.kernel.w, c.stride.w, c.padding.w, c.dilation.w)};
  Rows rows(random, in, c.out, c.stored, c.wide, 0, in, c.spoilt, c.skew);
  check::Exact<float> x(c.batch * c.channels * c.size.h * c.size.w, c.skew);
  for (int64_t i = 0; i < x.size(); ++i) {
    x[i] = c.no_number && random.bits() >> 24 == 0 ? NAN : float(random.between(-8, 8));
  }
  std::vector<float> wanted(size_t(c.batch * c.out * size.h * size.w), 0.0f);
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float* to = wanted.data() + (n * c.out + o) * size.h * size.w;
      const int64_t from = n * c.channels + o / (c.out / c.groups) * each;
      for (int64_t j = rows.starts[o]; j < rows.starts[o + 1]; ++j) {
        const int64_t column = rows.column[size_t(j)], kw = column % c.kernel.w;
        const int64_t kh = column / c.kernel.w % c.kernel.h;
        const float* image =
            x.data() + (from + column / c.kernel.w / c.kernel.h) * c.size.h * c.size.w;
        for (int64_t p = 0; p < size.h; ++p) {
          const int64_t h = p * c.stride.h + kh * c.dilation.h - c.padding.h;
          for (int64_t q = 0; q < size.w; ++q) {
            const int64_t w = q * c.stride.w + kw * c.dilation.w - c.padding.w;
            if (h < 0 || h >= c.size.h || w < 0 || w >= c.size.w) continue;
            to[p * size.w + q] += image[h * c.size.w + w] * rows.value[size_t(j)];
          }
        }
      }
    }
  }
  check::each_variant(taut::kSparseConvVariants, [&](const char* name, auto kernel) {
    check::Exact<float> y(int64_t(wanted.size()), c.skew);
    kernel({.rows = rows.get(), .x = x.data(), .y = y.data(), .batch = c.batch,
            .channels = c.channels, .groups = c.groups, .size = {c.size.h, c.size.w},
            .out_size = {size.h, size.w}, .kernel = {c.kernel.h, c.kernel.w},
            .stride = {c.stride.h, c.stride.w}, .padding = {c.padding.h, c.padding.w},
            .dilation = {c.dilation.h, c.dilation.w}},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !same(y[i], wanted[size_t(i)]);
    CHECK(wrong == 0,
          "%s: %lld of %lld wrong; batch %lld, channels %lld, out %lld, size %lld×%lld, kernel "
          "%lld×%lld, stride %lld×%lld, padding %lld×%lld, dilation %lld×%lld, groups %lld, "
          "stored %d, wide %d",
          name, (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.channels,
          (long long)c.out, (long long)c.size.h, (long long)c.size.w, (long long)c.kernel.h,
          (long long)c.kernel.w, (long long)c.stride.h, (long long)c.stride.w,
          (long long)c.padding.h, (long long)c.padding.w, (long long)c.dilation.h,
          (long long)c.dilation.w, (long long)c.groups, int(c.stored), c.wide);
  });
}

}  // namespace

TAUT_TEST(sparse_matmul_with_all_values_and_columns) {
  for (const Stored stored : kAllStored) {
    for (const bool wide : {false, true}) {
      for (int64_t batch : {1, 2, 15, 16, 17, 65}) {
        run({.batch = batch, .in = 97, .out = 30, .stored = stored, .wide = wide, .skew = 1},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(sparse_matmul_at_every_size) {
  for (int64_t in : {0, 1, 2, 15, 16, 17, 31, 33, 255, 257}) {
    for (int64_t batch : {0, 1, 3, 16, 33, 48, 63, 64, 129}) {
      run({.batch = batch, .in = in, .out = 9, .first = in}, taut::serial);
    }
  }
  for (int64_t out : {0, 1, 2, 14, 15, 16, 17, 31, 32, 33}) {
    for (int64_t batch : {1, 5, 16, 64}) {
      for (int64_t first : {0, 5}) {
        run({.batch = batch, .in = 40, .out = out, .stored = Stored::kHalf, .first = first},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(sparse_matmul_with_rows_that_end_with_the_arrays) {
  for (const Stored stored : kAllStored) {
    for (size_t first = 0; first < std::size(kLengths); ++first) {
      for (int64_t batch : {1, 4}) {
        run({.batch = batch, .in = 77, .out = 1, .stored = stored, .wide = first % 2 == 1,
             .first = int64_t(first)},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(sparse_matmul_with_more_columns_than_a_panel_holds_of_all_samples) {
  for (int64_t in : {4097, 5462, 8193}) {
    run({.batch = 70, .in = in, .out = 5}, taut::serial);
  }
  for (int64_t batch : {1, 18}) run({.batch = batch, .in = 65535, .out = 9}, taut::serial);
  for (int64_t batch : {1, 18}) {
    run({.batch = batch, .in = 70001, .out = 9, .wide = true}, taut::serial);
  }
}

TAUT_TEST(sparse_matmul_reads_no_column_or_entry_that_does_not_exist) {
  for (const Stored stored : kAllStored) {
    for (const bool wide : {false, true}) {
      for (int64_t batch : {1, 7, 64}) {
        for (int64_t in : {1, 16, 65}) {
          run({.batch = batch, .in = in, .out = 28, .stored = stored, .wide = wide,
               .spoilt = Spoilt::kColumns},
              taut::serial);
        }
      }
    }
  }
}

TAUT_TEST(sparse_matmul_on_three_threads) {
  for (int64_t batch : {1, 70}) {
    run({.batch = batch, .in = 513, .out = 1501, .skew = 3}, check::three_threads);
    run({.batch = batch, .in = 513, .out = 1500, .stored = Stored::kInt8, .wide = true},
        check::three_threads);
  }
}

TAUT_TEST(sparse_conv2d_with_every_geometry) {
  for (const Pair kernel : {Pair{1, 1}, {3, 3}, {2, 5}}) {
    for (const Pair stride : {Pair{1, 1}, {2, 1}, {1, 3}, {4, 2}}) {
      for (const Pair padding : {Pair{0, 0}, {1, 2}, {4, 3}}) {
        for (const Pair dilation : {Pair{1, 1}, {2, 2}, {1, 3}}) {
          run({.batch = 2, .channels = 2, .out = 4, .size = {9, 17}, .kernel = kernel,
               .stride = stride, .padding = padding, .dilation = dilation, .no_number = true},
              taut::serial);
        }
      }
    }
  }
}

TAUT_TEST(sparse_conv2d_at_every_width) {
  for (int64_t width : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65}) {
    for (int64_t height : {1, 2, 5}) {
      run({.batch = 1, .channels = 1, .out = 17, .size = {height, width}, .kernel = {1, 1},
           .skew = 1},
          taut::serial);
      run({.batch = 3, .channels = 2, .out = 3, .size = {height, width}, .kernel = {3, 3},
           .padding = {1, 1}},
          taut::serial);
      run({.batch = 1, .channels = 2, .out = 3, .size = {height, width}, .kernel = {3, 3},
           .stride = {2, 2}, .padding = {1, 1}},
          taut::serial);
    }
  }
}

TAUT_TEST(sparse_conv2d_with_groups_values_and_columns) {
  for (const Stored stored : kAllStored) {
    for (const bool wide : {false, true}) {
      for (int64_t groups : {1, 2, 6}) {
        run({.batch = 2, .channels = 6, .out = 18, .size = {7, 9}, .kernel = {3, 3},
             .padding = {1, 1}, .groups = groups, .stored = stored, .wide = wide},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(sparse_conv2d_of_images_that_are_larger_than_a_panel) {
  run({.batch = 2, .channels = 70, .out = 3, .size = {65, 66}, .kernel = {3, 3},
       .padding = {1, 1}},
      taut::serial);
  run({.batch = 1, .channels = 70, .out = 3, .size = {65, 66}, .kernel = {3, 2},
       .stride = {2, 2}, .dilation = {2, 3}},
      taut::serial);
  run({.batch = 1, .channels = 2, .out = 2, .size = {3, 70001}, .kernel = {3, 3},
       .padding = {1, 1}},
      taut::serial);
}

TAUT_TEST(sparse_conv2d_reads_no_column_or_entry_that_does_not_exist) {
  for (const Stored stored : kAllStored) {
    for (const bool wide : {false, true}) {
      for (int64_t groups : {1, 3}) {
        run({.batch = 2, .channels = 3, .out = 15, .size = {6, 7}, .kernel = {2, 3},
             .groups = groups, .stored = stored, .wide = wide, .spoilt = Spoilt::kColumns},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(sparse_conv2d_on_three_threads_and_of_nothing) {
  run({.batch = 5, .channels = 16, .out = 66, .size = {30, 31}, .kernel = {3, 3},
       .padding = {1, 1}, .groups = 2},
      check::three_threads);
  run({.batch = 0, .channels = 2, .out = 3, .size = {4, 4}, .kernel = {3, 3}}, taut::serial);
  run({.batch = 2, .channels = 2, .out = 0, .size = {4, 4}, .kernel = {3, 3}}, taut::serial);
  run({.batch = 2, .channels = 0, .out = 3, .size = {4, 4}, .kernel = {3, 3}}, taut::serial);
}

TAUT_TEST(sparse_is_dispatched) {
  check::dispatch(taut::kSparseMatmulVariants);
  check::dispatch(taut::kSparseConvVariants);
}
