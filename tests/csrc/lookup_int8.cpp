// lookup_matmul_int8: every variant gives the sum written out, to the bit.
#include "lookup_int8/lookup_int8.h"

#include "check.h"
#include "lookup_codes.h"

namespace {

struct Case {
  int64_t batch, in, out;
  int bits;
  bool of_row = false;   // a table for each row
  bool extreme = false;  // nothing but -128 and 127
  int slope = 0;         // of a table whose entries are evenly spaced
  int64_t skew = 0;
};

int8_t byte(check::Random& random, const Case& c) {
  if (c.extreme) return random.between(0, 3) ? -128 : 127;
  return int8_t(random.between(-128, 127));
}

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  const int64_t entries = 1 << c.bits, stride = c.of_row ? entries : 0;
  check::Indices indices(random, c.in, c.out, c.bits);
  check::Exact<int8_t> x(c.batch * c.in, c.skew), table((c.of_row ? c.out : 1) * entries, c.skew);
  check::Exact<float> scale(c.out);
  for (int64_t i = 0; i < x.size(); ++i) x[i] = byte(random, c);
  for (int64_t i = 0; i < table.size(); ++i) {
    const int first = c.slope < 0 ? 127 : -128;
    table[i] = c.slope == 0 ? byte(random, c) : int8_t(first + c.slope * int(i % entries));
  }
  for (int64_t i = 0; i < scale.size(); ++i) scale[i] = float(random.between(1, 1000)) / 7;

  std::vector<float> wanted;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      int64_t sum = 0;
      for (int64_t k = 0; k < c.in; ++k) {
        sum += x[n * c.in + k] * table[o * stride + indices.at(o, k)];
      }
      wanted.push_back(float(sum) * scale[o]);
    }
  }
  const auto each = [&](const char* name, taut::LookupMatmulInt8 kernel) {
    check::Exact<float> y(c.batch * c.out);
    kernel({.x = x.data(), .codes = indices.codes.data(), .table = table.data(),
            .scale = scale.data(), .y = y.data(), .batch = c.batch, .in = c.in, .out = c.out,
            .words = indices.words, .table_stride = stride, .bits = c.bits},
           parallel);
    int64_t wrong = 0;
    for (int64_t i = 0; i < y.size(); ++i) wrong += !(y[i] == wanted[size_t(i)]);
    CHECK(wrong == 0, "%s: %lld of %lld wrong; batch %lld, in %lld, out %lld, %d bits", name,
          (long long)wrong, (long long)y.size(), (long long)c.batch, (long long)c.in,
          (long long)c.out, c.bits);
  };
  check::each_variant(taut::kLookupInt8Variants, each);
}

}  // namespace

TAUT_TEST(lookup_matmul_int8_at_every_width) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t in : {0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 385}) {
      for (int64_t batch : {1, 5}) {
        run({.batch = batch, .in = in, .out = 5, .bits = bits}, taut::serial);
        run({.batch = batch, .in = in, .out = 5, .bits = bits, .of_row = true}, taut::serial);
      }
    }
  }
}

TAUT_TEST(lookup_matmul_int8_at_every_height) {
  for (int64_t out : {0, 1, 2, 3, 4, 5, 7, 8, 9, 33}) {
    for (int64_t batch : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      run({.batch = batch, .in = 145, .out = out, .bits = 4, .skew = 3}, taut::serial);
    }
  }
}

TAUT_TEST(lookup_matmul_int8_does_not_overflow) {
  for (int bits : {1, 4, 8}) {
    for (int64_t batch : {1, 5}) {
      run({.batch = batch, .in = taut::kLookupInt8Columns, .out = 5, .bits = bits, .extreme = true},
          taut::serial);
    }
  }
}

TAUT_TEST(lookup_matmul_int8_of_whole_numbers) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int slope : {1, -1, 255 >> bits}) {
      for (int64_t batch : {1, 2, 5}) {
        run({.batch = batch, .in = 300, .out = 9, .bits = bits, .slope = slope}, taut::serial);
      }
      run({.batch = 1, .in = taut::kLookupInt8Columns, .out = 5, .bits = bits, .extreme = true,
           .slope = slope},
          taut::serial);
    }
  }
}

TAUT_TEST(lookup_matmul_int8_on_three_threads) {
  for (int64_t batch : {1, 4, 40}) {
    run({.batch = batch, .in = 2049, .out = 301, .bits = 4}, check::three_threads);
    run({.batch = batch, .in = 2049, .out = 300, .bits = 5, .of_row = true}, check::three_threads);
  }
}

TAUT_TEST(lookup_matmul_int8_is_dispatched) {
  check::dispatch(taut::kLookupInt8Variants);
#if defined(__x86_64__)
  using namespace taut;
  const auto chosen = [](uint32_t flags) {
    return std::string(choose(kLookupInt8Variants, flags).name);
  };
  CHECK(chosen(kAvx2 | kVnni) == "avx2", "VNNI alone");
  CHECK(chosen(kAvx2 | kAvx512 | kVpopcntdq) == "avx512", "AVX-512 without VNNI");
  CHECK(chosen(kAvx2 | kAvx512 | kVnni) == "avx512_vnni", "AVX-512 with VNNI");
#endif
}
