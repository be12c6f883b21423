// block_matmul: every variant against the sum written out. All numbers are small integers, so the
// floats are exact in whatever order they are added.
#include "blocks/blocks.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "narrow.h"

namespace {

// Blocks of a row of blocks, taken in turn: around what is read at once, and none.
constexpr int64_t kLengths[] = {5, 0, 1, 16, 129, 4, 15, 32, 33, 3, 17, 260, 0, 64};

struct Case {
  int64_t batch, in, out, rows;
  bool half = false;
  int64_t first = 0;    // of the lengths
  bool spoilt = false;  // columns that do not exist
  int64_t skew = 0;
};

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t high = (c.out + c.rows - 1) / c.rows;
  check::Exact<int32_t> starts(high + 1);
  starts[0] = 0;
  for (int64_t b = 0; b < high; ++b) {
    const int64_t length = kLengths[size_t(c.first + b) % std::size(kLengths)];
    starts[b + 1] = starts[b] + int32_t(c.in == 0 ? 0 : length);
  }
  const int64_t count = starts[high];
  // No weight is stored in the last column, and x is no number there.
  const bool spared = c.in > 1 && !c.spoilt;
  check::Exact<uint16_t> columns(count, c.skew), halves(c.half ? count * c.rows : 0, c.skew);
  check::Exact<float> floats(c.half ? 0 : count * c.rows, c.skew), x(c.batch * c.in, c.skew);
  std::vector<float> value;
  for (int64_t j = 0; j < count; ++j) {
    const bool any = c.spoilt && random.bits() >> 30 == 0;
    columns[j] = uint16_t(any ? random.bits() >> 16 : random.between(0, c.in - 1 - spared));
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t number = random.between(-50, 50);
      value.push_back(float(number));
      if (c.half) {
        halves[j * c.rows + r] = check::half_of(number);
      } else {
        floats[j * c.rows + r] = float(number);
      }
    }
  }
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  for (int64_t n = 0; spared && n < c.batch; ++n) x[n * c.in + c.in - 1] = NAN;
  std::vector<float> wanted;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float sum = 0;
      for (int64_t j = starts[o / c.rows]; j < starts[o / c.rows + 1]; ++j) {
        const int64_t column = std::min<int64_t>(columns[j], c.in - 1);
        sum += x[n * c.in + column] * value[size_t(j * c.rows + o % c.rows)];
      }
      wanted.push_back(sum);
    }
  }
  const void* values = c.half ? static_cast<void*>(halves.data()) : floats.data();
  check::each_variant(taut::kBlockMatmulVariants, [&](const char* name, auto kernel) {
    check::Exact<float> y(c.batch * c.out, c.skew);
    kernel({.x = x.data(), .starts = starts.data(), .columns = columns.data(), .values = values,
            .y = y.data(), .batch = c.batch, .in = c.in, .out = c.out, .count = count,
            .rows = c.rows, .half = c.half},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !(y[i] == wanted[size_t(i)]);
    CHECK(wrong == 0, "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, rows %lld, half %d",
          name, (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.in,
          (long long)c.out, (long long)c.rows, c.half);
  });
}

// Both heights of a block, and both kinds of values.
void run_all(Case c, const taut::Parallel& parallel) {
  for (const int64_t rows : {4, 16}) {
    for (const bool half : {false, true}) {
      c.rows = rows, c.half = half;
      run(c, parallel);
    }
  }
}

}  // namespace

TAUT_TEST(block_matmul_at_every_size) {
  for (int64_t in : {0, 1, 2, 15, 16, 17, 65, 257}) {
    for (int64_t batch : {0, 1, 2, 4, 15, 16, 17, 33, 64, 129}) {
      run_all({.batch = batch, .in = in, .out = 35, .rows = 0, .first = in}, taut::serial);
    }
  }
}

TAUT_TEST(block_matmul_at_every_height) {
  for (int64_t out : {0, 1, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 65}) {
    for (int64_t batch : {1, 3, 5, 16, 63}) {
      run_all({.batch = batch, .in = 40, .out = out, .rows = 0, .skew = 1}, taut::serial);
    }
  }
}

TAUT_TEST(block_matmul_with_blocks_that_end_with_the_arrays) {
  for (size_t first = 0; first < std::size(kLengths); ++first) {
    for (int64_t batch : {1, 4, 20}) {
      run_all({.batch = batch, .in = 77, .out = 4, .rows = 0, .first = int64_t(first)},
              taut::serial);
    }
  }
}

TAUT_TEST(block_matmul_with_more_columns_than_a_panel_holds_of_all_samples) {
  for (int64_t in : {4097, 8193, 65535, 70001}) {
    run_all({.batch = 35, .in = in, .out = 20, .rows = 0, .spoilt = in > 65536}, taut::serial);
  }
}

TAUT_TEST(block_matmul_reads_no_column_that_does_not_exist) {
  for (int64_t in : {1, 16, 65}) {
    for (int64_t batch : {1, 7, 64}) {
      run_all({.batch = batch, .in = in, .out = 40, .rows = 0, .spoilt = true}, taut::serial);
    }
  }
}

TAUT_TEST(block_matmul_on_three_threads) {
  for (int64_t batch : {1, 70}) {
    run_all({.batch = batch, .in = 513, .out = 1501, .rows = 0, .skew = 3}, check::three_threads);
  }
}

TAUT_TEST(block_matmul_is_dispatched) { check::dispatch(taut::kBlockMatmulVariants); }
