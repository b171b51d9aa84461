// Tests of the kernels without ONNX Runtime: the packing against the stored format, the scalar reference against double
// precision, and every instruction set that this processor has against the reference, bit for bit.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gemm.h"
#include "kernel_error.h"

using namespace convllava;

namespace {

int failures = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

std::mt19937 random_bits(0);

int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

// A random matrix in the stored format.
struct Matrix {
  int64_t rows, columns, blocks;
  int bits;
  bool has_means;
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;

  Matrix(int64_t rows, int64_t columns, int bits, bool has_zeros, bool has_means)
      : rows(rows), columns(columns), blocks(columns / BLOCK), bits(bits), has_means(has_means) {
    if (has_means) blocks += (blocks + BLOCK - 1) / BLOCK;
    codes.resize(rows * blocks * BLOCK * bits / 8);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(uniform(0, 255));
    if (has_zeros) zeros.resize(rows * (bits == 8 ? blocks : (blocks + 1) / 2));
    for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(uniform(0, 255));
    scales.resize(rows * blocks);
    for (float& scale : scales) scale = std::uniform_real_distribution<float>(0.001f, 0.01f)(random_bits);
  }

  StoredMatrix view() const {
    return {codes.data(), scales.data(), zeros.empty() ? nullptr : zeros.data(), rows, blocks, bits};
  }

