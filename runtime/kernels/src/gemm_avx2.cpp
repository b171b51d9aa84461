#include "isa.h"

#ifdef CONVLLAVA_X86
#include <immintrin.h>

#include <initializer_list>

#include "gemm.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "gemm_tile.h"

namespace convllava {
namespace {

// Without VNNI sums of two products saturate at 16 bits. Those of a block of 4 bits fit: 16 * 15 * 127 = 30480. Of 8
// bits a pair fits where codes have their sign: x takes it, and the code becomes its size: 2 * 128 * 127 = 32512.
struct Lanes : Lanes8 {
  template <Format>
  CONVLLAVA_INLINE static Ints start(int32_t) {
    return _mm256_setzero_si256();
  }
  template <Format FORMAT>
  CONVLLAVA_INLINE static Ints dot(Ints sum, Ints codes, Ints x) {
    if constexpr (bits(FORMAT) == 4) return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
    codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
    const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
    return add(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <Format FORMAT>
  CONVLLAVA_INLINE static Ints finish(Ints sum, int32_t initial) {
    if constexpr (bits(FORMAT) == 8) return sum;
    return add(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), broadcast_int(initial));
  }
};

struct Isa {
  using Lanes = convllava::Lanes;
  static constexpr int TILE = 4;
};

}  // namespace

const KernelSet AVX2 = kernel_set<Isa>("avx2");

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
