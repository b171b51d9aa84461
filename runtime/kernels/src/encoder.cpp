#include "encoder.h"

#include <algorithm>

#include "isa.h"
#include "kernel_error.h"

namespace convllava {

const EncoderKernels& encoder_kernels(const KernelSet& kernels) {
#ifdef CONVLLAVA_X86
  if (&kernels == &AVX512_VNNI) return ENCODER_AVX512_VNNI;
  if (&kernels != &REFERENCE) return ENCODER_AVX2;
#endif
  (void)kernels;
  return ENCODER_REFERENCE;
}

int64_t tile_rows(int64_t rows, int64_t columns) {
  constexpr int64_t MAX_ROWS = 96, MIN_TILES = 16;  // for many threads; each tile reads all weights
  constexpr int64_t MAX_CODES = 512 * 1024;         // bytes: they stay in the second level's cache
  const int64_t most = std::min({MAX_ROWS, MAX_CODES / columns, (rows + MIN_TILES - 1) / MIN_TILES});
  return std::max<int64_t>(1, most / ROW_GROUP) * ROW_GROUP;
}

Int8Matrix int8_matrix(const Tensor<int8_t>& codes, const Tensor<float>& parameters) {
  if (!codes.data || !parameters.data || codes.shape.size() != 4 || parameters.shape.size() != 3)
    throw KernelError("expected constant codes [panels, columns / 4, 32, 4] and parameters [rows / 16, 3, 16]");
  const Int8Matrix found{parameters.shape[0] * LANES, codes.shape[1] * 4, codes.data, parameters.data};
  if (codes.shape[2] != PANEL || codes.shape[3] != 4 || parameters.shape[1] != 3 || parameters.shape[2] != LANES)
    throw KernelError("expected codes in panels of 32 rows and parameters in threes of 16");
  if (found.rows <= 0 || found.columns <= 0 || found.columns % LANES ||
      codes.shape[0] != (found.rows + PANEL - 1) / PANEL)
    throw KernelError("expected a multiple of 16 columns, and as many panels as the parameters' rows fill");
  return found;
}

LayerNorm layer_norm(const Tensor<float>& parameters, float epsilon, int64_t channels) {
  if (!parameters.data || parameters.shape != std::vector<int64_t>{2, channels})
    throw KernelError("expected the constant weight and bias of a LayerNorm, [2, channels]");
  return {parameters.data, epsilon};
}

const float* vertical(const Tensor<float>& weights, int64_t rows) {
  if (!weights.data || weights.shape.size() != 3 || weights.shape[0] <= 0 || weights.shape[1] != rows ||
      weights.shape[2] != LANES)
    throw KernelError("expected constant weights [channels / 16, taps and a bias, 16]");
  return weights.data;
}

}  // namespace convllava
