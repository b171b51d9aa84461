// Tests of an encoder's layers without ONNX Runtime: the scalar reference against double precision, and every
// instruction set that this processor has against the reference, bit for bit.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "encoder.h"
#include "kernel_error.h"

using namespace convllava;

namespace {

std::vector<float> normal(int64_t count, float deviation = 1) {
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random_bits);
  return values;
}

struct Matrix {
  int64_t rows, columns;
  std::vector<int8_t> codes;
  std::vector<float> parameters;

  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns), parameters(normal(3 * rows, 0.5f)) {
    codes.resize((rows + PANEL - 1) / PANEL * PANEL * columns);
    for (int8_t& code : codes) code = static_cast<int8_t>(uniform(-127, 127));
    for (int64_t n = 0; n < rows; ++n) {  // sums are those of the codes
      float* scale = &parameters[n / LANES * 3 * LANES + n % LANES];
      *scale = std::uniform_real_distribution<float>(0.5f, 1.0f)(random_bits) / 73 / std::sqrt(float(columns));
      double sum = 0;
      for (int64_t k = 0; k < columns; ++k) sum += code(n, k);
      scale[LANES] = static_cast<float>(*scale * sum);
    }
  }
  int code(int64_t n, int64_t k) const {
    return codes[(n / PANEL * columns / 4 + k / 4) * PANEL * 4 + n % PANEL * 4 + k % 4];
  }
  double parameter(int64_t n, int64_t which) const { return parameters[(n / LANES * 3 + which) * LANES + n % LANES]; }
  Tensor<int8_t> codes_tensor() const { return {codes.data(), {(rows + PANEL - 1) / PANEL, columns / 4, PANEL, 4}}; }
  Tensor<float> parameters_tensor() const { return {parameters.data(), {rows / LANES, 3, LANES}}; }
  Int8Matrix view() const { return int8_matrix(codes_tensor(), parameters_tensor()); }
  double dot(int64_t n, const std::vector<double>& x) const {
    double sum = 0;
    for (int64_t k = 0; k < columns; ++k) sum += x[k] * code(n, k);
    return sum * parameter(n, 0) + parameter(n, 2);
  }
};

std::vector<double> normalized(const std::vector<double>& x, const std::vector<float>& parameters, double epsilon) {
  double mean = 0, variance = 0;
  for (double value : x) mean += value / x.size();
  for (double value : x) variance += (value - mean) * (value - mean) / x.size();
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    y[i] = (x[i] - mean) / std::sqrt(variance + epsilon) * parameters[i] + parameters[x.size() + i];
  return y;
}

double gelu(double x) { return x * 0.5 * std::erfc(-x * std::sqrt(0.5)); }

double signal_to_noise(const std::vector<float>& found, const std::vector<double>& expected) {  // dB
  double noise = 0, signal = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    noise += std::pow(found[i] - expected[i], 2);
    signal += expected[i] * expected[i];
  }
  return 10 * std::log10(signal / noise);
}

// Random layers of one size, images in a batch.
struct Layers {
  int64_t batch, height, width, channels;
  std::vector<float> x, pixels, depthwise, stem, norm;
  Matrix fc1, fc2, downsample;

  Layers(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t out)
      : batch(batch),
        height(height),
        width(width),
        channels(channels),
        x(normal(batch * height * width * channels)),
        pixels(normal(batch * height * width * COLORS)),
        depthwise(normal(channels * DEPTHWISE_ROWS, 0.2f)),
        stem(normal(channels * STEM_ROWS, 0.2f)),
        norm(normal(2 * channels)),
        fc1(out, channels),
        fc2(channels, out),
        downsample(out, 4 * channels) {}

  LayerNorm layer_norm() const { return {norm.data(), 1e-6f}; }
  BlockCall block(float* y) const {
    return {x.data(), y, height, width, channels, depthwise.data(), layer_norm(), fc1.view(), fc2.view()};
  }
  DownsampleCall down(float* y) const {
    return {x.data(), y, height, width, channels, layer_norm(), downsample.view()};
  }
  StemCall patches(float* y) const { return {pixels.data(), y, height, width, channels, stem.data(), layer_norm()}; }
  LinearCall linear(float* y, bool has_gelu) const { return {x.data(), y, fc1.view(), has_gelu}; }

