// The algorithms of hashed_matmul, of its weight and of the buckets' gradient. The weight is a
// Decoder for decode/matmul.h. Included after one of lanes/*.h.
#pragma once

#include "decode/matmul.h"
#include "hashed/hashed.h"

namespace {

constexpr uint32_t kOwn = 0x80000000u;  // the bits of single weights are hashed from here on

inline I16 first_round(I16 v) {
  v = (v ^ (v >> 16)) * I16::all(0x7feb352d);
  return v ^ (v >> 15);
}

inline I16 second_round(I16 v) {
  v = v * I16::all(0x846ca68b);
  return v ^ (v >> 16);
}

inline I16 mix(I16 v) { return second_round(first_round(v)); }

// What the hash says of each row and each block of 128 columns.
template <int Run>
struct Hash {
  static constexpr int kSpan = Run == 1 ? 16 : Run;
  static constexpr int kStarts = kBlock / kSpan;

  const uint32_t* keys;  // two for each row
  int64_t stride;        // from the first keys to the second
  uint32_t count;

  // Asks for this thread's second piece of scratch memory.
  explicit Hash(const taut::Hashed& op) : stride((op.out + 15) / 16 * 16), count(op.count) {
    auto* to = static_cast<uint32_t*>(taut::scratch<1>(size_t(2 * stride) * sizeof(uint32_t)));
    const I16 one = mix(I16::all(op.seed)), other = mix(I16::all(op.seed ^ 0x9e3779b9u));
    for (int64_t o = 0; o < op.out; o += 16) {
      const I16 row = I16::count_from(uint32_t(o));
      mix(row + one).store(to + o);
      mix(row ^ other).store(to + stride + o);
    }
    keys = to;
  }

  struct Row {
    uint32_t first, second;
    I16 hash(uint32_t from) const {
      const I16 v = first_round(I16::count_from(from + first));
      return second_round(v + I16::all(second));
    }
  };

  Row row(int64_t o) const { return {keys[o], keys[stride + o]}; }

  struct Block {
    alignas(64) uint32_t start[kStarts <= 16 ? 16 : kStarts];
    I16 bits;
    I16 minus(int s) const { return bits << (28 - 4 * s); }  // these have it as the top bit
    I16 place_32(int s) const { return bits << (29 - 4 * s); }
    I16 place_16(int s) const { return bits << (30 - 4 * s); }
  };

  void block(const Row& r, int64_t b, Block& to) const {
    for (int i = 0; i < kStarts; i += 16) {
      const I16 h = r.hash(uint32_t(b * kStarts + i));
      high_product(h, I16::all(count)).store(to.start + i);
    }
    to.bits = r.hash(uint32_t(kOwn + 16 * b));
  }
};

template <int Run>
struct HashDecoder : Hash<Run> {
  using typename Hash<Run>::Row;
  using typename Hash<Run>::Block;

  const float* buckets;

  explicit HashDecoder(const taut::Hashed& op) : Hash<Run>(op), buckets(op.buckets) {}

  void block(const Row& r, int64_t b, F16 (&w)[kStrips]) const {
    Block k;
    Hash<Run>::block(r, b, k);
#pragma GCC unroll 8
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (Run == 1) {
        const float* p = buckets + k.start[s];
        const F16 low = select_by_top(k.place_16(s), F16::load(p + 16), F16::load(p));
        const F16 high = select_by_top(k.place_16(s), F16::load(p + 48), F16::load(p + 32));
        w[s] = select_by_top(k.place_32(s), high, low);
      } else if constexpr (Run == 4) {
        const uint32_t* q = k.start + 4 * s;
        w[s] = load_quarters(
            {buckets + q[0], buckets + q[1], buckets + q[2], buckets + q[3]});
      } else {
        w[s] = F16::load(buckets + k.start[16 * s / Run] + 16 * s % Run);
      }
      w[s] = flip_signs(w[s], k.minus(s));
    }
  }
};

