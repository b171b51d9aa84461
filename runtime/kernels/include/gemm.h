// The GEMM y = x W^T of quantized activations and block-quantized weights, for each instruction set.
#pragma once

#include <cstdint>

#include "activation_quant.h"
#include "weight_format.h"

namespace convllava {

// One call: y [rows of x, rows of W], or with two matrices y = silu(x W0^T) * (x W1^T).
struct GemmCall {
  const Weights* weights[2];  // of one size; the second null for one matrix
  Activations a;
  float* y;
};

// Computes y's columns of the groups `begin` to `end` of weights. buffer: of this thread. Throws std::bad_alloc.
using GemmGroups = void (*)(const GemmCall& call, int64_t begin, int64_t end, Buffer& buffer);

// One instruction set. What it computes within a block are integers, and floats are rounded in the same order by all:
// results are equal, bit for bit.
struct KernelSet {
  const char* name;  // in CONVLLAVA_KERNELS
  int64_t tile;      // rows of activations that lie together
  QuantizeRow quantize_row_8, quantize_row_24;
  GemmGroups gemm[3][2];  // [format][8 or 24 activation bits]

  QuantizeRow quantize_row(int activation_bits) const {
    return activation_bits == 24 ? quantize_row_24 : quantize_row_8;
  }
  GemmGroups gemm_groups(Format format, int activation_bits) const {
    return gemm[static_cast<int>(format)][activation_bits == 24];
  }
};

extern const KernelSet REFERENCE;  // scalar: for any processor, and what the others are tested against
extern const KernelSet AVX2;
extern const KernelSet AVX_VNNI;
extern const KernelSet AVX512_VNNI;

// The kernel sets that this build has and this processor can run, the best first. The last is REFERENCE.
struct KernelSets {
  const KernelSet* sets[4];
  int count;
};
KernelSets supported_kernels();

// The best, or the one that the environment's CONVLLAVA_KERNELS names; decided on the first call. Throws KernelError
// where that one is not supported.
const KernelSet& chosen_kernels();

}  // namespace convllava