  std::vector<double> pixel(int64_t image, int64_t row, int64_t column) const {
    const float* from = &x[((image * height + row) * width + column) * channels];
    return std::vector<double>(from, from + channels);
  }
};

// `rows` rows of y, of `width` numbers, in tiles of `size` rows.
template <typename Call>
std::vector<float> run(Tile<Call> tile, Call call, int64_t rows, int64_t width, int64_t size) {
  std::vector<float> y(rows * width);
  call.y = y.data();
  Buffer buffer;
  for (int64_t begin = 0; begin < rows; begin += size) tile(call, begin, std::min(begin + size, rows), buffer);
  return y;
}

// y of all layers, one after the other.
std::vector<float> run_all(const EncoderKernels& kernels, const Layers& layers, int64_t size) {
  const int64_t pixels = layers.batch * layers.height * layers.width, out = layers.fc1.rows;
  const int64_t halves = layers.batch * (layers.height / 2) * (layers.width / 2);
  const int64_t patches = layers.batch * (layers.height / PATCH) * (layers.width / PATCH);
  std::vector<float> all;
  for (const std::vector<float>& y : {run(kernels.block, layers.block(nullptr), pixels, layers.channels, size),
                                      run(kernels.downsample, layers.down(nullptr), halves, out, size),
                                      run(kernels.stem, layers.patches(nullptr), patches, layers.channels, size),
                                      run(kernels.linear, layers.linear(nullptr, false), pixels, out, size),
                                      run(kernels.linear, layers.linear(nullptr, true), pixels, out, size)})
    all.insert(all.end(), y.begin(), y.end());
  return all;
}

void test_reference_is_double_precisions() {
  for (int trial = 0; trial < 6; ++trial) {
    const Layers l(uniform(1, 2), uniform(4, 9), uniform(4, 9), LANES * uniform(1, 4), LANES * uniform(1, 7));
    const int64_t pixels = l.batch * l.height * l.width, out = l.fc1.rows;
    std::vector<double> block, down, stem, linear, activated;
    for (int64_t at = 0; at < pixels; ++at) {
      const int64_t image = at / (l.height * l.width), row = at / l.width % l.height, column = at % l.width;
      const std::vector<double> own = l.pixel(image, row, column);
      std::vector<double> y(l.channels), hidden(out);
      for (int64_t c = 0; c < l.channels; ++c) {
        const float* taps = &l.depthwise[(c / LANES * DEPTHWISE_ROWS) * LANES + c % LANES];
        y[c] = taps[KERNEL * KERNEL * LANES];
        for (int64_t i = 0; i < KERNEL * KERNEL; ++i) {
          const int64_t r = row + i / KERNEL - 3, s = column + i % KERNEL - 3;
          if (r >= 0 && r < l.height && s >= 0 && s < l.width) y[c] += l.pixel(image, r, s)[c] * taps[i * LANES];
        }
      }
      y = normalized(y, l.norm, 1e-6);
      for (int64_t n = 0; n < out; ++n) hidden[n] = gelu(l.fc1.dot(n, y));
      for (int64_t c = 0; c < l.channels; ++c) block.push_back(own[c] + l.fc2.dot(c, hidden));
      for (int64_t n = 0; n < out; ++n) linear.push_back(l.fc1.dot(n, own));
      for (int64_t n = 0; n < out; ++n) activated.push_back(gelu(l.fc1.dot(n, own)));
    }
    for (int64_t at = 0; at < l.batch * (l.height / 2) * (l.width / 2); ++at) {
      const int64_t width = l.width / 2, height = l.height / 2, image = at / (width * height);
      std::vector<double> patch;
      for (int64_t i = 0; i < 4; ++i) {
        const auto part =
            normalized(l.pixel(image, at / width % height * 2 + i / 2, at % width * 2 + i % 2), l.norm, 1e-6);
        patch.insert(patch.end(), part.begin(), part.end());
      }
      for (int64_t n = 0; n < out; ++n) down.push_back(l.downsample.dot(n, patch));
    }
    for (int64_t at = 0; at < l.batch * (l.height / PATCH) * (l.width / PATCH); ++at) {
      const int64_t width = l.width / PATCH, height = l.height / PATCH, image = at / (width * height);
      std::vector<double> y(l.channels);
      for (int64_t c = 0; c < l.channels; ++c) {
        const float* weights = &l.stem[(c / LANES * STEM_ROWS) * LANES + c % LANES];
        y[c] = weights[(STEM_ROWS - 1) * LANES];
        for (int64_t i = 0; i < STEM_ROWS - 1; ++i) {
          const int64_t r = at / width % height * PATCH + i / PATCH % PATCH, s = at % width * PATCH + i % PATCH;
          y[c] += weights[i * LANES] * l.pixels[((image * COLORS + i / 16) * l.height + r) * l.width + s];
        }
      }
      y = normalized(y, l.norm, 1e-6);
      stem.insert(stem.end(), y.begin(), y.end());
    }
    const EncoderKernels& k = ENCODER_REFERENCE;
    EXPECT(signal_to_noise(run(k.block, l.block(nullptr), pixels, l.channels, 5), block) > 38);
    EXPECT(signal_to_noise(run(k.downsample, l.down(nullptr), down.size() / out, out, 5), down) > 38);
    EXPECT(signal_to_noise(run(k.stem, l.patches(nullptr), stem.size() / l.channels, l.channels, 5), stem) > 110);
    EXPECT(signal_to_noise(run(k.linear, l.linear(nullptr, false), pixels, out, 5), linear) > 38);
    EXPECT(signal_to_noise(run(k.linear, l.linear(nullptr, true), pixels, out, 5), activated) > 38);
  }
}

