#include "isa.h"

#ifdef CONVLLAVA_AVX_VNNI
#include <immintrin.h>

#include <initializer_list>

#include "gemm.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#include "gemm_tile.h"

namespace convllava {
namespace {

struct Dot : Lanes8 {
  CONVLLAVA_INLINE static Ints dot_bytes(Ints sum, Ints codes, Ints x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }
};

struct Isa {
  using Lanes = Vnni<Dot>;
  static constexpr int TILE = 4;
};

}  // namespace

const KernelSet AVX_VNNI = kernel_set<Isa>("avx_vnni");

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
