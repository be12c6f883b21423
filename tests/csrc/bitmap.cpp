// bitmap_matmul: every variant against the sum written out. All numbers are small integers, so the
// floats are exact in whatever order they are added.
#include "bitmap/bitmap.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "narrow.h"

namespace {

struct Case {
  int64_t batch, in, out;
  int eighths = 4;  // of the weights that are kept
  bool half = false;
  bool spoilt = false;  // starts anywhere, and fewer values than the masks ask for
  int64_t skew = 0;
  bool no_number = false;  // in x, for the last sample
};

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t words = (c.in + 15) / 16, blocks = (c.in + 127) / 128;
  check::Exact<uint16_t> masks(c.out * words, c.skew);
  check::Exact<int32_t> starts(c.out * blocks, c.skew);
  int64_t count = 0;
  for (int64_t o = 0; o < c.out; ++o) {
    for (int64_t i = 0; i < 16 * words; ++i) {
      if (i % 128 == 0) starts[o * blocks + i / 128] = int32_t(count);
      // Bits beyond the columns may be set: nothing may come of them.
      const bool kept = i >= c.in || random.between(0, 7) < c.eighths;
      const uint16_t bit = uint16_t(1u << (i % 16));
      uint16_t& mask = masks[o * words + i / 16];
      mask = uint16_t(kept ? mask | bit : mask & ~bit);
      count += kept && i < c.in;
    }
  }
  if (c.spoilt) {
    count /= 2;
    for (int64_t i = 0; i < starts.size(); ++i) {
      const uint32_t chance = random.bits() >> 29;
      if (chance == 0) starts[i] = int32_t(random.bits());
      if (chance == 1) starts[i] = int32_t(count - random.between(0, 200));
      if (chance == 2) starts[i] = int32_t(count - random.between(112, 130));
    }
  }
  check::Exact<float> floats(c.half ? 0 : count, c.skew), x(c.batch * c.in, c.skew);
  check::Exact<uint16_t> halves(c.half ? count : 0, c.skew);
  std::vector<float> value;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t number = random.between(-50, 50);
    value.push_back(float(number));
    if (c.half) {
      halves[j] = check::half_of(number);
    } else {
      floats[j] = float(number);
    }
  }
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  if (c.no_number && x.size() > 0) x[x.size() - 1] = NAN;

  // A start is limited to the values that exist; what lies behind them is zero.
  std::vector<float> dense;
  for (int64_t o = 0; o < c.out; ++o) {
    int64_t next = 0;
    for (int64_t i = 0; i < c.in; ++i) {
      if (i % 128 == 0) next = std::clamp<int64_t>(starts[o * blocks + i / 128], 0, count);
      const bool kept = masks[o * words + i / 16] >> (i % 16) & 1;
      dense.push_back(kept && next < count ? value[size_t(next)] : 0);
      next += kept;
    }
  }
  std::vector<float> wanted;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float sum = 0;
      for (int64_t i = 0; i < c.in; ++i) sum += x[n * c.in + i] * dense[size_t(o * c.in + i)];
      wanted.push_back(sum);
    }
  }
  const void* values = c.half ? static_cast<void*>(halves.data()) : floats.data();
  check::each_variant(taut::kBitmapMatmulVariants, [&](const char* name, auto kernel) {
    check::Exact<float> y(c.batch * c.out, c.skew);
    kernel({.x = x.data(), .masks = masks.data(), .starts = starts.data(), .values = values,
            .y = y.data(), .batch = c.batch, .in = c.in, .out = c.out, .count = count,
            .half = c.half},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !same(y[i], wanted[size_t(i)]);
    CHECK(wrong == 0,
          "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, %d of 8 kept, half %d, spoilt %d",
          name, (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.in,
          (long long)c.out, c.eighths, c.half, c.spoilt);
  });
}

}  // namespace

TAUT_TEST(bitmap_matmul_at_every_width) {
  for (int64_t in : {0, 1, 15, 16, 17, 31, 33, 127, 128, 129, 143, 255, 256, 257, 385}) {
    for (int64_t batch : {1, 2, 3, 4, 5, 13}) {
      for (const bool half : {false, true}) {
        run({.batch = batch, .in = in, .out = 7, .half = half, .no_number = batch == 3},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(bitmap_matmul_at_every_height) {
  for (int64_t out : {0, 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 65}) {
    for (int64_t batch : {0, 1, 2, 5, 12, 25}) {
      run({.batch = batch, .in = 145, .out = out, .skew = 1}, taut::serial);
    }
  }
}

TAUT_TEST(bitmap_matmul_with_few_and_many_values) {
  for (int eighths : {0, 1, 7, 8}) {
    for (const bool half : {false, true}) {
      for (int64_t batch : {1, 9}) {
        run({.batch = batch, .in = 300, .out = 20, .eighths = eighths, .half = half, .skew = 1},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(bitmap_matmul_reads_no_value_that_does_not_exist) {
  for (int64_t in : {1, 17, 128, 260, 1000}) {
    for (int64_t out : {1, 2, 40}) {
      for (int64_t batch : {1, 6}) {
        for (const bool half : {false, true}) {
          for (int eighths : {4, 8}) {
            run({.batch = batch, .in = in, .out = out, .eighths = eighths, .half = half,
                 .spoilt = true},
                taut::serial);
          }
        }
      }
    }
  }
}

TAUT_TEST(bitmap_matmul_on_three_threads) {
  for (int64_t batch : {1, 4, 40}) {
    for (const bool half : {false, true}) {
      run({.batch = batch, .in = 513, .out = 299, .half = half, .skew = 3}, check::three_threads);
    }
  }
}

TAUT_TEST(bitmap_matmul_is_dispatched) { check::dispatch(taut::kBitmapMatmulVariants); }
