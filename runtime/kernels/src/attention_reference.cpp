// Attention in scalar code: for processors without AVX2, and what the other instruction sets are tested against.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"

namespace convllava {
namespace {

// Of LANES partial sums, in the order of the other instruction sets.
float sum_lanes(float (&lanes)[LANES]) {
  for (int64_t width = LANES / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

float dot(const float* query, const int8_t* codes, int64_t head_dim) {
  float lanes[LANES] = {};
  for (int64_t i = 0; i < head_dim; ++i)
    lanes[i % LANES] = std::fma(query[i], static_cast<float>(codes[i]), lanes[i % LANES]);
  return sum_lanes(lanes);
}

float scale_of(const int8_t* row, int64_t head_dim) {
  float scale;
  std::memcpy(&scale, row + head_dim, sizeof scale);
  return scale;
}

// e^x for x near 0 and below, as `exponential` of attention_tile.h.
float exponential(float x) {
  if (x < -87.0f) return 0;
  const float n = std::nearbyint(x * 1.44269504f);
  const float rest = std::fma(-n, -2.12194440e-4f, std::fma(-n, 0.693359375f, x));
  float sum = 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = std::fma(sum, rest, term);
  return std::isnan(n) ? n : std::ldexp(sum, static_cast<int>(n));
}

}  // namespace

void attend_chunk_reference(const ChunkCall& call) {
  const int64_t dims = call.head_dim, bytes = dims + SCALE_BYTES;
  for (int64_t row = 0; row < call.rows; ++row) {
    float weights[CHUNK], total[LANES] = {}, maximum = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < call.limits[row]; ++j) {
      weights[j] = dot(call.queries + row * dims, call.keys + j * bytes, dims);
      const float score = weights[j] * scale_of(call.keys + j * bytes, dims);
      maximum = score > maximum ? score : maximum;
    }
    for (int64_t j = 0; j < call.limits[row]; ++j) {
      const float weight = exponential(std::fma(weights[j], scale_of(call.keys + j * bytes, dims), -maximum));
      total[j % LANES] += weight;
      weights[j] = weight * scale_of(call.values + j * bytes, dims);
    }
    call.maxima[row] = maximum;
    call.totals[row] = sum_lanes(total);
    float* sums = call.sums + row * dims;
    std::fill_n(sums, dims, 0.0f);
    for (int64_t j = 0; j < call.limits[row]; ++j)
      for (int64_t i = 0; i < dims; ++i)
        sums[i] = std::fma(weights[j], static_cast<float>(call.values[j * bytes + i]), sums[i]);
  }
}

}  // namespace convllava
