// The GEMM in scalar code: for processors without AVX2, and what the other instruction sets are tested against.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gemm.h"

namespace convllava {
namespace {

// Sum over a block: `initial`, and codes of one row times those of a block of x. Wraps around where x is infinite.
template <Format FORMAT>
uint32_t dot_block(const uint8_t* codes, const int8_t* x, uint32_t initial) {
  uint32_t sum = initial;
  for (int64_t i = 0; i < code_bytes(FORMAT); ++i) {
    if constexpr (bits(FORMAT) == 4) {
      sum += (codes[i] & 15) * x[i] + (codes[i] >> 4) * x[16 + i];
    } else {
      sum += codes[i] * x[i];
    }
  }
  return sum;
}

float to_float(uint32_t sum) { return static_cast<float>(static_cast<int32_t>(sum)); }

float load_half(const uint8_t* halves, int64_t index) {
  uint16_t value;
  std::memcpy(&value, halves + 2 * index, 2);
  return from_half(value);
}

// One element of x W^T.
template <Format FORMAT, int ACTIVATION_BITS>
float dot_row(const Weights& w, int64_t column, const Activations& a, int64_t row) {
  const int64_t lane = column % GROUP, plane = a.plane() * BLOCK;
  const uint8_t *codes = w.codes + column * w.row_bytes, *scales = w.block_scales(column / GROUP, 0);
  float y = 0;
  for (int64_t block = 0; block < w.blocks; ++block, codes += code_bytes(FORMAT), scales += scale_bytes(FORMAT)) {
    const int64_t at = a.at(row, block);
    const int8_t* x = a.codes + at * BLOCK;
    const uint32_t initial = a.initial_sums[at];
    float dot;
    if constexpr (ACTIVATION_BITS == 24) {
      const uint32_t upper = 128 * dot_block<FORMAT>(codes, x, 0) + dot_block<FORMAT>(codes, x + plane, initial);
      const uint32_t lower = dot_block<FORMAT>(codes, x + 2 * plane, a.initial_sums[a.plane() + at]);
      dot = std::fma(to_float(upper), 128.0f, to_float(lower));
    } else {
      dot = to_float(dot_block<FORMAT>(codes, x, initial));
    }
    const float scale = FORMAT == Format::INT4 ? static_cast<int8_t>(scales[lane]) : load_half(scales, lane);
    y = std::fma(dot * scale, a.scales[at], y);
    if constexpr (FORMAT == Format::INT4_OFFSETS) y = std::fma(load_half(scales, GROUP + lane), a.scaled_sums[at], y);
  }
  return y * w.units[column];
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

template <Format FORMAT, int ACTIVATION_BITS>
void gemm_groups(const GemmCall& call, int64_t begin, int64_t end, Buffer&) {
  const int64_t columns = call.weights[0]->rows, last = std::min(end * GROUP, columns);
  for (int64_t row = 0; row < call.a.rows; ++row) {
    for (int64_t column = begin * GROUP; column < last; ++column) {
      float y = dot_row<FORMAT, ACTIVATION_BITS>(*call.weights[0], column, call.a, row);
      if (call.weights[1])
        y = y / (1 + exponential(0 - y)) * dot_row<FORMAT, ACTIVATION_BITS>(*call.weights[1], column, call.a, row);
      call.y[row * columns + column] = y;
    }
  }
}

}  // namespace

const KernelSet REFERENCE{"reference",
                          1,
                          quantize_row_reference<8>,
                          quantize_row_reference<24>,
                          {{gemm_groups<Format::INT4, 8>, gemm_groups<Format::INT4, 24>},
                           {gemm_groups<Format::INT4_OFFSETS, 8>, gemm_groups<Format::INT4_OFFSETS, 24>},
                           {gemm_groups<Format::INT8, 8>, gemm_groups<Format::INT8, 24>}}};

}  // namespace convllava
