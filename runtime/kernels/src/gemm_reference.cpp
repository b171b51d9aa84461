// The GEMM in scalar code: for processors without AVX2, and what the other instruction sets are tested against.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"

namespace convllava {
namespace {

// Sums of codes of one row of a packed block times those of a block of x.
template <int BITS>
int32_t dot_block(const uint8_t* packed_block, int64_t lane, const int8_t* x) {
  int32_t sum = 0;
  for (int64_t column = 0; column < BLOCK; ++column) sum += packed_code(packed_block, BITS, lane, column) * x[column];
  return sum;
}

// Scale `index` of a packed block; behind GROUP scales come GROUP offsets.
template <int ACTIVATION_BITS>
float load_scale(const uint8_t* scales, int64_t index) {
  if constexpr (ACTIVATION_BITS == 24) {
    float scale;
    std::memcpy(&scale, scales + 4 * index, 4);
    return scale;
  } else {
    uint16_t scale;
    std::memcpy(&scale, scales + 2 * index, 2);
    return from_half(scale);
  }
}

// One element of x W^T.
template <int BITS, int ACTIVATION_BITS>
float dot_row(const PackedMatrix& w, int64_t column, const Activations& a, int64_t row) {
  constexpr size_t BLOCK_BYTES = packed_block_bytes(BITS, ACTIVATION_BITS);
  const int64_t lane = column % GROUP, plane = a.rows * a.blocks * BLOCK;
  const uint8_t* packed_block = w.data.get() + column / GROUP * w.blocks * BLOCK_BYTES;
  float y = 0;
  for (int64_t block = 0; block < w.blocks; ++block, packed_block += BLOCK_BYTES) {
    const int64_t at = row * a.blocks + block;
    const int8_t* x = a.codes + at * BLOCK;
    float dot;
    if constexpr (ACTIVATION_BITS == 24) {
      const int32_t upper =
          128 * dot_block<BITS>(packed_block, lane, x) + dot_block<BITS>(packed_block, lane, x + plane);
      const int32_t lower = dot_block<BITS>(packed_block, lane, x + 2 * plane);
      dot = std::fma(static_cast<float>(upper), 128.0f, static_cast<float>(lower));
    } else {
      dot = static_cast<float>(dot_block<BITS>(packed_block, lane, x));
    }
    const uint8_t* scales = packed_block + code_bytes(BITS);
    y = std::fma(dot * load_scale<ACTIVATION_BITS>(scales, lane), a.scales[at], y);
    y = std::fma(load_scale<ACTIVATION_BITS>(scales, GROUP + lane), a.scaled_sums[at], y);
  }
  return y * w.scale_unit;
}

// e^x as `exponential` of gemm_tile.h.
float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = std::min(x, 88.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float rest = std::fma(-n, -2.12194440e-4f, std::fma(-n, 0.693359375f, x));
  float sum = 1.0f / 5040;
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = std::fma(sum, rest, term);
  return std::ldexp(sum, static_cast<int>(n));
}

template <int BITS, int ACTIVATION_BITS>
void gemm_groups(const GemmCall& call, int64_t begin, int64_t end) {
  const int64_t columns = call.weights[0]->rows, last = std::min(end * GROUP, columns);
  for (int64_t row = 0; row < call.a.rows; ++row) {
    for (int64_t column = begin * GROUP; column < last; ++column) {
      float y = dot_row<BITS, ACTIVATION_BITS>(*call.weights[0], column, call.a, row);
      if (call.weights[1])
        y = y / (1 + exponential(0 - y)) * dot_row<BITS, ACTIVATION_BITS>(*call.weights[1], column, call.a, row);
      call.y[row * columns + column] = y;
    }
  }
}

}  // namespace

const KernelSet REFERENCE{"reference",
                          quantize_row_reference<8>,
                          quantize_row_reference<24>,
                          {{gemm_groups<4, 8>, gemm_groups<4, 24>}, {gemm_groups<8, 8>, gemm_groups<8, 24>}}};

}  // namespace convllava