template <class Use>
void with_run(int run, Use&& use) {
  if (run == 1) return use.template operator()<1>();
  if (run == 4) return use.template operator()<4>();
  if (run == 16) return use.template operator()<16>();
  return use.template operator()<64>();
}

void hashed_matmul(const taut::Hashed& op, const taut::HashedProduct& p,
                   const taut::Parallel& parallel) {
  const Product product{p.x, p.y, p.batch, op.in, op.out, op.in, op.out};
  with_run(op.run, [&]<int Run>() { decoded_matmul(HashDecoder<Run>(op), product, parallel); });
}

void hashed_weight(const taut::Hashed& op, float* weight, const taut::Parallel& parallel) {
  with_run(op.run, [&]<int Run>() {
    const HashDecoder<Run> decoder(op);
    parallel(op.out, 1 + 32768 / (op.in + 1), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        const auto row = decoder.row(o);
        for (int64_t k = 0; k < op.in; k += kBlock) {
          F16 w[kStrips];
          decoder.block(row, k / kBlock, w);
          for (int s = 0; s < kStrips; ++s) {
            const int64_t column = k + 16 * s;
            w[s].store_some(weight + o * op.in + column, op.in - column);
          }
        }
      }
    });
  });
}

// sums[start + place] += ± gradient, for one block of columns of which `columns` are there.
template <int Run>
void scatter(const typename Hash<Run>::Block& k, const float* gradient, int64_t columns,
             float* sums) {
  for (int s = 0; s < kStrips && 16 * s < columns; ++s) {
    const F16 g = flip_signs(F16::load_some(gradient + 16 * s, columns - 16 * s), k.minus(s));
    const auto add = [](float* to, F16 more) { (F16::load(to) + more).store(to); };
    if constexpr (Run == 1) {
      float* to = sums + k.start[s];
      const F16 low = select_by_top(k.place_32(s), F16::zero(), g);
      const F16 high = select_by_top(k.place_32(s), g, F16::zero());
      add(to, select_by_top(k.place_16(s), F16::zero(), low));
      add(to + 16, select_by_top(k.place_16(s), low, F16::zero()));
      add(to + 32, select_by_top(k.place_16(s), F16::zero(), high));
      add(to + 48, select_by_top(k.place_16(s), high, F16::zero()));
    } else if constexpr (Run == 4) {
      float each[16];
      g.store(each);
      for (int i = 0; i < 16; ++i) sums[k.start[4 * s + i / 4] + i % 4] += each[i];
    } else {
      add(sums + k.start[16 * s / Run] + 16 * s % Run, g);
    }
  }
}

template <int Run>
void gradient_of_rows(const Hash<Run>& hash, const taut::Hashed& op, const float* gradient,
                      int64_t begin, int64_t end, float* sums) {
  for (int64_t i = 0; i < op.count + taut::kHashReach; ++i) sums[i] = 0;
  for (int64_t o = begin; o < end; ++o) {
    const auto row = hash.row(o);
    for (int64_t k = 0; k < op.in; k += kBlock) {
      typename Hash<Run>::Block block;
      hash.block(row, k / kBlock, block);
      scatter<Run>(block, gradient + o * op.in + k, op.in - k, sums);
    }
  }
  for (int64_t i = 0; i < taut::kHashReach; ++i) sums[i % op.count] += sums[op.count + i];
}

void hashed_gradient(const taut::Hashed& op, const taut::HashedGradient& g,
                     const taut::Parallel& parallel) {
  const int64_t parts = taut::hashed_parts(op), size = op.count + taut::kHashReach;
  with_run(op.run, [&]<int Run>() {
    const Hash<Run> hash(op);
    parallel(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        gradient_of_rows(hash, op, g.weight, op.out * i / parts, op.out * (i + 1) / parts,
                         g.work + i * size);
      }
    });
  });
  parallel(op.count, 32768 / parts, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float sum = 0;
      for (int64_t i = 0; i < parts; ++i) sum += g.work[i * size + k];
      g.buckets[k] = sum;
    }
  });
}

}  // namespace
