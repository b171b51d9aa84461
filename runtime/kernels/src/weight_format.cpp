#include "weight_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <string>

#include "kernel_error.h"

namespace convllava {
namespace {

int nibble(const uint8_t* bytes, int64_t index) { return index % 2 ? bytes[index / 2] >> 4 : bytes[index / 2] & 15; }

// What is added to scale * code for a weight. scale: the block's, as it is packed.
float block_offset(const StoredMatrix& stored, int64_t blocks, int64_t row, int64_t block, float scale) {
  const float offset = -scale * (stored.zero_point(row, block) - (stored.bits == 8 ? 128 : 0));
  if (stored.blocks == blocks) return offset;
  const int64_t column = blocks * BLOCK + block, its_block = column / BLOCK;  // multiplied by the mean of x's block
  const int code = stored.code(row, column) - stored.zero_point(row, its_block);
  return offset + stored.scale(row, its_block) * code / BLOCK;
}

void check_finite(const StoredMatrix& stored, int64_t blocks) {
  for (int64_t row = 0; row < stored.rows; ++row) {
    for (int64_t block = 0; block < stored.blocks; ++block) {
      const float scale = stored.scale(row, block);
      const bool is_offset_finite = block >= blocks || std::isfinite(block_offset(stored, blocks, row, block, scale));
      if (!std::isfinite(scale) || !is_offset_finite)
        throw KernelError("expected finite scales and offsets, found others in row " + std::to_string(row));
    }
  }
}

// Smallest power of two above every scale and offset, but at least 2^-100: its inverse must not be infinite.
int largest_exponent(const StoredMatrix& stored, int64_t blocks) {
  float largest = 0;
  for (int64_t row = 0; row < stored.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const float scale = stored.scale(row, block);
      largest = std::max({largest, std::abs(scale), std::abs(block_offset(stored, blocks, row, block, scale))});
    }
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  return std::max(exponent, -100);
}

// Four columns of one row go into each of a packed block's vectors: of 4 bits, columns 4 v to the lower halves of
// vector v and columns 16 + 4 v to the upper ones; of 8 bits, columns 4 v to vector v.
void pack_codes(const uint8_t* in, int bits, int64_t lane, uint8_t* packed_block) {
  uint8_t* out = packed_block + 4 * lane;
  if (bits == 8) {
    for (int64_t i = 0; i < BLOCK; ++i) out[i / 4 * VECTOR_BYTES + i % 4] = in[i] ^ 128;
    return;
  }
  for (int64_t i = 0; i < 8; ++i) {  // two columns, and the two that are 16 further
    uint8_t* pair = out + i / 2 * VECTOR_BYTES + i % 2 * 2;
    pair[0] = (in[i] & 15) | (in[i + 8] & 15) << 4;
    pair[1] = in[i] >> 4 | (in[i + 8] & 240);
  }
}

template <typename T>
int64_t count(const Tensor<T>& tensor) {
  int64_t product = 1;
  for (int64_t side : tensor.shape) product *= side;
  return product;
}

template <typename T>
void store_pair(uint8_t* scales, int64_t lane, T scale, T offset) {
  std::memcpy(scales + sizeof(T) * lane, &scale, sizeof(T));
  std::memcpy(scales + sizeof(T) * (GROUP + lane), &offset, sizeof(T));
}

}  // namespace

StoredMatrix stored_matrix(const Tensor<uint8_t>& codes, const Tensor<float>& scales, const Tensor<uint8_t>& zeros,
                           int64_t bits) {
  if (bits != 4 && bits != 8) throw KernelError("expected 4 or 8 bits");
  if (!codes.data || !scales.data || codes.shape.size() != 3 || codes.shape[2] != BLOCK * bits / 8)
    throw KernelError("expected constant weights [N, blocks, bytes of 32 weights] and constant scales");
  const int64_t rows = codes.shape[0], blocks = codes.shape[1];
  if (count(scales) != rows * blocks) throw KernelError("expected a scale for each block");
  if (zeros.data && count(zeros) != rows * (bits == 8 ? blocks : (blocks + 1) / 2))
    throw KernelError("expected a zero point for each block");
  return {codes.data, scales.data, zeros.data, rows, blocks, static_cast<int>(bits)};
}

int StoredMatrix::zero_point(int64_t row, int64_t block) const {
  if (!zeros) return bits == 8 ? 128 : 8;
  return bits == 8 ? zeros[row * blocks + block] : nibble(zeros + row * ((blocks + 1) / 2), block);
}

int StoredMatrix::code(int64_t row, int64_t column) const {
  const uint8_t* in = block_codes(row, column / BLOCK);
  return bits == 8 ? in[column % BLOCK] : nibble(in, column % BLOCK);
}

AlignedBytes allocate_aligned(size_t bytes) {
  AlignedBytes memory(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!memory && bytes) throw std::bad_alloc();
  return memory;
}

PackedMatrix pack(const StoredMatrix& stored, int64_t columns, int activation_bits) {
  if ((stored.bits != 4 && stored.bits != 8) || columns <= 0 || columns % BLOCK)
    throw KernelError("expected 4 or 8 bits, and K in blocks of 32");
  const int64_t blocks = columns / BLOCK, groups = (stored.rows + GROUP - 1) / GROUP;
  if (stored.blocks != blocks && stored.blocks != blocks + (blocks + BLOCK - 1) / BLOCK)
    throw KernelError("expected as many blocks as K has, or as K and the means of its blocks");
  check_finite(stored, blocks);

  const int scale_exponent = activation_bits == 24 ? 0 : largest_exponent(stored, blocks) - 14;
  const float unit = std::ldexp(1.0f, scale_exponent), per_unit = 1 / unit;
  const size_t block_bytes = packed_block_bytes(stored.bits, activation_bits), bytes = groups * blocks * block_bytes;
  PackedMatrix packed{stored.rows, blocks, groups, stored.bits, activation_bits, unit, allocate_aligned(bytes)};
  if (stored.rows % GROUP) std::memset(packed.data.get(), 0, bytes);
  for (int64_t row = 0; row < stored.rows; ++row) {
    const int64_t lane = row % GROUP;
    uint8_t* out = packed.data.get() + row / GROUP * blocks * block_bytes;
    for (int64_t block = 0; block < blocks; ++block, out += block_bytes) {
      pack_codes(stored.block_codes(row, block), stored.bits, lane, out);
      uint8_t* scales = out + code_bytes(stored.bits);
      const float scale = stored.scale(row, block);
      if (activation_bits == 24) {
        store_pair(scales, lane, scale, block_offset(stored, blocks, row, block, scale));
        continue;
      }
      const uint16_t half = to_half(scale * per_unit);
      const float offset = block_offset(stored, blocks, row, block, from_half(half) * unit);
      store_pair(scales, lane, half, to_half(offset * per_unit));
    }
  }
  return packed;
}

uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00 | (magnitude >> 13 & 0x3ff);  // NaN
  if (magnitude >= 0x47800000) return sign | 0x7c00;                             // 2^16 and more
  if (magnitude < 0x38800000)                                                    // below 2^-14: multiples of 2^-24
    return sign | static_cast<uint32_t>(std::nearbyint(std::abs(value) * 0x1p24f));
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return sign | (magnitude - 0x38000000) >> 13;
}

float from_half(uint16_t value) {
  const uint32_t magnitude = value & 0x7fff;
  float result;
  if (magnitude < 0x400) {
    result = magnitude * 0x1p-24f;
  } else {
    const uint32_t bits = (magnitude << 13) + (magnitude < 0x7c00 ? 0x38000000 : 0x70000000);
    std::memcpy(&result, &bits, 4);
  }
  return value & 0x8000 ? -result : result;
}

}  // namespace convllava
