// What attention does but once for each query or new position. It is compiled for any processor, so that all
// instruction sets share it.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"

namespace convllava {
namespace {

constexpr float LARGEST_CODE = 127.0f;
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: a sum with it has the rounded other one in its lowest bits
constexpr float SMALLEST_ROW = 1e-30f;   // rows of nothing larger are 0: the inverse of their scale would be infinite

// Query, key or value head `head` of a new position of a sequence.
const float* head_of(const AttentionCall& call, int64_t sequence, int64_t position, int64_t head) {
  const int64_t width = call.heads + 2 * call.kv_heads;
  return call.qkv + ((sequence * call.sequence + position) * width + head) * call.head_dim;
}

int64_t first_position(const AttentionCall& call, int64_t sequence) { return call.last[sequence] + 1 - call.sequence; }

void rotate(const AttentionCall& call, const float* x, int64_t position, float* out) {
  const int64_t half = call.head_dim / 2;
  const float *cosines = call.cosines + position * half, *sines = call.sines + position * half;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cosines[i] - x[half + i] * sines[i];
    out[half + i] = x[half + i] * cosines[i] + x[i] * sines[i];
  }
}

void quantize(const float* x, int64_t head_dim, int8_t* out) {
  uint32_t bits = 0;  // of the largest size: they have its order, and NaN is above all
  for (int64_t i = 0; i < head_dim; ++i) {
    uint32_t size;
    std::memcpy(&size, x + i, sizeof size);
    bits = std::max(bits, size & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &bits, sizeof bits);
  const float per_scale = largest > SMALLEST_ROW ? LARGEST_CODE / largest : 0.0f;
  for (int64_t i = 0; i < head_dim; ++i) {
    const float rounded = x[i] * per_scale + ROUNDING;
    uint32_t code;
    std::memcpy(&code, &rounded, sizeof code);
    out[i] = static_cast<int8_t>(code);
  }
  const float scale = std::isfinite(largest) ? largest / LARGEST_CODE : std::numeric_limits<float>::quiet_NaN();
  std::memcpy(out + head_dim, &scale, sizeof scale);
}

// What a query has of the chunks so far.
struct State {
  float* sums;  // [head_dim]
  float maximum, total;
};

void merge(State& state, const State& chunk, int64_t head_dim) {
  const float maximum = std::max(state.maximum, chunk.maximum);
  const float kept = std::exp(state.maximum - maximum), added = std::exp(chunk.maximum - maximum);
  state.maximum = maximum;
  state.total = state.total * kept + chunk.total * added;
  for (int64_t i = 0; i < head_dim; ++i) state.sums[i] = state.sums[i] * kept + chunk.sums[i] * added;
}

void store(const AttentionCall& call, int64_t pair, int64_t row, const State& state) {
  const int64_t sequence = pair / call.kv_heads, head = pair % call.kv_heads * call.group() + row % call.group();
  float* y = call.y + ((sequence * call.sequence + row / call.group()) * call.heads + head) * call.head_dim;
  for (int64_t i = 0; i < call.head_dim; ++i) y[i] = state.sums[i] / state.total;
}

// The partial result of a query and chunk: sums, maximum, total.
float* partial(const AttentionCall& call, int64_t pair, int64_t chunk, int64_t row) {
  return call.partials + ((pair * call.chunks() + chunk) * call.rows() + row) * (call.head_dim + 2);
}

// The queries `first` to `first + rows` of a key head, rotated and scaled.
void load_queries(const AttentionCall& call, int64_t pair, int64_t first, int64_t rows, float* out) {
  const int64_t sequence = pair / call.kv_heads, group = call.group();
  const float scale = 1 / std::sqrt(static_cast<float>(call.head_dim));
  for (int64_t row = first; row < first + rows; ++row, out += call.head_dim) {
    const int64_t head = pair % call.kv_heads * group + row % group, position = row / group;
    rotate(call, head_of(call, sequence, position, head), first_position(call, sequence) + position, out);
    for (int64_t i = 0; i < call.head_dim; ++i) out[i] *= scale;
  }
}

}  // namespace

AttendChunk attend_chunk_of(const KernelSet& kernels) {
#ifdef CONVLLAVA_X86
  if (&kernels == &AVX512_VNNI) return attend_chunk_avx512;
  if (&kernels != &REFERENCE) return attend_chunk_avx2;
#endif
  (void)kernels;
  return attend_chunk_reference;
}

void append(const AttentionCall& call, int64_t pair) {
  const int64_t sequence = pair / call.kv_heads, head = pair % call.kv_heads, bytes = call.row_bytes();
  const int64_t first = first_position(call, sequence);
  int8_t *keys = call.keys + pair * call.positions * bytes, *values = call.values + pair * call.positions * bytes;
  if (call.keys != call.past_keys)
    std::memcpy(keys, call.past_keys + pair * call.past_positions * bytes, first * bytes);
  if (call.values != call.past_values)
    std::memcpy(values, call.past_values + pair * call.past_positions * bytes, first * bytes);
  for (int64_t i = 0; i < call.sequence; ++i) {
    float rotated[MAX_HEAD_DIM];
    rotate(call, head_of(call, sequence, i, call.heads + head), first + i, rotated);
    quantize(rotated, call.head_dim, keys + (first + i) * bytes);
    const float* value = head_of(call, sequence, i, call.heads + call.kv_heads + head);
    quantize(value, call.head_dim, values + (first + i) * bytes);
  }
}

void attend(const AttentionCall& call, AttendChunk attend_chunk, int64_t task) {
  const int64_t per_pair = call.tasks() / call.pairs(), pair = task / per_pair, part = task % per_pair;
  const int64_t first = call.partials ? 0 : part * MAX_TILE_ROWS, rows = std::min(call.rows() - first, MAX_TILE_ROWS);
  const int64_t start = first_position(call, pair / call.kv_heads), bytes = call.row_bytes(), dims = call.head_dim;
  const auto seen = [&](int64_t row) { return start + (first + row) / call.group() + 1; };  // positions, by a query
  const int64_t chunks = (seen(rows - 1) + CHUNK - 1) / CHUNK;
  const int64_t begin = call.partials ? part : 0, end = call.partials ? std::min(part + 1, chunks) : chunks;
  if (begin >= end) return;  // a sequence shorter than others

  alignas(64) float queries[MAX_TILE_ROWS * MAX_HEAD_DIM], sums[2][MAX_TILE_ROWS * MAX_HEAD_DIM];
  float maxima[MAX_TILE_ROWS], totals[MAX_TILE_ROWS];
  State states[MAX_TILE_ROWS];
  load_queries(call, pair, first, rows, queries);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t from = chunk * CHUNK, at = (pair * call.positions + from) * bytes;
    int64_t limits[MAX_TILE_ROWS];
    for (int64_t row = 0; row < rows; ++row) limits[row] = std::min(seen(row) - from, CHUNK);
    const bool is_first = chunk == begin;
    attend_chunk({rows, dims, limits[rows - 1], queries, limits, call.keys + at, call.values + at, sums[!is_first],
                  maxima, totals});
    for (int64_t row = 0; row < rows; ++row) {
      const State found{sums[!is_first] + row * dims, maxima[row], totals[row]};
      if (is_first)
        states[row] = found;
      else if (limits[row] > 0)
        merge(states[row], found, dims);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (!call.partials) {
      store(call, pair, first + row, states[row]);
      continue;
    }
    float* out = partial(call, pair, part, row);
    std::memcpy(out, states[row].sums, dims * sizeof(float));
    out[dims] = states[row].maximum;
    out[dims + 1] = states[row].total;
  }
}

void merge_partials(const AttentionCall& call, int64_t pair) {
  const int64_t start = first_position(call, pair / call.kv_heads);
  for (int64_t row = 0; row < call.rows(); ++row) {
    const auto state = [&](int64_t chunk) {
      float* found = partial(call, pair, chunk, row);
      return State{found, found[call.head_dim], found[call.head_dim + 1]};
    };
    const int64_t seen = start + row / call.group() + 1;
    State merged = state(0);
    for (int64_t chunk = 1; chunk * CHUNK < seen; ++chunk) merge(merged, state(chunk), call.head_dim);
    store(call, pair, row, merged);
  }
}

}  // namespace convllava
