// Layers of an encoder for x86, templates over an instruction set `Isa` with vectors of LANES floats or sums:
//
//   Isa::ROWS, VECTORS  rows of activations and vectors of a panel whose sums are in registers at a time
//   Isa::PIXELS         pixels of a row of the image that a depthwise convolution computes at a time
//   Isa::Weights        four columns of LANES rows of a matrix, Isa::Columns the four of a row of activations
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "encoder.h"
#include "encoder_lanes_avx2.h"

namespace convllava {
namespace {

// Rows of activations, x = minima + scales * codes. Groups of ROW_GROUP rows lie together: [groups, columns / LANES,
// ROW_GROUP, LANES].
struct QuantizedRows {
  int64_t columns;
  uint8_t* codes;
  float *scales, *minima;

  uint8_t* at(int64_t row) const { return codes + row / ROW_GROUP * ROW_GROUP * columns + row % ROW_GROUP * LANES; }
};

// Memory of one tile, handed out piece by piece at multiples of 64 bytes.
class Arena {
 public:
  static int64_t padded(int64_t rows) { return (rows + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP; }
  static size_t quantized(int64_t rows, int64_t columns) {
    return whole(padded(rows) * columns) + 2 * whole(padded(rows) * sizeof(float));
  }
  static size_t floats(int64_t count) { return whole(count * sizeof(float)); }

  Arena(Buffer& buffer, size_t bytes) : next_(buffer.reserve(bytes)) {}
  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count * sizeof(float))); }
  QuantizedRows take_quantized(int64_t rows, int64_t columns) {
    uint8_t* codes = take(padded(rows) * columns);
    float* scales = take_floats(padded(rows));
    return {columns, codes, scales, take_floats(padded(rows))};
  }

 private:
  static size_t whole(size_t bytes) { return (bytes + 63) / 64 * 64; }
  uint8_t* take(size_t bytes) {
    uint8_t* taken = next_;
    next_ += whole(bytes);
    return taken;
  }
  uint8_t* next_;
};

template <class Isa>
CONVLLAVA_INLINE void quantize_row(const float* x, const QuantizedRows& q, int64_t row) {
  auto lowest = Isa::load(x), highest = lowest;
  auto nans = Isa::unordered(lowest);
  for (int64_t i = LANES; i < q.columns; i += LANES) {
    const auto v = Isa::load(x + i);
    lowest = Isa::min(lowest, v);
    highest = Isa::max(highest, v);
    nans = Isa::either(nans, Isa::unordered(v));
  }
  const float minimum = Isa::lowest(lowest) + 0.0f, range = Isa::highest(highest) - minimum;  // never -0
  const bool is_finite = !Isa::any(nans) && range <= std::numeric_limits<float>::max();
  q.minima[row] = minimum;
  q.scales[row] = is_finite ? range / 255 : std::numeric_limits<float>::quiet_NaN();
  const auto offset = Isa::broadcast(minimum);
  const auto per_range = Isa::broadcast(is_finite && range > SMALLEST_BLOCK ? 255 / range : 0.0f);
  uint8_t* codes = q.at(row);
  for (int64_t i = 0; i < q.columns; i += LANES, codes += ROW_GROUP * LANES)
    Isa::store_codes(codes, Isa::multiply(Isa::subtract(Isa::load(x + i), offset), per_range));
}

template <class Isa>
CONVLLAVA_INLINE void normalize_row(const float* x, const LayerNorm& norm, int64_t channels, float* y) {
  auto sums = Isa::zero_floats(), squares = sums;
  for (int64_t i = 0; i < channels; i += LANES) sums = Isa::add(sums, Isa::load(x + i));
  const auto mean = Isa::broadcast(Isa::sum(sums) / channels);
  for (int64_t i = 0; i < channels; i += LANES) {
    const auto centered = Isa::subtract(Isa::load(x + i), mean);
    squares = Isa::fma(centered, centered, squares);
  }
  const auto inverse = Isa::broadcast(1 / std::sqrt(Isa::sum(squares) / channels + norm.epsilon));
  for (int64_t i = 0; i < channels; i += LANES) {
    const auto normal = Isa::multiply(Isa::subtract(Isa::load(x + i), mean), inverse);
    Isa::store(y + i, Isa::fma(normal, Isa::load(norm.parameters + i), Isa::load(norm.parameters + channels + i)));
  }
}

