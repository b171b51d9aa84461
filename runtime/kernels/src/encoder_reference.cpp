// An encoder's layers in scalar code: for processors without AVX2, and what the other instruction sets are tested
// against.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "encoder.h"

namespace convllava {
namespace {

using Floats = std::vector<float>;

// As LANES lanes add their numbers up, and then halves of them.
template <typename Value>
float sum_in_lanes(int64_t count, const Value& value) {
  float sums[LANES] = {};
  for (int64_t i = 0; i < count; ++i) sums[i % LANES] = value(i, sums[i % LANES]);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

Floats normalized(const float* x, const LayerNorm& norm, int64_t channels) {
  const float mean = sum_in_lanes(channels, [&](int64_t i, float sum) { return sum + x[i]; }) / channels;
  const float squares =
      sum_in_lanes(channels, [&](int64_t i, float sum) { return std::fma(x[i] - mean, x[i] - mean, sum); });
  const float inverse = 1 / std::sqrt(squares / channels + norm.epsilon);
  Floats y(channels);
  for (int64_t i = 0; i < channels; ++i)
    y[i] = std::fma((x[i] - mean) * inverse, norm.parameters[i], norm.parameters[channels + i]);
  return y;
}

float gelu(float x) {
  float c = x > -GELU_BOUND ? x : -GELU_BOUND;
  c = std::min(c, GELU_BOUND);
  const float s = std::fma(c * c, 2 / (GELU_BOUND * GELU_BOUND), -1.0f);
  float p = GELU_COEFFICIENTS[GELU_TERMS - 1];
  for (int i = GELU_TERMS - 2; i >= 0; --i) p = std::fma(p, s, GELU_COEFFICIENTS[i]);
  return x * std::fma(c, p, 0.5f);
}

Floats multiplied(const Int8Matrix& w, const float* x) {
  float lowest = x[0], highest = x[0];
  bool is_finite = true;
  for (int64_t k = 0; k < w.columns; ++k) {
    lowest = std::min(lowest, x[k]);
    highest = std::max(highest, x[k]);
    is_finite &= !std::isnan(x[k]);
  }
  lowest += 0.0f;  // never -0
  const float range = highest - lowest;
  is_finite &= range <= std::numeric_limits<float>::max();
  const float scale = is_finite ? range / 255 : std::numeric_limits<float>::quiet_NaN();
  const float per_range = is_finite && range > SMALLEST_BLOCK ? 255 / range : 0.0f;
  std::vector<int32_t> codes(w.columns);
  for (int64_t k = 0; is_finite && k < w.columns; ++k)
    codes[k] = static_cast<int32_t>(std::nearbyint((x[k] - lowest) * per_range));
  Floats y(w.rows);
  for (int64_t n = 0; n < w.rows; ++n) {
    const int8_t* weights = w.codes + n / PANEL * PANEL * w.columns + n % PANEL * 4;
    const float* p = w.parameters + n / LANES * 3 * LANES + n % LANES;
    int32_t dot = 0;
    for (int64_t k = 0; k < w.columns; ++k) dot += codes[k] * weights[k / 4 * PANEL * 4 + k % 4];
    y[n] = std::fma(static_cast<float>(dot) * scale, p[0], std::fma(lowest, p[LANES], p[2 * LANES]));
  }
  return y;
}

void block_tile(const BlockCall& call, int64_t begin, int64_t end, Buffer&) {
  const int64_t height = call.height, width = call.width, channels = call.channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / (width * height), row = at / width % height, column = at % width;
    Floats y(channels);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* weights = call.depthwise + channel / LANES * DEPTHWISE_ROWS * LANES + channel % LANES;
      float sum = weights[(DEPTHWISE_ROWS - 1) * LANES];
      for (int64_t i = 0; i < KERNEL * KERNEL; ++i) {
        const int64_t r = row + i / KERNEL - KERNEL / 2, c = column + i % KERNEL - KERNEL / 2;
        if (r < 0 || r >= height || c < 0 || c >= width) continue;
        sum = std::fma(call.x[((image * height + r) * width + c) * channels + channel], weights[i * LANES], sum);
      }
      y[channel] = sum;
    }
    Floats hidden = multiplied(call.fc1, normalized(y.data(), call.norm, channels).data());
    for (float& value : hidden) value = gelu(value);
    y = multiplied(call.fc2, hidden.data());
    for (int64_t i = 0; i < channels; ++i) call.y[at * channels + i] = call.x[at * channels + i] + y[i];
  }
}

void downsample_tile(const DownsampleCall& call, int64_t begin, int64_t end, Buffer&) {
  const int64_t height = call.height / 2, width = call.width / 2, channels = call.channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / (width * height), row = at / width % height, column = at % width;
    Floats patch;
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t pixel = (image * call.height + 2 * row + i / 2) * call.width + 2 * column + i % 2;
      const Floats part = normalized(call.x + pixel * channels, call.norm, channels);
      patch.insert(patch.end(), part.begin(), part.end());
    }
    const Floats y = multiplied(call.matrix, patch.data());
    std::copy(y.begin(), y.end(), call.y + at * call.matrix.rows);
  }
}

void stem_tile(const StemCall& call, int64_t begin, int64_t end, Buffer&) {
  const int64_t height = call.height / PATCH, width = call.width / PATCH, channels = call.channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / (width * height), row = at / width % height, column = at % width;
    Floats y(channels);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* weights = call.weights + channel / LANES * STEM_ROWS * LANES + channel % LANES;
      float sum = weights[(STEM_ROWS - 1) * LANES];
      for (int64_t i = 0; i < STEM_ROWS - 1; ++i) {
        const int64_t color = i / (PATCH * PATCH), r = row * PATCH + i / PATCH % PATCH, c = column * PATCH + i % PATCH;
        sum = std::fma(weights[i * LANES], call.x[((image * COLORS + color) * call.height + r) * call.width + c], sum);
      }
      y[channel] = sum;
    }
    y = normalized(y.data(), call.norm, channels);
    std::copy(y.begin(), y.end(), call.y + at * channels);
  }
}

void linear_tile(const LinearCall& call, int64_t begin, int64_t end, Buffer&) {
  for (int64_t row = begin; row < end; ++row) {
    Floats y = multiplied(call.matrix, call.x + row * call.matrix.columns);
    if (call.has_gelu)
      for (float& value : y) value = gelu(value);
    std::copy(y.begin(), y.end(), call.y + row * call.matrix.rows);
  }
}

}  // namespace

const EncoderKernels ENCODER_REFERENCE{block_tile, downsample_tile, stem_tile, linear_tile};

}  // namespace convllava
