// hashed_matmul, its weight and its gradient: every variant against the hash written out, number by
// number. Buckets are small integers, so the floats are exact in whatever order they are added.
#include "hashed/hashed.h"

#include "check.h"

namespace {

uint32_t mixed(uint32_t v, uint32_t between = 0) {
  v = (v ^ v >> 16) * 0x7feb352du;
  v = ((v ^ v >> 15) + between) * 0x846ca68bu;
  return v ^ v >> 16;
}

struct Drawn {
  int64_t bucket;
  float sign;
};

// What hashed.h says of one weight.
Drawn drawn(uint32_t seed, int64_t count, int run, int64_t o, int64_t i) {
  const auto row = uint32_t(o);
  const uint32_t first = mixed(row + mixed(seed)), second = mixed(row ^ mixed(seed ^ 0x9e3779b9u));
  const auto hash = [&](int64_t c) { return mixed(uint32_t(c) + first, second); };
  const uint32_t start = hash(i / (run == 1 ? 16 : run));
  const uint32_t bits = hash(0x80000000 + 16 * (i / 128) + i % 16) >> (4 * (i / 16 % 8));
  const int64_t place = run == 1 ? i % 16 + 16 * (bits >> 1 & 3) : i % run;
  const int64_t from = int64_t(uint64_t(start) * uint64_t(count) >> 32);
  return {(from + place) % count, bits >> 3 & 1 ? -1.0f : 1.0f};
}

struct Case {
  int64_t count, out, in, batch;
  int run;
  uint32_t seed = 7;
  int64_t skew = 0;
};

void run(const Case& c, const taut::Parallel& parallel) {
  check::Random random;
  check::Exact<float> buckets(c.count + taut::kHashReach, c.skew);
  check::Exact<float> x(c.batch * c.in, c.skew), gradient(c.out * c.in, c.skew);
  for (int64_t i = 0; i < buckets.size(); ++i) {
    buckets[i] = i < c.count ? float(random.between(-50, 50)) : buckets[i - c.count];
  }
  for (int64_t i = 0; i < x.size(); ++i) x[i] = float(random.between(-8, 8));
  for (int64_t i = 0; i < gradient.size(); ++i) gradient[i] = float(random.between(-8, 8));

  std::vector<float> weight, y, sums(size_t(c.count), 0.0f);
  for (int64_t o = 0; o < c.out; ++o) {
    for (int64_t i = 0; i < c.in; ++i) {
      const Drawn d = drawn(c.seed, c.count, c.run, o, i);
      weight.push_back(d.sign * buckets[d.bucket]);
      sums[size_t(d.bucket)] += d.sign * gradient[o * c.in + i];
    }
  }
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      float sum = 0;
      for (int64_t i = 0; i < c.in; ++i) sum += x[n * c.in + i] * weight[size_t(o * c.in + i)];
      y.push_back(sum);
    }
  }
  const taut::Hashed op{.buckets = buckets.data(), .count = c.count, .out = c.out, .in = c.in,
                        .seed = c.seed, .run = c.run};
  taut::Hashed without = op;
  without.buckets = nullptr;
  check::each_variant(taut::kHashedVariants, [&](const char* name, const taut::HashedOps& ops) {
    const auto expect = [&](const char* what, check::Exact<float>& found,
                            const std::vector<float>& wanted) {
      int64_t wrong = 0;
      for (int64_t i = 0; i < found.size(); ++i) wrong += !(found[i] == wanted[size_t(i)]);
      CHECK(wrong == 0,
            "%s, %s: %lld of %lld wrong; %lld buckets, out %lld, in %lld, batch %lld, run %d", what,
            name, (long long)wrong, (long long)found.size(), (long long)c.count, (long long)c.out,
            (long long)c.in, (long long)c.batch, c.run);
    };
    check::Exact<float> product(c.batch * c.out, c.skew), dense(c.out * c.in, c.skew);
    check::Exact<float> given(c.count, c.skew);
    check::Exact<float> work(taut::hashed_parts(op) * (c.count + taut::kHashReach));
    ops.matmul(op, {.x = x.data(), .y = product.data(), .batch = c.batch}, parallel);
    expect("matmul", product, y);
    ops.weight(op, dense.data(), parallel);
    expect("weight", dense, weight);
    ops.gradient(without, {.weight = gradient.data(), .buckets = given.data(), .work = work.data()},
                 parallel);
    expect("gradient", given, sums);
  });
}