template <class Isa>
CONVLLAVA_INLINE typename Isa::Floats gelu(typename Isa::Floats x) {
  const auto c = Isa::min(Isa::max(x, Isa::broadcast(-GELU_BOUND)), Isa::broadcast(GELU_BOUND));
  const auto s = Isa::fma(Isa::multiply(c, c), Isa::broadcast(2 / (GELU_BOUND * GELU_BOUND)), Isa::broadcast(-1.0f));
  auto p = Isa::broadcast(GELU_COEFFICIENTS[GELU_TERMS - 1]);
#pragma GCC unroll 16
  for (int i = GELU_TERMS - 2; i >= 0; --i) p = Isa::fma(p, s, Isa::broadcast(GELU_COEFFICIENTS[i]));
  return Isa::multiply(x, Isa::fma(c, p, Isa::broadcast(0.5f)));
}

// Sums of the codes of ROWS rows from `codes` on, times those of VECTORS * LANES rows of a matrix from `weights` on.
template <class Isa>
CONVLLAVA_INLINE void dot_rows(const int8_t* weights, const uint8_t* codes, int64_t columns,
                               typename Isa::Ints (&dots)[Isa::ROWS][Isa::VECTORS]) {
  typename Isa::Ints sums[Isa::ROWS][Isa::VECTORS];  // in registers: unlike `dots`, which is read by a variable index
#pragma GCC unroll 16
  for (int m = 0; m < Isa::ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Isa::VECTORS; ++v) sums[m][v] = Isa::zero_ints();
  }
  for (int64_t k = 0; k < columns; k += LANES, codes += ROW_GROUP * LANES) {
#pragma GCC unroll 4
    for (int four = 0; four < LANES / 4; ++four, weights += PANEL * 4) {
      typename Isa::Weights w[Isa::VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < Isa::VECTORS; ++v) w[v] = Isa::load_weights(weights + v * LANES * 4);
#pragma GCC unroll 16
      for (int m = 0; m < Isa::ROWS; ++m) {
        const typename Isa::Columns x = Isa::broadcast_columns(codes + m * LANES + 4 * four);
#pragma GCC unroll 2
        for (int v = 0; v < Isa::VECTORS; ++v) sums[m][v] = Isa::dot(sums[m][v], w[v], x);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Isa::ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < Isa::VECTORS; ++v) dots[m][v] = sums[m][v];
  }
}

// Calls use(row, channel, y in LANES channels from there on) for the first `rows` rows of y = x W^T + bias.
template <class Isa, class Use>
CONVLLAVA_INLINE void matmul(const Int8Matrix& w, const QuantizedRows& x, int64_t rows, const Use& use) {
  static_assert(ROW_GROUP % Isa::ROWS == 0 && PANEL / LANES % Isa::VECTORS == 0);
  for (int64_t panel = 0; panel < w.rows; panel += PANEL) {
    const int64_t end = std::min(panel + PANEL, w.rows);
    for (int64_t first = 0; first < rows; first += Isa::ROWS) {
      const int64_t last = std::min<int64_t>(first + Isa::ROWS, rows);
      for (int64_t channel = panel; channel < end; channel += Isa::VECTORS * LANES) {
        typename Isa::Ints dots[Isa::ROWS][Isa::VECTORS];
        const int8_t* weights = w.codes + panel * w.columns + (channel - panel) * 4;
        dot_rows<Isa>(weights, x.at(first), w.columns, dots);
        for (int64_t row = first; row < last; ++row) {
          const auto scale = Isa::broadcast(x.scales[row]), minimum = Isa::broadcast(x.minima[row]);
#pragma GCC unroll 2
          for (int v = 0; v < Isa::VECTORS; ++v) {
            if (channel + v * LANES >= end) break;
            const float* p = w.parameters + 3 * (channel + v * LANES);
            const auto rest = Isa::fma(minimum, Isa::load(p + LANES), Isa::load(p + 2 * LANES));
            const auto scaled = Isa::multiply(Isa::to_floats(dots[row - first][v]), scale);
            use(row, channel + v * LANES, Isa::fma(scaled, Isa::load(p), rest));
          }
        }
      }
    }
  }
}

