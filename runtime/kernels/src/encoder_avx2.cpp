#include "isa.h"

#ifdef CONVLLAVA_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "encoder.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "encoder_tile.h"

namespace convllava {
namespace {

// Sums of two products of bytes would saturate at 16 bits, so bytes are widened to 16 bits: even columns and odd ones.
struct Isa : TwoEights {
  struct Weights {
    Ints even, odd;
  };
  struct Columns {
    __m256i even, odd;
  };

  CONVLLAVA_INLINE static Weights load_weights(const int8_t* codes) {
    const Ints v = load_ints(codes);
    return {{even_bytes(v.low), even_bytes(v.high)}, {_mm256_srai_epi16(v.low, 8), _mm256_srai_epi16(v.high, 8)}};
  }
  CONVLLAVA_INLINE static Columns broadcast_columns(const uint8_t* codes) {
    const __m256i v = broadcast_four(codes);
    return {_mm256_and_si256(v, _mm256_set1_epi16(255)), _mm256_srli_epi16(v, 8)};
  }
  CONVLLAVA_INLINE static Ints dot(Ints sum, Weights w, Columns x) {
    return {dot_eight(sum.low, w.even.low, w.odd.low, x), dot_eight(sum.high, w.even.high, w.odd.high, x)};
  }

 private:
  CONVLLAVA_INLINE static __m256i even_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
  CONVLLAVA_INLINE static __m256i dot_eight(__m256i sum, __m256i even, __m256i odd, Columns x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, x.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, x.odd));
  }
};

}  // namespace

const EncoderKernels ENCODER_AVX2 = encoder_kernel_set<Isa>();

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
