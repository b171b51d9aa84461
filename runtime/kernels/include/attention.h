// Attention of new positions over a KV cache in int8: grouped queries, causal, with rotary embeddings.
//
// A cached row [head_dim + 4 bytes] is a key or value of one head and position: int8 codes, symmetric, then their scale
// in float32. Nothing in it is aligned.
//
// Queries are in float32, and codes are converted. Positions are attended to in chunks from the first on, and the
// chunks' results are merged in their order: what a query gets depends neither on other queries nor on how the work is
// shared out.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace convllava {

constexpr int64_t SCALE_BYTES = 4;
constexpr int64_t LANES = 16;  // head_dim is a multiple; sums have as many partial ones
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr int64_t CHUNK = 256;         // positions
constexpr int64_t MAX_TILE_ROWS = 16;  // queries of one key head that are attended for together

// One call. The queries of a key head are numbered: all query heads of the first new position, of the next one, ...
struct AttentionCall {
  int64_t batch, sequence, heads, kv_heads, head_dim;
  const float* qkv;                       // [batch, sequence, (heads + 2 * kv_heads) * head_dim]
  const float *cosines, *sines;           // [positions, head_dim / 2]
  const int32_t* last;                    // [batch]: the last of the new positions
  const int8_t *past_keys, *past_values;  // [batch, kv_heads, past_positions, row_bytes]
  int8_t *keys, *values;                  // [batch, kv_heads, positions, row_bytes], may be the same memory
  int64_t past_positions, positions;
  int64_t longest;  // positions that are filled then, of the longest sequence
  float* y;         // [batch, sequence, heads * head_dim]
  float* partials;  // of chunks that are attended to each on its own, `partial_floats` in all; null: all in one task

  int64_t row_bytes() const { return head_dim + SCALE_BYTES; }
  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return sequence * group(); }
  int64_t tiles() const { return (rows() + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS; }
  int64_t chunks() const { return (longest + CHUNK - 1) / CHUNK; }
  int64_t pairs() const { return batch * kv_heads; }
  int64_t partial_floats() const { return pairs() * chunks() * rows() * (head_dim + 2); }
  int64_t tasks() const { return pairs() * (partials ? chunks() : tiles()); }
};

// What a tile of queries sees of a chunk of positions.
struct ChunkCall {
  int64_t rows, head_dim, count;  // queries; positions
  const float* queries;           // [rows, head_dim], rotated and scaled, at a multiple of 64 bytes
  const int64_t* limits;          // [rows]: positions of the chunk that a query sees, none if not above 0
  const int8_t *keys, *values;    // [count, head_dim + SCALE_BYTES]
  float *sums, *maxima, *totals;  // of each query: [head_dim] weights * values, the largest score, the sum of weights
};
using AttendChunk = void (*)(const ChunkCall& call);

void attend_chunk_reference(const ChunkCall& call);  // scalar
void attend_chunk_avx2(const ChunkCall& call);
void attend_chunk_avx512(const ChunkCall& call);
AttendChunk attend_chunk_of(const KernelSet& kernels);

// Steps of a call. Each is done for all indices before the next one begins.
void append(const AttentionCall& call, int64_t pair);                     // below pairs(): writes new keys and values
void attend(const AttentionCall& call, AttendChunk chunk, int64_t task);  // below tasks()
void merge_partials(const AttentionCall& call, int64_t pair);             // below pairs(), if there are partials

}  // namespace convllava