// y [PIXELS, channels] of the depthwise convolution at `PIXELS` pixels of a row from (row, column) on. x: the image.
template <class Isa, int PIXELS>
CONVLLAVA_INLINE void depthwise_pixels(const BlockCall& call, const float* x, int64_t row, int64_t column, float* y) {
  const int64_t channels = call.channels, left = column - KERNEL / 2;
  for (int64_t channel = 0; channel < channels; channel += LANES) {
    const float* weights = call.depthwise + channel * DEPTHWISE_ROWS;
    typename Isa::Floats sums[PIXELS];
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p) sums[p] = Isa::load(weights + (DEPTHWISE_ROWS - 1) * LANES);
    for (int64_t i = 0; i < KERNEL; ++i, weights += KERNEL * LANES) {
      const int64_t from = row + i - KERNEL / 2;
      if (from < 0 || from >= call.height) continue;
      const float* in = x + (from * call.width + left) * channels + channel;
#pragma GCC unroll 16
      for (int j = 0; j < PIXELS + KERNEL - 1; ++j) {
        if (left + j < 0 || left + j >= call.width) continue;
        const auto v = Isa::load(in + j * channels);
        _mm_prefetch(reinterpret_cast<const char*>(in + j * channels + LANES), _MM_HINT_T0);  // too many runs for it
#pragma GCC unroll 8
        for (int k = 0; k < KERNEL; ++k)
          if (k <= j && j < k + PIXELS) sums[j - k] = Isa::fma(v, Isa::load(weights + k * LANES), sums[j - k]);
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < PIXELS; ++p) Isa::store(y + p * channels + channel, sums[p]);
  }
}

// y [end - begin, channels]: of the pixels `begin` to `end` over all images.
template <class Isa>
void depthwise(const BlockCall& call, int64_t begin, int64_t end, float* y) {
  const int64_t width = call.width, pixels = call.height * width;
  for (int64_t at = begin, done; at < end; at += done, y += done * call.channels) {
    const float* image = call.x + at / pixels * pixels * call.channels;
    const int64_t row = at % pixels / width, column = at % width, left = std::min(end - at, width - column);
    if (left >= Isa::PIXELS) {
      depthwise_pixels<Isa, Isa::PIXELS>(call, image, row, column, y);
      done = Isa::PIXELS;
    } else if (left >= 4) {
      depthwise_pixels<Isa, 4>(call, image, row, column, y);
      done = 4;
    } else {
      depthwise_pixels<Isa, 1>(call, image, row, column, y);
      done = 1;
    }
  }
}

