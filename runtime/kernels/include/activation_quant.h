// Activations, quantized in blocks of 32 columns.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "weight_format.h"

namespace convllava {

// Rows of x in blocks. Of 8 bits: x = scale * code, codes up to 127. Of 24 bits: x = scale * (128^2 a + 128 b + c),
// with the codes a (up to 127), b and c (-64 to 63) in three planes. A block with a NaN has the scale NaN.
//
// Blocks of TILE rows lie together, those of the last rows where there are fewer: [tiles, blocks, rows of the tile]. If
// all rows are fewer than a tile, there is memory for as many as the next power of two.
// Within a block, columns lie as in the weights that they meet: for 4 bits, the 16 even ones and then the 16 odd ones.
struct Activations {
  int64_t rows, padded_rows, blocks, tile;
  Format format;          // of the weights
  int8_t* codes;          // [planes, padded_rows * blocks, 32]
  float* scales;          // [padded_rows * blocks]
  float* scaled_sums;     // [padded_rows * blocks]: scale * sum of what it multiplies
  int32_t* initial_sums;  // [1, padded_rows * blocks]: -zero_point * sum of codes; of 24 bits [2, ...]: of 128 a + b, c

  int64_t tile_rows(int64_t first) const { return std::min(tile, padded_rows - first); }
  int64_t at(int64_t row, int64_t block) const {
    const int64_t first = row / tile * tile;
    return first * blocks + block * tile_rows(first) + row - first;
  }
  int64_t plane() const { return padded_rows * blocks; }
};

constexpr int planes(int activation_bits) { return activation_bits == 24 ? 3 : 1; }
constexpr float largest_code(int activation_bits) { return activation_bits == 24 ? 127.0f * 128 * 128 : 127.0f; }
// Blocks of nothing larger are 0: the inverse of their scale would be infinite
constexpr float SMALLEST_BLOCK = 1e-30f;

// Activations in the memory of `buffer`.
Activations reserve(Buffer& buffer, int64_t rows, int64_t blocks, int64_t tile, Format format, int activation_bits);

// Quantizes one row of x [rows, 32 * blocks].
using QuantizeRow = void (*)(const float* x, const Activations& a, int64_t row);

template <int ACTIVATION_BITS>
void quantize_row_reference(const float* x, const Activations& a, int64_t row);
template <int ACTIVATION_BITS>
void quantize_row_avx2(const float* x, const Activations& a, int64_t row);

}  // namespace convllava