// A row whose codes are exact: what is left is gelu's own error.
void test_gelu() {
  const int64_t count = 4096;
  Matrix identity(LANES, LANES);
  std::fill(identity.codes.begin(), identity.codes.end(), int8_t{0});
  std::fill(identity.parameters.begin(), identity.parameters.end(), 0.0f);
  const std::vector<float> x(count * LANES, 1.0f);
  for (int64_t row = 0; row < count; row += 64) {
    for (int64_t n = 0; n < LANES; ++n) identity.parameters[2 * LANES + n] = (row + n) / 256.0f - 8;
    std::vector<float> y(LANES);
    Buffer buffer;
    ENCODER_REFERENCE.linear({x.data(), y.data(), identity.view(), true}, 0, 1, buffer);
    for (int64_t n = 0; n < LANES; ++n) EXPECT(std::abs(y[n] - gelu((row + n) / 256.0 - 8)) < 1.5e-6);
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

void test_instruction_sets_give_the_references_bits() {
  const KernelSets supported = supported_kernels();
  for (int trial = 0; trial < 30; ++trial) {
    Layers layers(uniform(1, 3), uniform(4, 13), uniform(4, 21), LANES * uniform(1, 5), LANES * uniform(1, 9));
    const float scale = std::ldexp(1.0f, uniform(-60, 20));
    for (float& value : layers.x) value *= scale;
    const std::vector<float> expected = run_all(ENCODER_REFERENCE, layers, 1000);
    for (int i = 0; i < supported.count; ++i) {
      for (int64_t size : {int64_t{1000}, uniform(1, 40)}) {
        const bool same = same_bits(run_all(encoder_kernels(*supported.sets[i]), layers, size), expected);
        if (!same) std::fprintf(stderr, "%s, trial %d: ", supported.sets[i]->name, trial);
        EXPECT(same);
      }
    }
  }
}

void test_what_is_not_finite_makes_its_rows_nan() {
  const float infinity = std::numeric_limits<float>::infinity();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) {
    const EncoderKernels& kernels = encoder_kernels(*supported.sets[i]);
    Layers layers(2, 9, 10, 48, 80);
    const int64_t row = 4, column = 2;  // of the first image
    const std::vector<float> expected = run(kernels.block, layers.block(nullptr), 180, 48, 40);
    const std::vector<float> linear = run(kernels.linear, layers.linear(nullptr, true), 180, 80, 40);
    for (float value : {std::nanf(""), infinity, -infinity}) {
      layers.x[(row * 10 + column) * 48 + 17] = value;
      const std::vector<float> y = run(kernels.block, layers.block(nullptr), 180, 48, 40);
      for (int64_t at = 0; at < 180; ++at) {
        const bool near = at < 90 && std::abs(at / 10 - row) <= 3 && std::abs(at % 10 - column) <= 3;
        for (int64_t c = 0; c < 48; ++c)
          EXPECT(near ? std::isnan(y[at * 48 + c]) : y[at * 48 + c] == expected[at * 48 + c]);
      }
      const std::vector<float> z = run(kernels.linear, layers.linear(nullptr, true), 180, 80, 40);
      const std::vector<float> down = run(kernels.downsample, layers.down(nullptr), 40, 80, 40);
      for (int64_t n = 0; n < 80; ++n) {
        EXPECT(std::isnan(z[(row * 10 + column) * 80 + n]) && z[n] == linear[n]);
        EXPECT(std::isnan(down[(row / 2 * 5 + column / 2) * 80 + n]) && !std::isnan(down[n]));
      }
    }
  }
}

template <typename Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const KernelError&) {
    return true;
  }
  return false;
}

