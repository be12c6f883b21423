// lookup_matmul: every variant against the sum written out. All numbers are small integers, so the
// floats are exact in whatever order they are added.
#include "check.h"
#include "lookup/lookup.h"
#include "lookup_codes.h"

namespace {

struct Case {
  int64_t batch, in, out;
  int bits;
  bool of_row = false;  // a table for each row
  int64_t group = 0;    // 0: one for all columns
  int64_t skew = 0;
};

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t group = c.group ? c.group : c.in + 1;
  const int64_t groups = c.group ? (c.in + c.group - 1) / c.group : 1, entries = 1 << c.bits;
  check::Indices indices(random, c.in, c.out, c.bits);
  check::Exact<float> x(c.batch * c.in, c.skew);
  check::Exact<float> table((c.of_row ? c.out : 1) * groups * entries, c.skew);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  for (int64_t i = 0; i < table.size(); ++i) table[i] = float(random.between(-50, 50));
  const int64_t stride = c.of_row ? groups * entries : 0;

  std::vector<float> wanted;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float sum = 0;
      for (int64_t k = 0; k < c.in; ++k) {
        sum += x[n * c.in + k] * table[o * stride + k / group * entries + indices.at(o, k)];
      }
      wanted.push_back(sum);
    }
  }
  check::each_variant(taut::kLookupVariants, [&](const char* name, taut::LookupMatmul kernel) {
    check::Exact<float> y(c.batch * c.out, c.skew);
    kernel({.x = x.data(), .codes = indices.codes.data(), .table = table.data(), .y = y.data(),
            .batch = c.batch, .in = c.in, .out = c.out, .words = indices.words,
            .table_stride = stride, .group = group, .bits = c.bits},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !(y[i] == wanted[size_t(i)]);
    CHECK(wrong == 0, "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, %d bits, group %lld",
          name, (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.in,
          (long long)c.out, c.bits, (long long)c.group);
  });
}

}  // namespace

TAUT_TEST(lookup_matmul_at_every_width) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t in : {0, 1, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256, 257, 385}) {
      for (int64_t batch : {1, 3, 4, 5, 13}) {
        run({.batch = batch, .in = in, .out = 5, .bits = bits}, taut::serial);
      }
    }
  }
}

TAUT_TEST(lookup_matmul_at_every_height) {
  for (int64_t out : {0, 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 65}) {
    for (int64_t batch : {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 25}) {
      run({.batch = batch, .in = 145, .out = out, .bits = 4, .skew = 1}, taut::serial);
    }
  }
}

TAUT_TEST(lookup_matmul_with_tables_of_rows_and_groups) {
  for (int bits : {1, 2, 3, 4, 5, 8}) {
    for (int64_t group : {0, 128, 256}) {
      for (int64_t batch : {2, 9}) {
        run({.batch = batch, .in = 385, .out = 7, .bits = bits, .of_row = true, .group = group},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(lookup_matmul_on_three_threads) {
  for (int64_t batch : {1, 4, 40}) {
    run({.batch = batch, .in = 513, .out = 300, .bits = 4, .skew = 3}, check::three_threads);
    run({.batch = batch, .in = 513, .out = 299, .bits = 5}, check::three_threads);
  }
}

TAUT_TEST(lookup_matmul_is_dispatched) {
  check::dispatch(taut::kLookupVariants);
#if defined(__x86_64__)
  using namespace taut;
  const auto chosen = [](uint32_t flags) { return std::string(choose(kLookupVariants, flags).name); };
  CHECK(chosen(kAny) == "portable", "no features");
  CHECK(chosen(kAvx2) == "avx2", "AVX2");
  CHECK(chosen(kAvx2 | kAvx512 | kVnni) == "avx512", "AVX-512");
#endif
}