template <class Isa>
void block_tile(const BlockCall& call, int64_t begin, int64_t end, Buffer& buffer) {
  const int64_t rows = end - begin, channels = call.channels, hidden = call.fc1.rows;
  const int64_t widest = std::max(channels, hidden);
  Arena arena(buffer, Arena::floats(rows * widest) + Arena::quantized(rows, channels) + Arena::quantized(rows, hidden));
  float* values = arena.take_floats(rows * widest);
  const QuantizedRows narrow = arena.take_quantized(rows, channels), wide = arena.take_quantized(rows, hidden);
  depthwise<Isa>(call, begin, end, values);
  for (int64_t row = 0; row < rows; ++row) {
    normalize_row<Isa>(values + row * channels, call.norm, channels, values + row * channels);
    quantize_row<Isa>(values + row * channels, narrow, row);
  }
  matmul<Isa>(call.fc1, narrow, rows, [&](int64_t row, int64_t channel, typename Isa::Floats y) {
    Isa::store(values + row * hidden + channel, gelu<Isa>(y));
  });
  for (int64_t row = 0; row < rows; ++row) quantize_row<Isa>(values + row * hidden, wide, row);
  matmul<Isa>(call.fc2, wide, rows, [&](int64_t row, int64_t channel, typename Isa::Floats y) {
    const int64_t at = (begin + row) * channels + channel;
    Isa::store(call.y + at, Isa::add(Isa::load(call.x + at), y));
  });
}

template <class Isa>
void downsample_tile(const DownsampleCall& call, int64_t begin, int64_t end, Buffer& buffer) {
  const int64_t rows = end - begin, channels = call.channels, width = call.width / 2, height = call.height / 2;
  Arena arena(buffer, Arena::floats(4 * channels) + Arena::quantized(rows, 4 * channels));
  float* values = arena.take_floats(4 * channels);
  const QuantizedRows quantized = arena.take_quantized(rows, 4 * channels);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = begin + row, image = at / (width * height), y = at / width % height, x = at % width;
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t pixel = (image * call.height + 2 * y + i / 2) * call.width + 2 * x + i % 2;
      normalize_row<Isa>(call.x + pixel * channels, call.norm, channels, values + i * channels);
    }
    quantize_row<Isa>(values, quantized, row);
  }
  matmul<Isa>(call.matrix, quantized, rows, [&](int64_t row, int64_t channel, typename Isa::Floats y) {
    Isa::store(call.y + (begin + row) * call.matrix.rows + channel, y);
  });
}

template <class Isa>
void stem_tile(const StemCall& call, int64_t begin, int64_t end, Buffer&) {
  const int64_t width = call.width / PATCH, height = call.height / PATCH, channels = call.channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / (width * height), y = at / width % height, x = at % width;
    float patch[STEM_ROWS - 1], *out = call.y + at * channels;
    for (int64_t row = 0; row < COLORS * PATCH; ++row) {
      const int64_t line = (image * COLORS + row / PATCH) * call.height + y * PATCH + row % PATCH;
      std::memcpy(patch + row * PATCH, call.x + line * call.width + x * PATCH, PATCH * sizeof(float));
    }
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      const float* weights = call.weights + channel * STEM_ROWS;
      auto sum = Isa::load(weights + (STEM_ROWS - 1) * LANES);
#pragma GCC unroll 8
      for (int64_t i = 0; i < STEM_ROWS - 1; ++i)
        sum = Isa::fma(Isa::load(weights + i * LANES), Isa::broadcast(patch[i]), sum);
      Isa::store(out + channel, sum);
    }
    normalize_row<Isa>(out, call.norm, channels, out);
  }
}

template <class Isa>
void linear_tile(const LinearCall& call, int64_t begin, int64_t end, Buffer& buffer) {
  const int64_t rows = end - begin, columns = call.matrix.columns;
  Arena arena(buffer, Arena::quantized(rows, columns));
  const QuantizedRows quantized = arena.take_quantized(rows, columns);
  for (int64_t row = 0; row < rows; ++row) quantize_row<Isa>(call.x + (begin + row) * columns, quantized, row);
  matmul<Isa>(call.matrix, quantized, rows, [&](int64_t row, int64_t channel, typename Isa::Floats y) {
    Isa::store(call.y + (begin + row) * call.matrix.rows + channel, call.has_gelu ? gelu<Isa>(y) : y);
  });
}

template <class Isa>
constexpr EncoderKernels encoder_kernel_set() {
  return {block_tile<Isa>, downsample_tile<Isa>, stem_tile<Isa>, linear_tile<Isa>};
}

}  // namespace
}  // namespace convllava