void test_tensors_that_do_not_fit_together_are_refused() {
  const Matrix matrix(80, 48);
  const Int8Matrix whole = matrix.view();
  EXPECT(whole.rows == 80 && whole.columns == 48);
  for (size_t axis = 0; axis < 4; ++axis) {
    for (int64_t by : {-1, 1}) {
      Tensor<int8_t> codes = matrix.codes_tensor();
      codes.shape[axis] += by;
      EXPECT(throws([&] { int8_matrix(codes, matrix.parameters_tensor()); }));
    }
  }
  for (size_t axis = 1; axis < 3; ++axis) {
    Tensor<float> parameters = matrix.parameters_tensor();
    ++parameters.shape[axis];
    EXPECT(throws([&] { int8_matrix(matrix.codes_tensor(), parameters); }));
  }
  for (int64_t rows : {0L, 4L, 7L}) {
    Tensor<float> parameters = matrix.parameters_tensor();
    parameters.shape[0] = rows;
    EXPECT(throws([&] { int8_matrix(matrix.codes_tensor(), parameters); }));
  }
  EXPECT(throws([&] { int8_matrix({}, matrix.parameters_tensor()); }));
  EXPECT(throws([&] { int8_matrix(matrix.codes_tensor(), {}); }));
  EXPECT(throws([&] { layer_norm({matrix.parameters.data(), {2, 47}}, 1e-6f, 48); }));
  EXPECT(throws([&] { layer_norm({}, 1e-6f, 48); }));
  EXPECT(throws([&] { vertical({matrix.parameters.data(), {3, 49, 16}}, 50); }));
  EXPECT(throws([&] { vertical({}, 50); }));
}

void test_tiles() {
  for (int trial = 0; trial < 1000; ++trial) {
    const int64_t rows = uniform(1, 200000), columns = LANES * uniform(1, 1000), size = tile_rows(rows, columns);
    EXPECT(size > 0 && size % ROW_GROUP == 0 && size <= 96);
  }
}

}  // namespace

int main() {
  test_reference_is_double_precisions();
  test_gelu();
  test_instruction_sets_give_the_references_bits();
  test_what_is_not_finite_makes_its_rows_nan();
  test_tensors_that_do_not_fit_together_are_refused();
  test_tiles();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) std::printf("%s ", supported.sets[i]->name);
  std::printf(failures ? "FAILED: %d\n" : "passed\n", failures);
  return failures != 0;
}