  // The weight at (row, column), read from the stored bytes without the code under test.
  double stored_weight(int64_t row, int64_t column) const {
    const int64_t block = column / BLOCK, at = row * blocks * BLOCK + column;
    int zero = bits == 8 ? 128 : 8;
    if (!zeros.empty())
      zero =
          bits == 8 ? zeros[row * blocks + block] : zeros[row * ((blocks + 1) / 2) + block / 2] >> block % 2 * 4 & 15;
    const int code = bits == 8 ? codes[at] : codes[at / 2] >> at % 2 * 4 & 15;
    return static_cast<double>(scales[row * blocks + block]) * (code - zero);
  }
  double weight(int64_t row, int64_t column) const {
    const double mean = has_means ? stored_weight(row, columns + column / BLOCK) / BLOCK : 0;
    return stored_weight(row, column) + mean;
  }
};

std::vector<float> random_rows(int64_t rows, int64_t columns) {
  std::normal_distribution<float> normal;
  std::vector<float> x(rows * columns);
  for (float& value : x) value = normal(random_bits);
  return x;
}

// y of one or two matrices by one instruction set, its groups in two calls.
std::vector<float> gemm(const KernelSet& kernels, const PackedMatrix& w, const PackedMatrix* up,
                        const std::vector<float>& x, int64_t rows) {
  ActivationBuffer buffer;
  const Activations a = buffer.reserve(rows, w.blocks, w.activation_bits);
  for (int64_t row = 0; row < rows; ++row) kernels.quantize_row(w.activation_bits)(x.data(), a, row);
  std::vector<float> y(rows * w.rows);
  const GemmCall call{{&w, up}, a, y.data()};
  const int64_t middle = w.groups / 2;
  kernels.gemm_groups(w.bits, w.activation_bits)(call, 0, middle);
  kernels.gemm_groups(w.bits, w.activation_bits)(call, middle, w.groups);
  return y;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

void test_half_precision_rounds_to_nearest_even() {
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const float value = from_half(half), next = half < 0x7bff ? from_half(half + 1) : 65536.0f;
    EXPECT(value ==
           std::ldexp(half < 1024 ? half : 1024 + half % 1024, half < 1024 ? -24 : static_cast<int>(half / 1024) - 25));
    EXPECT(to_half(value) == half && to_half(-value) == (half | 0x8000));
    const float middle = value + (next - value) / 2;
    EXPECT(to_half(middle) == half + half % 2);
    EXPECT(to_half(std::nextafter(middle, 0.0f)) == half);
    EXPECT(to_half(std::nextafter(middle, next)) == half + 1);
  }
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT(to_half(infinity) == 0x7c00 && from_half(0xfc00) == -infinity);
  EXPECT(std::isnan(from_half(to_half(std::nanf("")))));
}

void test_packed_weights_are_the_stored_ones() {
  for (int trial = 0; trial < 200; ++trial) {
    const int bits = trial % 2 ? 8 : 4, activation_bits = trial / 2 % 2 ? 24 : 8;
    const Matrix stored(uniform(1, 20), BLOCK * uniform(1, 40), bits, trial / 4 % 2, trial / 8 % 2);
    const PackedMatrix packed = pack(stored.view(), stored.columns, activation_bits);
    EXPECT(reinterpret_cast<uintptr_t>(packed.data.get()) % 64 == 0);
    EXPECT(packed.groups == (stored.rows + 7) / 8 && packed.blocks == stored.columns / BLOCK);
    for (int64_t row = 0; row < packed.groups * GROUP; ++row) {
      for (int64_t column = 0; column < stored.columns; ++column) {
        const uint8_t* block = packed.data.get() + (row / GROUP * packed.blocks + column / BLOCK) *
                                                       packed_block_bytes(bits, activation_bits);
        float scale, offset;
        if (activation_bits == 24) {
          std::memcpy(&scale, block + code_bytes(bits) + 4 * (row % GROUP), 4);
          std::memcpy(&offset, block + code_bytes(bits) + 4 * (GROUP + row % GROUP), 4);
        } else {
          uint16_t halves[2];
          std::memcpy(&halves[0], block + code_bytes(bits) + 2 * (row % GROUP), 2);
          std::memcpy(&halves[1], block + code_bytes(bits) + 2 * (GROUP + row % GROUP), 2);
          scale = from_half(halves[0]), offset = from_half(halves[1]);
        }
        const int code = packed_code(block, bits, row % GROUP, column % BLOCK);
        const double weight = packed.scale_unit * (static_cast<double>(scale) * code + offset);
        const double expected = row < stored.rows ? stored.weight(row, column) : 0;
        const double tolerance = (activation_bits == 24 ? 1e-6 : 1e-3) * 0.01 * 255;  // of the largest scale * code
        EXPECT(std::abs(weight - expected) <= (row < stored.rows ? tolerance : 0));
      }
    }
  }
}

void test_reference_is_double_precisions() {
  for (int trial = 0; trial < 100; ++trial) {
    const int bits = trial % 2 ? 8 : 4;
    const Matrix stored(uniform(1, 30), BLOCK * uniform(1, 20), bits, trial / 2 % 2, trial / 4 % 2);
    const int64_t rows = uniform(1, 4);
    const std::vector<float> x = random_rows(rows, stored.columns);
    for (int activation_bits : {8, 24}) {
      const std::vector<float> y =
          gemm(REFERENCE, pack(stored.view(), stored.columns, activation_bits), nullptr, x, rows);
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
  for (int trial = 0; trial < 400; ++trial) {
    const int bits = trial % 2 ? 8 : 4, activation_bits = trial / 2 % 2 ? 24 : 8;
    const bool is_gated = trial / 4 % 2, has_zeros = trial / 8 % 2, has_means = trial / 16 % 2;
    const int64_t columns = trial % 5 ? BLOCK * uniform(1, 12) : BLOCK, out = uniform(1, 70), rows = uniform(0, 19);
    const Matrix gate(out, columns, bits, has_zeros, has_means), up(out, columns, bits, has_zeros, has_means);
    const PackedMatrix w = pack(gate.view(), columns, activation_bits), w2 = pack(up.view(), columns, activation_bits);
    std::vector<float> x = random_rows(rows, columns);
    const float scale = std::ldexp(1.0f, uniform(-120, 20));
    for (float& value : x) value *= scale;
    const std::vector<float> expected = gemm(REFERENCE, w, is_gated ? &w2 : nullptr, x, rows);
    for (int i = 0; i < supported.count; ++i) {
      const std::vector<float> found = gemm(*supported.sets[i], w, is_gated ? &w2 : nullptr, x, rows);
      if (!same_bits(found, expected)) std::fprintf(stderr, "%s, trial %d: ", supported.sets[i]->name, trial);
      EXPECT(same_bits(found, expected));
      if (rows) {  // and a row the same alone
        const std::vector<float> last(x.end() - columns, x.end());
        EXPECT(same_bits(gemm(*supported.sets[i], w, is_gated ? &w2 : nullptr, last, 1),
                         std::vector<float>(expected.end() - out, expected.end())));
      }
    }
  }
}

void test_what_is_not_finite_stays_so() {
  const float infinity = std::numeric_limits<float>::infinity();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) {
    for (int bits : {4, 8}) {
      for (int activation_bits : {8, 24}) {
        const Matrix stored(11, 96, bits, false, false);
        const PackedMatrix w = pack(stored.view(), 96, activation_bits);
        std::vector<float> x = random_rows(2, 96);
        const std::vector<float> expected = gemm(*supported.sets[i], w, nullptr, x, 2);
        for (float value : {std::nanf(""), infinity, -infinity}) {
          x[40] = value;
          const std::vector<float> y = gemm(*supported.sets[i], w, nullptr, x, 2);
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

void test_malformed_weights_are_refused() {
  const Matrix stored(9, 64, 4, true, false);
  const int64_t largest = std::numeric_limits<int64_t>::max();
  for (int64_t columns : {-32L, 0L, 16L, 33L, 96L, largest - 31, -largest - 1})
    EXPECT(throws([&] { pack(stored.view(), columns, 8); }));
  StoredMatrix two_bits = stored.view();
  two_bits.bits = 2;
  EXPECT(throws([&] { pack(two_bits, 64, 8); }));
  const Matrix none(0, 64, 4, true, false);
  EXPECT(pack(none.view(), 64, 8).groups == 0);
}

// The tensors of a stored matrix, as a graph has them.
struct Tensors {
  Tensor<uint8_t> codes, zeros;
  Tensor<float> scales;
  int64_t bits;

  explicit Tensors(const Matrix& of) : bits(of.bits) {
    codes = {of.codes.data(), {of.rows, of.blocks, BLOCK * of.bits / 8}};
    scales = {of.scales.data(), {of.rows, of.blocks}};
    if (!of.zeros.empty()) zeros = {of.zeros.data(), {static_cast<int64_t>(of.zeros.size())}};
  }
  StoredMatrix matrix() const { return stored_matrix(codes, scales, zeros, bits); }
};

void test_tensors_that_do_not_fit_together_are_refused() {
  for (int trial = 0; trial < 200; ++trial) {
    const Matrix stored(uniform(1, 20), BLOCK * uniform(1, 12), trial % 2 ? 8 : 4, trial / 2 % 2, trial / 4 % 2);
    const Tensors good(stored);
    const StoredMatrix whole = good.matrix();
    EXPECT(whole.rows == stored.rows && whole.blocks == stored.blocks && whole.bits == stored.bits);
    EXPECT(pack(whole, stored.columns, trial / 8 % 2 ? 24 : 8).rows == stored.rows);

    for (size_t axis = 0; axis < 3; ++axis) {  // of truncated and of longer codes, scales and zero points
      for (int64_t by : {-1, 1}) {
        Tensors changed = good;
        changed.codes.shape[axis] += by;
        EXPECT(throws([&] { changed.matrix(); }));
        if (axis == 2) continue;
        changed = good;
        changed.scales.shape[axis] += by;
        EXPECT(throws([&] { changed.matrix(); }));
        if (good.zeros.data) {
          changed = good;
          changed.zeros.shape[0] += by;
          EXPECT(throws([&] { changed.matrix(); }));
        }
      }
    }
    for (int64_t bits : {0L, -4L, 2L, 16L, 12L - stored.bits, (1L << 32) + stored.bits, 1L << 62}) {
      Tensors changed = good;
      changed.bits = bits;
      EXPECT(throws([&] { changed.matrix(); }));
    }
    for (int64_t rank : {0, 1, 2, 4}) {
      Tensors changed = good;
      changed.codes.shape.resize(rank, 1);
      EXPECT(throws([&] { changed.matrix(); }));
    }
    Tensors changed = good;
    changed.codes.data = nullptr;
    EXPECT(throws([&] { changed.matrix(); }));
    changed = good;
    changed.scales.data = nullptr;
    EXPECT(throws([&] { changed.matrix(); }));
  }
}

void test_scales_that_are_not_finite_are_refused_and_others_are_bounded() {
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  const KernelSets supported = supported_kernels();
  for (int trial = 0; trial < 160; ++trial) {
    const int bits = trial % 2 ? 8 : 4, activation_bits = trial / 2 % 2 ? 24 : 8;
    Matrix stored(uniform(1, 20), BLOCK * uniform(1, 12), bits, trial / 4 % 2, trial / 8 % 2);
    const size_t at = uniform(0, stored.scales.size() - 1);
    const float before = stored.scales[at];
    for (float value : {std::nanf(""), infinity, -infinity}) {
      stored.scales[at] = value;
      EXPECT(throws([&] { pack(stored.view(), stored.columns, activation_bits); }));
    }
    for (uint8_t& zero : stored.zeros) zero = trial / 16 % 2 ? 255 : 0;
    const std::vector<float> x = random_rows(2, stored.columns);
    for (float value : {0.0f, -before, 1e-45f, 1e-38f, 1e30f, -1e30f}) {  // kept, and alike on all
      stored.scales[at] = value;
      const PackedMatrix w = pack(stored.view(), stored.columns, activation_bits);
      const std::vector<float> expected = gemm(REFERENCE, w, nullptr, x, 2);
      for (int i = 0; i < supported.count; ++i) EXPECT(same_bits(gemm(*supported.sets[i], w, nullptr, x, 2), expected));
    }
    if (!stored.zeros.empty()) continue;
    stored.scales[at] = largest;  // times a zero point of 8: no float
    const bool is_mean = static_cast<int64_t>(at) % stored.blocks >= stored.columns / BLOCK;
    if (!is_mean && bits == 4) EXPECT(throws([&] { pack(stored.view(), stored.columns, activation_bits); }));
  }
}

}  // namespace

int main() {
  test_half_precision_rounds_to_nearest_even();
  test_packed_weights_are_the_stored_ones();
  test_reference_is_double_precisions();
  test_instruction_sets_give_the_references_bits();
  test_what_is_not_finite_stays_so();
  test_malformed_weights_are_refused();
  test_tensors_that_do_not_fit_together_are_refused();
  test_scales_that_are_not_finite_are_refused_and_others_are_bounded();
  const KernelSets supported = supported_kernels();
  for (int i = 0; i < supported.count; ++i) std::printf("%s ", supported.sets[i]->name);
  std::printf(failures ? "FAILED: %d\n" : "passed\n", failures);
  return failures != 0;
}
