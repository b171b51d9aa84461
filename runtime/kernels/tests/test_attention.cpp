// Tests of attention over an int8 KV cache without ONNX Runtime: the scalar reference against double precision, and
// every instruction set that this processor has against the reference, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "check.h"

using namespace convllava;

namespace {

std::vector<float> random_floats(int64_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> x(count);
  for (float& value : x) value = normal(random_bits);
  return x;
}

// A model's attention, and sequences with their caches.
struct Layer {
  int64_t heads, kv_heads, head_dim, positions, batch;
  std::vector<float> cosines, sines;
  std::vector<int8_t> keys, values;
  std::vector<int32_t> last;

  Layer(int64_t group, int64_t kv_heads, int64_t head_dim, int64_t positions, int64_t batch)
      : heads(group * kv_heads),
        kv_heads(kv_heads),
        head_dim(head_dim),
        positions(positions),
        batch(batch),
        keys(batch * kv_heads * positions * (head_dim + SCALE_BYTES)),
        values(keys.size()),
        last(batch, -1) {
    for (int64_t i = 0; i < positions * head_dim / 2; ++i) {
      const double angle = i / (head_dim / 2) * std::pow(1e4, -2.0 * (i % (head_dim / 2)) / head_dim);
      cosines.push_back(static_cast<float>(std::cos(angle)));
      sines.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t cache_bytes() const { return kv_heads * positions * (head_dim + SCALE_BYTES); }

  // One call for all sequences, or for one of them. split: chunks are tasks.
  std::vector<float> run(const KernelSet& kernels, const std::vector<float>& qkv, int64_t sequence, bool split = false,
                         int64_t only = -1) {
    const int64_t first = std::max<int64_t>(only, 0), count = only < 0 ? batch : 1;
    for (int64_t i = first; i < first + count; ++i) last[i] += static_cast<int32_t>(sequence);
    std::vector<float> y(count * sequence * heads * head_dim), partials;
    int8_t *k = keys.data() + first * cache_bytes(), *v = values.data() + first * cache_bytes();
    const int64_t longest = *std::max_element(&last[first], &last[first] + count) + 1;
    AttentionCall call{count,        sequence,     heads,    kv_heads, head_dim, qkv.data(), cosines.data(),
                       sines.data(), &last[first], k,        v,        k,        v,          positions,
                       positions,    longest,      y.data(), nullptr};
    if (split) {
      partials.resize(call.partial_floats());
      call.partials = partials.data();
    }
    for (int64_t pair = 0; pair < call.pairs(); ++pair) append(call, pair);
    for (int64_t task = call.tasks(); task-- > 0;) attend(call, attend_chunk_of(kernels), task);
    for (int64_t pair = 0; split && pair < call.pairs(); ++pair) merge_partials(call, pair);
    return y;
  }

  // An element of a cached row.
  double cached(const std::vector<int8_t>& cache, int64_t pair, int64_t position, int64_t i) const {
    const int8_t* row = cache.data() + (pair * positions + position) * (head_dim + SCALE_BYTES);
    float scale;
    std::memcpy(&scale, row + head_dim, sizeof scale);
    return static_cast<double>(scale) * row[i];
  }

  double rotated(const float* x, int64_t position, int64_t i) const {
    const int64_t half = head_dim / 2, at = position * half + i % half;
    const double other = i < half ? -x[half + i] : x[i - half];
    return static_cast<double>(x[i]) * cosines[at] + other * sines[at];
  }

  // The element `i` of a query's result over the cache as it is.
  std::vector<double> expected(int64_t sequence, int64_t head, const float* query, int64_t position) const {
    const int64_t pair = sequence * kv_heads + head / (heads / kv_heads);
    std::vector<double> weights, y(head_dim);
    double largest = -1e300, total = 0;
    for (int64_t j = 0; j <= position; ++j) {
      double score = 0;
      for (int64_t i = 0; i < head_dim; ++i) score += rotated(query, position, i) * cached(keys, pair, j, i);
      weights.push_back(score / std::sqrt(static_cast<double>(head_dim)));
      largest = std::max(largest, weights.back());
    }
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (int64_t j = 0; j <= position; ++j)
      for (int64_t i = 0; i < head_dim; ++i) y[i] += weights[j] / total * cached(values, pair, j, i);
    return y;
  }
};

Layer random_layer(int64_t positions, int64_t batch) {
  const int64_t dims[] = {16, 32, 64, 80, 96, 128, 256};
  return Layer(uniform(1, 5), uniform(1, 2), dims[uniform(0, 6)], positions, batch);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

void test_cached_rows_are_what_was_given() {
  for (int trial = 0; trial < 20; ++trial) {
    Layer layer = random_layer(40, 1);
    const int64_t count = uniform(1, 40), dims = layer.head_dim;
    const std::vector<float> qkv = random_floats(count * layer.width(), std::ldexp(1.0f, uniform(-60, 60)));
    layer.run(REFERENCE, qkv, count);
    for (int64_t position = 0; position < count; ++position) {
      for (int64_t head = 0; head < layer.kv_heads; ++head) {
        const float* key = qkv.data() + position * layer.width() + (layer.heads + head) * dims;
        const float* value = key + layer.kv_heads * dims;
        for (bool is_key : {true, false}) {
          double largest = 0, error = 0;
          for (int64_t i = 0; i < dims; ++i) {
            const double exact = is_key ? layer.rotated(key, position, i) : value[i];
            largest = std::max(largest, std::fabs(exact));
            const double found = layer.cached(is_key ? layer.keys : layer.values, head, position, i);
            error = std::max(error, std::fabs(found - exact));
          }
          EXPECT(error <= largest / 254 * 1.001);
        }
      }
    }
  }
}

void test_reference_is_double_precisions() {
  for (int trial = 0; trial < 8; ++trial) {
    Layer layer = random_layer(400, 2);
    const int64_t dims = layer.head_dim;
    for (int64_t count : {uniform(200, 390), 1L, uniform(1, 8)}) {
      const std::vector<float> qkv = random_floats(2 * count * layer.width(), 2);
      const std::vector<float> y = layer.run(REFERENCE, qkv, count);
      for (int at = 0; at < 12; ++at) {
        const int64_t sequence = uniform(0, 1), row = uniform(0, count - 1), head = uniform(0, layer.heads - 1);
        const float* query = qkv.data() + (sequence * count + row) * layer.width() + head * dims;
        const std::vector<double> expected =
            layer.expected(sequence, head, query, layer.last[sequence] + 1 - count + row);
        double error = 0, size = 0;
        for (int64_t i = 0; i < dims; ++i) {
          error += std::pow(y[((sequence * count + row) * layer.heads + head) * dims + i] - expected[i], 2);
          size += std::pow(expected[i], 2);
        }
        EXPECT(std::sqrt(error / size) < 2e-5);
      }
    }
  }
}

void test_results_depend_on_nothing_else() {
  const KernelSets supported = supported_kernels();
  for (int trial = 0; trial < 10; ++trial) {
    const Layer empty = random_layer(300, 1);
    const int64_t first = trial % 2 ? uniform(1, 40) : uniform(236, 256), more = uniform(1, 30), width = empty.width();
    const std::vector<float> qkv = random_floats((first + more) * width, 2);
    const std::vector<float> beginning(qkv.begin(), qkv.begin() + first * width);
    const std::vector<float> end(qkv.begin() + first * width, qkv.end());
    Layer layer = empty;
    const std::vector<float> expected = layer.run(REFERENCE, qkv, first + more);
    const int64_t row = empty.heads * empty.head_dim;
    for (int i = 0; i < supported.count; ++i) {
      const KernelSet& kernels = *supported.sets[i];
      Layer same = empty;
      EXPECT(same_bits(same.run(kernels, qkv, first + more), expected));
      EXPECT(same.keys == layer.keys && same.values == layer.values);

      Layer parts = empty;  // in two calls, and position by position
      parts.run(kernels, beginning, first);
      Layer steps = parts;
      const std::vector<float> rest(expected.begin() + first * row, expected.end());
      EXPECT(same_bits(parts.run(kernels, end, more), rest));
      for (int64_t step = 0; step < more; ++step) {
        const std::vector<float> one(end.begin() + step * width, end.begin() + (step + 1) * width);
        const bool split = step % 2;
        EXPECT(same_bits(steps.run(kernels, one, 1, split),
                         std::vector<float>(rest.begin() + step * row, rest.begin() + (step + 1) * row)));
      }
    }
  }
}

void test_sequences_do_not_depend_on_each_other() {
  const KernelSets supported = supported_kernels();
  for (int trial = 0; trial < 8; ++trial) {
    Layer together = random_layer(530, 3);
    for (int64_t sequence = 0; sequence < 3; ++sequence) {
      const int64_t count = sequence ? uniform(1, 300) : 520;
      for (int64_t begin = 0, size; begin < count; begin += size) {  // most queries are of no interest
        size = std::min<int64_t>(count - begin, 260);
        together.run(*supported.sets[0], random_floats(size * together.width()), size, false, sequence);
      }
    }
    const std::vector<float> qkv = random_floats(3 * together.width());
    for (int i = 0; i < supported.count; ++i) {
      Layer whole = together, split = together, alone = together;
      const std::vector<float> y = whole.run(*supported.sets[i], qkv, 1);
      EXPECT(same_bits(y, split.run(*supported.sets[i], qkv, 1, true)));
      EXPECT(whole.keys == split.keys && whole.values == split.values);
      for (int64_t sequence = 0; sequence < 3; ++sequence) {
        const auto part = [&](const std::vector<float>& of, int64_t width) {
          return std::vector<float>(of.begin() + sequence * width, of.begin() + (sequence + 1) * width);
        };
        const std::vector<float> found =
            alone.run(*supported.sets[i], part(qkv, together.width()), 1, trial % 2, sequence);
        EXPECT(same_bits(found, part(y, together.heads * together.head_dim)));
      }
    }
  }
}

void test_a_cache_that_is_not_shared_is_copied() {
  Layer layer(2, 2, 32, 50, 2);
  layer.run(REFERENCE, random_floats(2 * 20 * layer.width()), 20);
  Layer shared = layer;
  const std::vector<float> qkv = random_floats(2 * 3 * layer.width());
  const std::vector<float> expected = shared.run(REFERENCE, qkv, 3);
  const int64_t bytes = 32 + SCALE_BYTES;
  std::vector<int8_t> keys(2 * 2 * 23 * bytes), values(keys.size());
  std::vector<float> y(expected.size());
  const std::vector<int32_t> last(2, 22);
  const AttentionCall call{2,
                           3,
                           4,
                           2,
                           32,
                           qkv.data(),
                           layer.cosines.data(),
                           layer.sines.data(),
                           last.data(),
                           layer.keys.data(),
                           layer.values.data(),
                           keys.data(),
                           values.data(),
                           50,
                           23,
                           23,
                           y.data(),
                           nullptr};
  for (int64_t pair = 0; pair < call.pairs(); ++pair) append(call, pair);
  for (int64_t task = 0; task < call.tasks(); ++task) attend(call, attend_chunk_reference, task);
  EXPECT(same_bits(y, expected));
  for (int64_t pair = 0; pair < 4; ++pair) {
    EXPECT(
        std::equal(&keys[pair * 23 * bytes], &keys[pair * 23 * bytes] + 23 * bytes, &shared.keys[pair * 50 * bytes]));
    EXPECT(std::equal(&values[pair * 23 * bytes], &values[pair * 23 * bytes] + 23 * bytes,
                      &shared.values[pair * 50 * bytes]));
  }
}

void test_what_is_not_finite_stays_so() {
  const float infinity = std::numeric_limits<float>::infinity();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) {
    for (float value : {std::nanf(""), infinity, -infinity}) {
      for (int64_t part : {0, 1, 2}) {  // a query, key or value of position 300 of 310
        Layer layer(1, 1, 32, 400, 1), untouched = layer;
        std::vector<float> qkv = random_floats(310 * 96);
        const std::vector<float> expected = untouched.run(*supported.sets[i], qkv, 310);
        qkv[300 * 96 + part * 32 + 5] = value;
        const std::vector<float> y = layer.run(*supported.sets[i], qkv, 310);
        EXPECT(!std::memcmp(y.data(), expected.data(), 300 * 32 * sizeof(float)));
        for (int64_t at = 300; at < 310; ++at) {
          const bool is_hit = part || at == 300;
          for (int64_t d = 0; d < 32; ++d) EXPECT(std::isfinite(y[at * 32 + d]) != is_hit);
        }
        std::vector<float> step = random_floats(96);  // in another chunk than the one of the step
        if (part) {
          for (float found : layer.run(*supported.sets[i], step, 1, true)) EXPECT(!std::isfinite(found));
        }
      }
    }
  }
}

void test_large_and_small_scores() {
  const KernelSets supported = supported_kernels();
  for (float scale : {0.0f, 1e-20f, 1e-3f, 30.0f, 1e4f}) {
    Layer empty(3, 1, 64, 300, 1);
    const std::vector<float> qkv = random_floats(290 * empty.width(), scale);
    Layer layer = empty;
    const std::vector<float> expected = layer.run(REFERENCE, qkv, 290);
    for (float y : expected) EXPECT(std::fabs(y) <= 6 * scale);
    for (int i = 0; i < supported.count; ++i) {
      Layer same = empty;
      EXPECT(same_bits(same.run(*supported.sets[i], qkv, 290), expected));
    }
  }
}

}  // namespace

int main() {
  test_cached_rows_are_what_was_given();
  test_reference_is_double_precisions();
  test_results_depend_on_nothing_else();
  test_sequences_do_not_depend_on_each_other();
  test_a_cache_that_is_not_shared_is_copied();
  test_what_is_not_finite_stays_so();
  test_large_and_small_scores();
  std::printf(failures ? "attention FAILED: %d\n" : "attention passed\n", failures);
  return failures != 0;
}
