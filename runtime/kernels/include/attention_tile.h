// Attention to a chunk of positions for an instruction set, which its translation unit describes:
//
//   Lanes::Floats      16 floats
//   Lanes::PAIRS       of queries and positions whose sums fit the registers
//   Lanes::sum_lanes   the sum of each of PAIRS vectors
//
// Included where a unit's instruction set is in force, hence the unnamed namespace. Products that are added are written
// as `fma`: a compiler that contracts others would round otherwise than the reference.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention.h"
#include "lanes_avx2.h"

namespace convllava {
namespace {

constexpr int64_t CACHE_LINE = 64;

// Fetches bytes into the second level's cache. They may lie behind the last row: a prefetch does not fault.
CONVLLAVA_INLINE void fetch(const int8_t* from, int64_t offset, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) + offset;
  for (uintptr_t line = begin; line < begin + bytes; line += CACHE_LINE)
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
}

// The scales of `count` cached rows.
CONVLLAVA_INLINE void load_scales(const int8_t* rows, int64_t count, int64_t head_dim, float* out) {
  for (int64_t j = 0; j < count; ++j)
    std::memcpy(out + j, rows + j * (head_dim + SCALE_BYTES) + head_dim, sizeof(float));
}

// e^x for x near 0 and below, relative error 2e-7; 0 below -87. As `exponential` of gemm_tile.h.
template <class Lanes>
CONVLLAVA_INLINE typename Lanes::Floats exponential(typename Lanes::Floats x) {
  const auto n = Lanes::round(Lanes::multiply(x, Lanes::broadcast(1.44269504f)));
  const auto rest = Lanes::minus_product(Lanes::minus_product(x, n, Lanes::broadcast(0.693359375f)), n,
                                         Lanes::broadcast(-2.12194440e-4f));
  auto sum = Lanes::broadcast(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = Lanes::fma(sum, rest, Lanes::broadcast(term));
  return Lanes::zero_below(x, -87.0f, Lanes::times_power(sum, n));
}

// dots[m * CHUNK + j] = codes of key j * query m, for ROWS of them from `row` on and all positions. The first ones
// fetch the values.
template <class Lanes, int ROWS>
CONVLLAVA_INLINE void dot_keys(const ChunkCall& call, int64_t row, float* dots) {
  constexpr int COUNT = Lanes::PAIRS / ROWS;
  const int64_t dims = call.head_dim, bytes = dims + SCALE_BYTES;
  const float* queries = call.queries + row * dims;
  for (int64_t j = 0; j < call.count; j += COUNT) {
    if (row == 0) fetch(call.values, j * bytes, COUNT * bytes);
    const int8_t* keys[COUNT];  // the last one once more behind it; CHUNK has room for the results
    for (int i = 0; i < COUNT; ++i) keys[i] = call.keys + std::min(j + i, call.count - 1) * bytes;
    typename Lanes::Floats sums[Lanes::PAIRS];
#pragma GCC unroll 16
    for (int pair = 0; pair < Lanes::PAIRS; ++pair) sums[pair] = Lanes::broadcast(0.0f);
    for (int64_t d = 0; d < dims; d += LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i) {
        const auto codes = Lanes::load_codes(keys[i] + d);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m)
          sums[m * COUNT + i] = Lanes::fma(Lanes::load(queries + m * dims + d), codes, sums[m * COUNT + i]);
      }
    }
    float found[Lanes::PAIRS];
    Lanes::sum_lanes(sums, found);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) std::memcpy(dots + m * CHUNK + j, found + m * COUNT, COUNT * sizeof(float));
  }
}

template <class Reduce>
CONVLLAVA_INLINE float reduce_lanes(float (&lanes)[LANES], const Reduce& reduce) {
  for (int64_t width = LANES / 2; width; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] = reduce(lanes[i], lanes[i + width]);
  return lanes[0];
}

