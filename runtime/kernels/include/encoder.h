// Layers of a ConvNeXt encoder, channels last, for each instruction set. Matmuls are of 8 bits: weights are symmetric
// with a scale an output channel, activations have a scale and a minimum a row, found as they come.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "weight_format.h"

namespace convllava {

constexpr int64_t LANES = 16;                            // all numbers of channels are multiples of it
constexpr int64_t PANEL = 32;                            // output channels whose weights lie together
constexpr int64_t ROW_GROUP = 12;                        // rows of activations that lie together
constexpr int64_t KERNEL = 7;                            // side of the depthwise convolution, pixels
constexpr int64_t DEPTHWISE_ROWS = KERNEL * KERNEL + 1;  // of its weights and its bias
constexpr int64_t PATCH = 4, COLORS = 3;                 // of the stem
constexpr int64_t STEM_ROWS = COLORS * PATCH * PATCH + 1;

// W [rows, columns] and a bias. y = x W^T + bias is, for a row x = minimum + scale * codes of activations,
// scale * scales[n] * (codes of x times those of W) + minimum * sums[n] + bias[n].
struct Int8Matrix {
  int64_t rows, columns;
  const int8_t* codes;      // [panels, columns / 4, PANEL, 4], zeros behind the last row
  const float* parameters;  // [rows / LANES, 3, LANES]: scales, sums and biases
};

struct LayerNorm {
  const float* parameters;  // [2, channels]: weight and bias
  float epsilon;
};

// y = x + fc2(gelu(fc1(norm(depthwise(x))))), x and y [batch, height, width, channels]. A layer scale is part of fc2.
struct BlockCall {
  const float* x;
  float* y;
  int64_t height, width, channels;
  const float* depthwise;  // [channels / LANES, DEPTHWISE_ROWS, LANES]
  LayerNorm norm;
  Int8Matrix fc1, fc2;
};

// A 2x2 convolution of stride 2 on norm(x): x [batch, height, width, channels], y [batch, height / 2, width / 2, rows
// of W]. Columns of W are those of four pixels in reading order.
struct DownsampleCall {
  const float* x;
  float* y;
  int64_t height, width, channels;
  LayerNorm norm;
  Int8Matrix matrix;
};

// norm of a 4x4 convolution of stride 4: x [batch, 3, height, width], y [batch, height / 4, width / 4, channels].
struct StemCall {
  const float* x;
  float* y;
  int64_t height, width, channels;
  const float* weights;  // [channels / LANES, STEM_ROWS, LANES]: of each color, row and column of a patch; the bias
  LayerNorm norm;
};

// y = x W^T + bias, or gelu of it; x [rows, columns of W].
struct LinearCall {
  const float* x;
  float* y;
  Int8Matrix matrix;
  bool has_gelu;
};

// Computes y's rows (pixels, over all images) `begin` to `end`. buffer: of this thread. Throws std::bad_alloc.
template <typename Call>
using Tile = void (*)(const Call& call, int64_t begin, int64_t end, Buffer& buffer);

// One instruction set. Integers are exact and floats are rounded in the same order by all: results are equal, bit for
// bit, however rows are cut into tiles. A row that depends on a NaN or an infinity is NaN.
struct EncoderKernels {
  Tile<BlockCall> block;
  Tile<DownsampleCall> downsample;
  Tile<StemCall> stem;
  Tile<LinearCall> linear;
};

extern const EncoderKernels ENCODER_REFERENCE, ENCODER_AVX2, ENCODER_AVX512_VNNI;

const EncoderKernels& encoder_kernels(const KernelSet& kernels);

// Rows of a tile whose widest activations have `columns`.
int64_t tile_rows(int64_t rows, int64_t columns);

// What tensors of a graph hold. Each throws KernelError for shapes that do not fit together.
Int8Matrix int8_matrix(const Tensor<int8_t>& codes, const Tensor<float>& parameters);
LayerNorm layer_norm(const Tensor<float>& parameters, float epsilon, int64_t channels);
const float* vertical(const Tensor<float>& weights, int64_t rows);

// gelu(x) = x * (c * p(2 / B^2 * c^2 - 1) + 1/2), c = x between -B and B: absolute error 1.2e-6. Coefficients of p, the
// constant first.
constexpr float GELU_BOUND = 5.2f;
constexpr int GELU_TERMS = 13;
constexpr float GELU_COEFFICIENTS[GELU_TERMS] = {
    0.13594993948936462f,  -0.06774340569972992f, 0.050030168145895004f,  -0.039941299706697464f,
    0.03190726414322853f,  -0.02459341660141945f, 0.018387170508503914f,  -0.013103311881422997f,
    0.007557813078165054f, -0.0035057517234236f,  0.0028536347672343254f, -0.0025037014856934547f,
    0.0008587556658312678f};

}  // namespace convllava
