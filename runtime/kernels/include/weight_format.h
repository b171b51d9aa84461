// Block-quantized weights as a graph stores them: the GEMM reads them in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace convllava {

constexpr int64_t BLOCK = 32;  // columns that share a scale and an offset
constexpr int64_t GROUP = 16;  // rows whose scales lie together

// How a weight is made of its code, the numbers of its block and the unit of its row.
enum class Format {
  INT4,          // unit * scale * (code - 8), the scale an int8
  INT4_OFFSETS,  // unit * (scale * code + offset), both float16
  INT8,          // unit * scale * (code - 128), the scale a float16
};

constexpr int bits(Format format) { return format == Format::INT8 ? 8 : 4; }
constexpr int64_t code_bytes(Format format) { return BLOCK * bits(format) / 8; }  // of a block
constexpr int zero_point(Format format) { return format == Format::INT8 ? 128 : format == Format::INT4 ? 8 : 0; }
// Of a block in a group of rows: GROUP scales, then GROUP offsets where there are some.
constexpr int64_t scale_bytes(Format format) {
  return GROUP * (format == Format::INT4 ? 1 : format == Format::INT8 ? 2 : 4);
}

// A tensor of a graph; data null: there is none.
template <typename T>
struct Tensor {
  const T* data = nullptr;
  std::vector<int64_t> shape;
};

// A view of a matrix [rows, 32 * blocks]; nothing in it is aligned.
struct Weights {
  Format format;
  int64_t rows, blocks;
  int64_t row_bytes;      // of codes; those behind `blocks` blocks are of no concern
  const uint8_t* codes;   // [rows, row_bytes]; of 4 bits, the even column in a byte's lower half
  const uint8_t* scales;  // [groups, blocks, scale_bytes]
  const float* units;     // [groups, GROUP]

  int64_t groups() const { return (rows + GROUP - 1) / GROUP; }
  const uint8_t* block_scales(int64_t group, int64_t block) const {
    return scales + (group * blocks + block) * scale_bytes(format);
  }
};

// The matrix [N, columns] that tensors hold: codes [N, blocks or more, bytes of a block], scales
// [groups, blocks, scale_bytes], units [GROUP * groups].
// Throws KernelError for bits that no format has, a K in no whole blocks, and shapes that do not fit together.
Weights weights(const Tensor<uint8_t>& codes, const Tensor<uint8_t>& scales, const Tensor<float>& units,
                int64_t columns, int64_t bits);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], Free>;

// Memory at a multiple of 64 bytes that is kept from one use to the next.
class Buffer {
 public:
  // Uninitialized. Throws std::bad_alloc.
  uint8_t* reserve(size_t bytes);

 private:
  AlignedBytes memory_;
  size_t capacity_ = 0;
};

// IEEE 754 binary16.
float from_half(uint16_t value);

}  // namespace convllava