// Turns a query's dot products into the weights of its values' codes, 0 for positions that it does not see.
template <class Lanes>
CONVLLAVA_INLINE void weigh(const ChunkCall& call, int64_t row, const float* key_scales, const float* value_scales,
                            float* dots) {
  const auto lowest = Lanes::broadcast(-std::numeric_limits<float>::infinity());
  const int64_t limit = std::max<int64_t>(call.limits[row], 0);
  auto largest = lowest, total = Lanes::broadcast(0.0f);
  for (int64_t j = 0; j < limit; j += LANES) {
    const auto scores = Lanes::multiply(Lanes::load(dots + j), Lanes::load(key_scales + j));
    largest = Lanes::max(Lanes::first(limit - j, scores, lowest), largest);
  }
  alignas(64) float lanes[LANES];
  Lanes::store(lanes, largest);
  const float maximum = reduce_lanes(lanes, [](float a, float b) { return a > b ? a : b; });
  const auto minus = Lanes::broadcast(-maximum), zero = Lanes::broadcast(0.0f);
  for (int64_t j = 0; j < limit; j += LANES) {
    const auto found = exponential<Lanes>(Lanes::fma(Lanes::load(dots + j), Lanes::load(key_scales + j), minus));
    const auto weights = Lanes::first(limit - j, found, zero);
    total = Lanes::add(total, weights);
    const auto scaled = Lanes::multiply(weights, Lanes::load(value_scales + j));
    Lanes::store(dots + j, Lanes::first(limit - j, scaled, zero));
  }
  for (int64_t j = (limit + LANES - 1) / LANES * LANES; j < call.count; j += LANES) Lanes::store(dots + j, zero);
  Lanes::store(lanes, total);
  call.maxima[row] = maximum;
  call.totals[row] = reduce_lanes(lanes, [](float a, float b) { return a + b; });
}

// Sums of weights * codes of values for ROWS queries from `row` on, in VECTORS * LANES elements from `first` on, then
// in half as many and so on. The first ones fetch the keys behind those of the chunk.
template <class Lanes, int ROWS, int VECTORS>
CONVLLAVA_INLINE void add_values(const ChunkCall& call, int64_t row, const float* weights, int64_t first) {
  const int64_t dims = call.head_dim, bytes = dims + SCALE_BYTES;
  for (; first + VECTORS * LANES <= dims; first += VECTORS * LANES) {
    typename Lanes::Floats y[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) y[m][v] = Lanes::broadcast(0.0f);
    const int8_t* values = call.values + first;
    for (int64_t j = 0; j < call.count; ++j, values += bytes) {
      if (row == 0 && first == 0) fetch(call.keys, (call.count + j) * bytes, bytes);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const auto codes = Lanes::load_codes(values + v * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) y[m][v] = Lanes::fma(Lanes::broadcast(weights[m * CHUNK + j]), codes, y[m][v]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) Lanes::store(call.sums + (row + m) * dims + first + v * LANES, y[m][v]);
  }
  if constexpr (VECTORS > 1) add_values<Lanes, ROWS, VECTORS / 2>(call, row, weights, first);
}

// Calls use(first row, its number as a constant) for as many rows as there are, ROWS at a time, then half as many.
template <int ROWS, class Use>
CONVLLAVA_INLINE void for_rows(int64_t rows, int64_t first, const Use& use) {
  for (; first + ROWS <= rows; first += ROWS) use(first, std::integral_constant<int, ROWS>());
  if constexpr (ROWS > 1) for_rows<ROWS / 2>(rows, first, use);
}

template <class Lanes>
CONVLLAVA_INLINE void attend_chunk(const ChunkCall& call) {
  alignas(64) float weights[MAX_TILE_ROWS * CHUNK], scales[2][CHUNK];
  const int64_t dims = call.head_dim;
  for_rows<4>(call.rows, 0, [&](int64_t row, auto rows) { dot_keys<Lanes, rows()>(call, row, weights + row * CHUNK); });
  load_scales(call.keys, call.count, dims, scales[0]);
  load_scales(call.values, call.count, dims, scales[1]);
  for (int64_t row = 0; row < call.rows; ++row) weigh<Lanes>(call, row, scales[0], scales[1], weights + row * CHUNK);
  for_rows<4>(call.rows, 0, [&](int64_t row, auto rows) {
    constexpr int VECTORS = std::min(Lanes::PAIRS / rows(), 8);
    add_values<Lanes, rows(), VECTORS>(call, row, weights + row * CHUNK, 0);
  });
}

}  // namespace
}  // namespace convllava
