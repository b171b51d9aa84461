// Tests of the kernels without ONNX Runtime: the scalar reference against double precision, and every instruction set
// that this processor has against the reference, bit for bit.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "gemm.h"
#include "image.h"
#include "isa.h"
#include "kernel_error.h"

using namespace convllava;

namespace {

constexpr Format FORMATS[] = {Format::INT4, Format::INT4_OFFSETS, Format::INT8};
Format format_of_trial(int trial) { return FORMATS[trial % 3]; }
int activation_bits_of_trial(int trial) { return trial / 3 % 2 ? 24 : 8; }

// A random matrix, its tensors as a graph has them. Bytes are at odd addresses, and end where the memory does.
struct Matrix {
  Format format;
  int64_t rows, columns, blocks, stored_blocks;
  std::vector<uint8_t> codes, scales;
  std::vector<float> units;

  Matrix(Format format, int64_t rows, int64_t columns, bool has_more_blocks)
      : format(format), rows(rows), columns(columns), blocks(columns / BLOCK), stored_blocks(blocks + has_more_blocks) {
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    codes.resize(1 + rows * stored_blocks * code_bytes(format));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(uniform(0, 255));
    scales.resize(1 + groups * blocks * scale_bytes(format));
    for (uint8_t& scale : scales) scale = static_cast<uint8_t>(uniform(0, 255));
    if (format != Format::INT4)
      for (size_t i = 2; i < scales.size(); i += 2) scales[i] &= 0xbb;  // float16 below 8: not infinite
    units.resize(groups * GROUP);
    for (float& unit : units) unit = std::uniform_real_distribution<float>(0.001f, 0.01f)(random_bits);
  }

  Tensor<uint8_t> codes_tensor() const { return {codes.data() + 1, {rows, stored_blocks, code_bytes(format)}}; }
  Tensor<uint8_t> scales_tensor() const {
    return {scales.data() + 1, {(rows + GROUP - 1) / GROUP, blocks, scale_bytes(format)}};
  }
  Tensor<float> units_tensor() const { return {units.data(), {static_cast<int64_t>(units.size())}}; }
  Weights view() const { return weights(codes_tensor(), scales_tensor(), units_tensor(), columns, bits(format)); }

  // The weight at (row, column), read from the stored bytes without the code under test.
  double weight(int64_t row, int64_t column) const {
    const int64_t block = column / BLOCK, at = row * stored_blocks * BLOCK + column;
    const uint8_t* numbers = scales.data() + 1 + (row / GROUP * blocks + block) * scale_bytes(format);
    const int code = format == Format::INT8 ? codes[1 + at] : codes[1 + at / 2] >> at % 2 * 4 & 15;
    const auto half = [&](int64_t i) { return from_half(numbers[2 * i] | numbers[2 * i + 1] << 8); };
    const int64_t lane = row % GROUP;
    if (format == Format::INT4)
      return static_cast<double>(units[row]) * static_cast<int8_t>(numbers[lane]) * (code - 8);
    if (format == Format::INT8) return static_cast<double>(units[row]) * half(lane) * (code - 128);
    return static_cast<double>(units[row]) * (static_cast<double>(half(lane)) * code + half(GROUP + lane));
  }
};

std::vector<float> random_rows(int64_t rows, int64_t columns) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * columns);
  for (float& value : x) value = normal(random_bits);
  return x;
}

// y of one or two matrices by one instruction set, its groups in two calls.
std::vector<float> gemm(const KernelSet& kernels, const Weights& w, const Weights* up, const std::vector<float>& x,
                        int64_t rows, int activation_bits) {
  Buffer activations, buffer;
  const Activations a = reserve(activations, rows, w.blocks, kernels.tile, w.format, activation_bits);
  for (int64_t row = 0; row < rows; ++row) kernels.quantize_row(activation_bits)(x.data(), a, row);
  std::vector<float> y(rows * w.rows);
  const GemmCall call{{&w, up}, a, y.data()};
  const int64_t middle = w.groups() / 2;
  kernels.gemm_groups(w.format, activation_bits)(call, 0, middle, buffer);
  kernels.gemm_groups(w.format, activation_bits)(call, middle, w.groups(), buffer);
  return y;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

void test_half_precision() {
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const double value =
        std::ldexp(half < 1024 ? half : 1024 + half % 1024, half < 1024 ? -24 : static_cast<int>(half / 1024) - 25);
    EXPECT(from_half(half) == value && from_half(half | 0x8000) == -value);
  }
  EXPECT(from_half(0xfc00) == -std::numeric_limits<float>::infinity());
  EXPECT(std::isnan(from_half(0x7e00)));
}

