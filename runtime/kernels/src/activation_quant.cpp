#include "activation_quant.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace convllava {
namespace {

// To nearest even; INT32_MIN for what has no room, as x86 has it.
int32_t round_to_int(float value) {
  return std::abs(value) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(value)) : std::numeric_limits<int32_t>::min();
}

// Returns floor(code / 128 + 1 / 2), and leaves in `code` what is between it and that times 128: -64 to 63.
int32_t split_code(int32_t& code) {
  const int32_t upper = (code + 64) >> 7;
  code -= upper * 128;
  return upper;
}

int8_t saturate(int32_t code) { return static_cast<int8_t>(std::clamp(code, -128, 127)); }

}  // namespace

Activations reserve(Buffer& buffer, int64_t rows, int64_t blocks, int64_t tile, Format format, int activation_bits) {
  const int sums = activation_bits == 24 ? 2 : 1;
  int64_t padded_rows = 1;
  while (padded_rows < rows) padded_rows *= 2;
  if (padded_rows > tile) padded_rows = rows;
  const size_t count = padded_rows * blocks, codes = count * BLOCK * planes(activation_bits);
  const size_t bytes = codes + count * (2 * sizeof(float) + sums * sizeof(int32_t));
  uint8_t* base = buffer.reserve(bytes);
  if (padded_rows > rows) std::fill(base, base + bytes, 0);
  Activations a{rows, padded_rows, blocks, tile, format, reinterpret_cast<int8_t*>(base), nullptr, nullptr, nullptr};
  a.scales = reinterpret_cast<float*>(base + codes);
  a.scaled_sums = a.scales + count;
  a.initial_sums = reinterpret_cast<int32_t*>(a.scaled_sums + count);
  return a;
}

template <int ACTIVATION_BITS>
void quantize_row_reference(const float* x, const Activations& a, int64_t row) {
  const bool is_split = bits(a.format) == 4;
  const uint32_t zero = zero_point(a.format);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int64_t at = a.at(row, block);
    const float* in = x + (row * a.blocks + block) * BLOCK;
    int8_t* out = a.codes + at * BLOCK;
    float largest = 0;
    bool has_nan = false;
    for (int64_t i = 0; i < BLOCK; ++i) {
      largest = std::max(largest, std::abs(in[i]));
      has_nan |= std::isnan(in[i]);
    }
    const float per_scale = largest > SMALLEST_BLOCK ? largest_code(ACTIVATION_BITS) / largest : 0.0f;
    uint32_t upper_sum = 0, lower_sum = 0;  // those of an infinite x wrap around
    for (int64_t i = 0; i < BLOCK; ++i) {
      int32_t code = round_to_int(in[i] * per_scale);
      const int64_t place = is_split ? i / 2 + i % 2 * 16 : i;
      if constexpr (ACTIVATION_BITS == 24) {
        int32_t upper = split_code(code);
        lower_sum += code;
        out[2 * a.plane() * BLOCK + place] = saturate(code);
        code = upper;
        upper_sum += code;
        upper = split_code(code);
        out[a.plane() * BLOCK + place] = saturate(code);
        code = upper;
      } else {
        upper_sum += code;
      }
      out[place] = saturate(code);
    }
    a.initial_sums[at] = 0 - zero * upper_sum;
    if constexpr (ACTIVATION_BITS == 24) a.initial_sums[a.plane() + at] = 0 - zero * lower_sum;
    const auto sum = static_cast<int32_t>(ACTIVATION_BITS == 24 ? 128 * upper_sum + lower_sum : upper_sum);
    a.scales[at] = has_nan ? std::numeric_limits<float>::quiet_NaN() : largest / largest_code(ACTIVATION_BITS);
    a.scaled_sums[at] = a.scales[at] * sum;
  }
}

template void quantize_row_reference<8>(const float*, const Activations&, int64_t);
template void quantize_row_reference<24>(const float*, const Activations&, int64_t);

}  // namespace convllava
