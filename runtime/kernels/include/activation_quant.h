// Activations, quantized in blocks of 32 columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight_format.h"

namespace convllava {

// Rows of x in blocks. Of 8 bits: x = scale * code, codes up to 127. Of 24 bits: x = scale * (128^2 a + 128 b + c),
// with the codes a (up to 127), b and c (-64 to 63) in three planes. A block with a NaN has the scale NaN.
struct Activations {
  int64_t rows, blocks;
  int8_t* codes;       // [planes, rows, blocks, 32]
  float* scales;       // [rows, blocks]
  float* scaled_sums;  // [rows, blocks]: scale * sum of what it multiplies
  int32_t* act_sums;   // [1, rows, blocks]: sums of codes; of 24 bits [2, ...]: sums of 128 a + b, and of c
};

constexpr int planes(int activation_bits) { return activation_bits == 24 ? 3 : 1; }
constexpr float largest_code(int activation_bits) { return activation_bits == 24 ? 127.0f * 128 * 128 : 127.0f; }
// Blocks of nothing larger are 0: the inverse of their scale would be infinite
constexpr float SMALLEST_BLOCK = 1e-30f;

// Memory for the activations of one call, kept for the next.
class ActivationBuffer {
 public:
  Activations reserve(int64_t rows, int64_t blocks, int activation_bits);

 private:
  AlignedBytes memory_;
  size_t capacity_ = 0;
};

// Quantizes one row of x [rows, 32 * blocks].
using QuantizeRow = void (*)(const float* x, const Activations& a, int64_t row);

template <int ACTIVATION_BITS>
void quantize_row_reference(const float* x, const Activations& a, int64_t row);
template <int ACTIVATION_BITS>
void quantize_row_avx2(const float* x, const Activations& a, int64_t row);

}  // namespace convllava
