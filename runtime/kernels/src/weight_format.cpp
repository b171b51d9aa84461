#include "weight_format.h"

#include <cstring>
#include <new>

#include "kernel_error.h"

namespace convllava {
namespace {

Format format_of(int64_t bits, int64_t scale_bytes_of_block) {
  for (Format format : {Format::INT4, Format::INT4_OFFSETS, Format::INT8})
    if (bits == convllava::bits(format) && scale_bytes_of_block == scale_bytes(format)) return format;
  throw KernelError("expected 4 bits with scales of 8 or 2 * 16 bits, or 8 bits with scales of 16 bits");
}

}  // namespace

Weights weights(const Tensor<uint8_t>& codes, const Tensor<uint8_t>& scales, const Tensor<float>& units,
                int64_t columns, int64_t bits) {
  if (columns <= 0 || columns % BLOCK) throw KernelError("expected K in blocks of 32");
  if (!codes.data || !scales.data || !units.data || codes.shape.size() != 3 || scales.shape.size() != 3 ||
      units.shape.size() != 1)
    throw KernelError("expected constant codes [N, blocks, bytes], scales [groups, blocks, bytes] and units [rows]");
  const Format format = format_of(bits, scales.shape[2]);
  const Weights found{format,     codes.shape[0], columns / BLOCK, codes.shape[1] * code_bytes(format),
                      codes.data, scales.data,    units.data};
  if (codes.shape[2] != code_bytes(format) || codes.shape[1] < found.blocks)
    throw KernelError("expected as many blocks of codes as K has, or more");
  if (scales.shape[0] != found.groups() || scales.shape[1] != found.blocks || units.shape[0] != found.groups() * GROUP)
    throw KernelError("expected scales and units for each block and row");
  return found;
}

uint8_t* Buffer::reserve(size_t bytes) {
  if (bytes > capacity_) {
    memory_.reset();  // never both at once
    capacity_ = 0;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!memory_) throw std::bad_alloc();
    capacity_ = bytes;
  }
  return memory_.get();
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