void test_reference_is_double_precisions() {
  for (int trial = 0; trial < 120; ++trial) {
    const Matrix stored(format_of_trial(trial), uniform(1, 30), BLOCK * uniform(1, 20), trial / 3 % 2);
    const int64_t rows = uniform(1, 4);
    const std::vector<float> x = random_rows(rows, stored.columns);
    for (int activation_bits : {8, 24}) {
      const std::vector<float> y = gemm(REFERENCE, stored.view(), nullptr, x, rows, activation_bits);
      double error = 0, norm = 0;
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < stored.rows; ++column) {
          double expected = 0, size = 0;
          for (int64_t k = 0; k < stored.columns; ++k) {
            const double product = x[row * stored.columns + k] * stored.weight(column, k);
            expected += product;
            size += product * product;
          }
          error += std::pow(y[row * stored.rows + column] - expected, 2);
          norm += size;
        }
      }
      EXPECT(std::sqrt(error / norm) < (activation_bits == 24 ? 1e-5 : 0.03));
    }
  }
}

void test_instruction_sets_give_the_references_bits() {
  const KernelSets supported = supported_kernels();
  EXPECT(supported.sets[supported.count - 1] == &REFERENCE);
  for (int trial = 0; trial < 480; ++trial) {
    const Format format = format_of_trial(trial);
    const int activation_bits = activation_bits_of_trial(trial);
    const bool is_gated = trial / 6 % 2, has_more_blocks = trial / 12 % 2;
    const int64_t columns = trial % 5 ? BLOCK * uniform(1, 12) : BLOCK, out = uniform(1, 70), rows = uniform(0, 19);
    const Matrix gate(format, out, columns, has_more_blocks), up(format, out, columns, has_more_blocks);
    const Weights w = gate.view(), w2 = up.view(), *second = is_gated ? &w2 : nullptr;
    std::vector<float> x = random_rows(rows, columns);
    const float scale = std::ldexp(1.0f, uniform(-120, 20));
    for (float& value : x) value *= scale;
    const std::vector<float> expected = gemm(REFERENCE, w, second, x, rows, activation_bits);
    for (int i = 0; i < supported.count; ++i) {
      const std::vector<float> found = gemm(*supported.sets[i], w, second, x, rows, activation_bits);
      if (!same_bits(found, expected)) std::fprintf(stderr, "%s, trial %d: ", supported.sets[i]->name, trial);
      EXPECT(same_bits(found, expected));
      if (rows) {  // and a row the same alone
        const std::vector<float> last(x.end() - columns, x.end());
        EXPECT(same_bits(gemm(*supported.sets[i], w, second, last, 1, activation_bits),
                         std::vector<float>(expected.end() - out, expected.end())));
      }
    }
  }
}

