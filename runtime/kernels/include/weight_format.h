// Block-quantized weights: as MatMulNBits (com.microsoft) stores them, and packed for the GEMM.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace convllava {

constexpr int64_t BLOCK = 32;                // columns that share a scale and an offset
constexpr int64_t GROUP = 8;                 // rows that are packed together
constexpr int64_t VECTOR_BYTES = 4 * GROUP;  // four columns of each row of a group

// A view of a matrix [rows, K] as it is stored. Where it has more blocks than K / 32, the K / 32 columns from the K-th
// on are multiplied by the means of x's blocks.
struct StoredMatrix {
  const uint8_t* codes;  // [rows, blocks, 32 * bits / 8]; of 4 bits, the even column in a byte's lower half
  const float* scales;   // [rows, blocks]
  const uint8_t* zeros;  // [rows, blocks], two to a byte of 4 bits; null: all zero points are 8 or 128
  int64_t rows, blocks;
  int bits;  // 4 or 8

  const uint8_t* block_codes(int64_t row, int64_t block) const {
    return codes + (row * blocks + block) * BLOCK * bits / 8;
  }
  float scale(int64_t row, int64_t block) const { return scales[row * blocks + block]; }
  int zero_point(int64_t row, int64_t block) const;
  int code(int64_t row, int64_t column) const;
};

// A tensor of a graph; data null: there is none.
template <typename T>
struct Tensor {
  const T* data = nullptr;
  std::vector<int64_t> shape;
};

// The matrix that tensors hold; zeros may be none.
// Throws KernelError for bits that the format does not have, and for shapes that do not fit together.
StoredMatrix stored_matrix(const Tensor<uint8_t>& codes, const Tensor<float>& scales, const Tensor<uint8_t>& zeros,
                           int64_t bits);

// Bytes of a packed block's codes, and of the whole: codes, GROUP scales, GROUP offsets.
constexpr size_t code_bytes(int bits) { return GROUP * BLOCK * bits / 8; }
constexpr size_t scale_bytes(int activation_bits) { return activation_bits == 24 ? sizeof(float) : sizeof(uint16_t); }
constexpr size_t packed_block_bytes(int bits, int activation_bits) {
  return code_bytes(bits) + 2 * GROUP * scale_bytes(activation_bits);
}

// Codes are read with aligned loads: every packed block begins at a multiple of a vector, from a base aligned to 64.
constexpr bool aligned(size_t bytes) { return bytes % VECTOR_BYTES == 0; }
static_assert(aligned(packed_block_bytes(4, 8)) && aligned(packed_block_bytes(4, 24)));
static_assert(aligned(packed_block_bytes(8, 8)) && aligned(packed_block_bytes(8, 24)));

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], Free>;

// Uninitialized memory at a multiple of 64 bytes. Throws std::bad_alloc.
AlignedBytes allocate_aligned(size_t bytes);

// A matrix [rows, 32 * blocks] as packed blocks [groups, blocks]; rows up to the last multiple of 8 are zero. A weight
// is scale_unit * (scale * code + offset), where a code of 8 bits has a sign. With 24-bit activations scales and
// offsets are float32 and scale_unit is 1. Else they are float16 and scale_unit = 2^scale_exponent brings the largest
// of them to [2^13, 2^14), so that small ones do not underflow.
struct PackedMatrix {
  int64_t rows, blocks, groups;
  int bits, activation_bits;
  float scale_unit;
  AlignedBytes data;
};

// Args: columns: K, a multiple of 32. activation_bits: 8 or 24.
// Throws KernelError for bits, a K or a number of blocks that the format does not have, and for scales and offsets that
// are not finite.
PackedMatrix pack(const StoredMatrix& stored, int64_t columns, int activation_bits);

// The code of a packed block at (lane, column); of 8 bits with its sign.
inline int packed_code(const uint8_t* packed_block, int bits, int64_t lane, int64_t column) {
  if (bits == 8) return static_cast<int8_t>(packed_block[column / 4 * VECTOR_BYTES + 4 * lane + column % 4]);
  const uint8_t pair = packed_block[column % 16 / 4 * VECTOR_BYTES + 4 * lane + column % 4];
  return column < 16 ? pair & 15 : pair >> 4;
}

// IEEE 754 binary16, rounded to nearest even.
uint16_t to_half(float value);
float from_half(uint16_t value);

}  // namespace convllava