constexpr int kRuns[] = {1, 4, 16, 64};

}  // namespace

TAUT_TEST(hashed_never_changes) {
  check::Exact<float> buckets(1000 + taut::kHashReach);
  for (int64_t i = 0; i < buckets.size(); ++i) buckets[i] = float(i % 1000 + 1);
  constexpr int64_t kColumns[] = {0, 1, 15, 16, 64, 127, 128, 132};
  constexpr float kGolden[][8] = {{749, 734, 764, 307, 936, 229, 36, 24},
                                  {701, 702, 795, 888, 344, 838, 565, 988},
                                  {701, 702, 716, 307, 888, 197, 988, 992},
                                  {701, 702, 716, 717, 307, 370, 269, 273}};
  const std::string signs = "011101111111100101110000";
  check::each_variant(taut::kHashedVariants, [&](const char* name, const taut::HashedOps& ops) {
    for (int k = 0; k < 4; ++k) {
      check::Exact<float> weight(2 * 133);
      ops.weight({.buckets = buckets.data(), .count = 1000, .out = 2, .in = 133, .seed = 7,
                  .run = kRuns[k]},
                 weight.data(), taut::serial);
      for (int i = 0; i < 8; ++i) {
        const float w = weight[133 + kColumns[i]], wanted = kGolden[k][i] + 1;
        CHECK(w == wanted || w == -wanted, "%s, run %d, column %lld: %g", name, kRuns[k],
              (long long)kColumns[i], double(w));
      }
      for (size_t i = 0; i < signs.size(); ++i) {
        CHECK((weight[133 + int64_t(i)] < 0) == (signs[i] == '1'), "%s, run %d, sign %zu", name,
              kRuns[k], i);
      }
    }
  });
}

TAUT_TEST(hashed_at_every_width_and_of_every_number_of_buckets) {
  constexpr int64_t kCounts[] = {1, 2, 15, 16, 17, 62, 63, 64, 65, 127, 1000};
  size_t turn = 0;
  for (const int run_length : kRuns) {
    for (int64_t in : {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 385}) {
      for (int64_t batch : {1, 2, 3, 4, 5, 13}) {
        run({.count = kCounts[turn++ % std::size(kCounts)], .out = 6, .in = in, .batch = batch,
             .run = run_length, .seed = uint32_t(0u - turn)},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(hashed_at_every_height) {
  for (const int run_length : kRuns) {
    for (int64_t out : {0, 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 65}) {
      for (int64_t batch : {0, 1, 4, 7, 12}) {
        run({.count = 100, .out = out, .in = 145, .batch = batch, .run = run_length, .skew = 1},
            taut::serial);
      }
    }
  }
}

TAUT_TEST(hashed_of_few_buckets) {
  for (const int run_length : kRuns) {
    for (int64_t count = 1; count <= 70; ++count) {
      run({.count = count, .out = 17, .in = 130, .batch = 1, .run = run_length,
           .seed = uint32_t(count)},
          taut::serial);
    }
  }
}

TAUT_TEST(hashed_on_three_threads) {
  for (const int run_length : kRuns) {
    for (int64_t batch : {1, 40}) {
      run({.count = 3000, .out = 301, .in = 513, .batch = batch, .run = run_length, .skew = 3},
          check::three_threads);
    }
    // Sums of buckets are split too where there are many of them.
    run({.count = 120000, .out = 40, .in = 257, .batch = 1, .run = run_length},
        check::three_threads);
  }
}

TAUT_TEST(hashed_is_dispatched) { check::dispatch(taut::kHashedVariants); }