void test_what_is_not_finite_stays_so() {
  const float infinity = std::numeric_limits<float>::infinity();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) {
    for (Format format : FORMATS) {
      for (int activation_bits : {8, 24}) {
        const Matrix stored(format, 11, 96, false);
        const Weights w = stored.view();
        std::vector<float> x = random_rows(2, 96);
        const std::vector<float> expected = gemm(*supported.sets[i], w, nullptr, x, 2, activation_bits);
        for (float value : {std::nanf(""), infinity, -infinity}) {
          x[40] = value;
          const std::vector<float> y = gemm(*supported.sets[i], w, nullptr, x, 2, activation_bits);
          for (int64_t column = 0; column < 11; ++column) EXPECT(!std::isfinite(y[column]));
          EXPECT(!std::memcmp(&y[11], &expected[11], 11 * sizeof(float)));
        }
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
  const int64_t largest = std::numeric_limits<int64_t>::max();
  for (int trial = 0; trial < 200; ++trial) {
    const Matrix stored(format_of_trial(trial), uniform(1, 40), BLOCK * uniform(1, 12), trial / 3 % 2);
    const Tensor<uint8_t> codes = stored.codes_tensor(), scales = stored.scales_tensor();
    const Tensor<float> units = stored.units_tensor();
    const int64_t columns = stored.columns, its_bits = bits(stored.format);
    const Weights whole = stored.view();
    EXPECT(whole.rows == stored.rows && whole.blocks == stored.blocks && whole.format == stored.format);

    for (int64_t k : {-32L, 0L, 16L, columns - 1, columns + 1, columns + 64, largest - 31, -largest - 1})
      EXPECT(throws([&] { weights(codes, scales, units, k, its_bits); }));
    for (int64_t b : {0L, -4L, 2L, 16L, 12L - its_bits, (1L << 32) + its_bits, 1L << 62})
      EXPECT(throws([&] { weights(codes, scales, units, columns, b); }));
    for (size_t axis = 0; axis < 3; ++axis) {
      for (int64_t by : {-1, 1}) {
        Tensor<uint8_t> changed = codes;
        changed.shape[axis] += by * (axis == 0 ? GROUP : axis == 1 ? 2 : 1);
        const bool is_more = axis == 1 && by == 1;  // blocks, which are of no concern
        EXPECT(throws([&] { weights(changed, scales, units, columns, its_bits); }) != is_more);
        changed = scales;
        changed.shape[axis] += by;
        EXPECT(throws([&] { weights(codes, changed, units, columns, its_bits); }));
      }
    }
    for (int64_t by : {-1, 1}) {
      Tensor<float> changed = units;
      changed.shape[0] += by;
      EXPECT(throws([&] { weights(codes, scales, changed, columns, its_bits); }));
    }
    for (int64_t rank : {0, 1, 2, 4}) {
      Tensor<uint8_t> changed = codes;
      changed.shape.resize(rank, 1);
      EXPECT(throws([&] { weights(changed, scales, units, columns, its_bits); }));
      changed = scales;
      changed.shape.resize(rank, 1);
      EXPECT(throws([&] { weights(codes, changed, units, columns, its_bits); }));
    }
    EXPECT(throws([&] { weights({}, scales, units, columns, its_bits); }));
    EXPECT(throws([&] { weights(codes, {}, units, columns, its_bits); }));
    EXPECT(throws([&] { weights(codes, scales, {}, columns, its_bits); }));
  }
}

#ifdef CONVLLAVA_X86
// Inputs, in number, to outputs by Keys' cubic convolution, widened where there are fewer outputs.
std::vector<double> cubic_convolution(const std::vector<double>& in, int64_t outputs) {
  const double scale = static_cast<double>(in.size()) / outputs, width = std::max(scale, 1.0);
  std::vector<double> out;
  for (int64_t i = 0; i < outputs; ++i) {
    double sum = 0, total = 0;
    for (size_t k = 0; k < in.size(); ++k) {
      const double x = std::abs((k + 0.5 - (i + 0.5) * scale) / width);
      const double weight = x < 1   ? 1.5 * x * x * x - 2.5 * x * x + 1
                            : x < 2 ? -0.5 * x * x * x + 2.5 * x * x - 4 * x + 2
                                    : 0;
      sum += weight * in[k];
      total += weight;
    }
    out.push_back(std::min(std::max(sum / total, 0.0), 255.0));
  }
  return out;
}

// Rows and, transposed, columns; no vector is larger than what may be read or written.
void test_resizing_is_double_precisions() {
  if (!__builtin_cpu_supports("avx2")) return;
  for (int trial = 0; trial < 150; ++trial) {
    const int64_t rows = uniform(1, 9), width = uniform(1, 70), out_width = uniform(1, 70);
    std::vector<uint8_t> pixels(rows * width * 3), transposed(pixels.size());
    for (uint8_t& value : pixels) value = static_cast<uint8_t>(trial % 2 ? uniform(0, 255) : uniform(0, 1) * 255);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t x = 0; x < width; ++x)
        std::memcpy(&transposed[(x * rows + row) * 3], &pixels[(row * width + x) * 3], 3);
    std::vector<uint8_t> by_rows(rows * out_width * 3), by_columns(by_rows.size());
    EXPECT(convllava_resize_rows(pixels.data(), rows, width, by_rows.data(), out_width) == 0);
    EXPECT(convllava_resize_columns(transposed.data(), width, rows * 3, by_columns.data(), out_width) == 0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t channel = 0; channel < 3; ++channel) {
        std::vector<double> in;
        for (int64_t x = 0; x < width; ++x) in.push_back(pixels[(row * width + x) * 3 + channel]);
        const std::vector<double> expected = cubic_convolution(in, out_width);
        for (int64_t x = 0; x < out_width; ++x) {
          EXPECT(std::abs(by_rows[(row * out_width + x) * 3 + channel] - expected[x]) < 0.5001);
          EXPECT(by_columns[(x * rows + row) * 3 + channel] == by_rows[(row * out_width + x) * 3 + channel]);
        }
      }
    }
    std::vector<float> levels(3 * 256), values(rows * width * 3);
    for (size_t i = 0; i < levels.size(); ++i) levels[i] = static_cast<float>(i);
    convllava_normalize(pixels.data(), rows * width, levels.data(), values.data());
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t channel = i / (rows * width), pixel = i % (rows * width);
      EXPECT(values[i] == 256 * channel + pixels[3 * pixel + channel]);
    }
  }
}
#endif

}  // namespace

int main() {
  test_half_precision();
  test_reference_is_double_precisions();
  test_instruction_sets_give_the_references_bits();
  test_what_is_not_finite_stays_so();
  test_tensors_that_do_not_fit_together_are_refused();
#ifdef CONVLLAVA_X86
  test_resizing_is_double_precisions();
#endif
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) std::printf("%s ", supported.sets[i]->name);
  std::printf(failures ? "FAILED: %d\n" : "passed\n", failures);
  return failures != 0;
}
