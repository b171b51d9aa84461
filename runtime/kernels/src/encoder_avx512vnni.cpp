#include "isa.h"

#ifdef CONVLLAVA_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "encoder.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
#endif

#include "encoder_tile.h"

namespace convllava {
namespace {

struct Isa {
  static constexpr int ROWS = 12, VECTORS = 2, PIXELS = 8;
  using Floats = __m512;
  using Ints = __m512i;
  using Weights = __m512i;
  using Columns = __m512i;
  using Nans = __mmask16;

  CONVLLAVA_INLINE static Floats load(const float* values) { return _mm512_loadu_ps(values); }
  CONVLLAVA_INLINE static void store(float* out, Floats v) { _mm512_storeu_ps(out, v); }
  CONVLLAVA_INLINE static Floats zero_floats() { return _mm512_setzero_ps(); }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm512_set1_ps(v); }
  CONVLLAVA_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  CONVLLAVA_INLINE static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  CONVLLAVA_INLINE static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  CONVLLAVA_INLINE static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  CONVLLAVA_INLINE static Nans unordered(Floats v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
  CONVLLAVA_INLINE static Nans either(Nans a, Nans b) { return a | b; }
  CONVLLAVA_INLINE static bool any(Nans nans) { return nans != 0; }

  CONVLLAVA_INLINE static float sum(Floats v) { return eight_sum(_mm256_add_ps(lower(v), upper(v))); }
  CONVLLAVA_INLINE static float lowest(Floats v) { return eight_lowest(_mm256_min_ps(lower(v), upper(v))); }
  CONVLLAVA_INLINE static float highest(Floats v) { return eight_highest(_mm256_max_ps(lower(v), upper(v))); }

  CONVLLAVA_INLINE static void store_codes(uint8_t* out, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  CONVLLAVA_INLINE static Ints zero_ints() { return _mm512_setzero_si512(); }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  CONVLLAVA_INLINE static Weights load_weights(const int8_t* codes) { return _mm512_loadu_si512(codes); }
  CONVLLAVA_INLINE static Columns broadcast_columns(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
  }
  CONVLLAVA_INLINE static Ints dot(Ints sum, Weights w, Columns x) { return _mm512_dpbusd_epi32(sum, x, w); }

 private:
  CONVLLAVA_INLINE static __m256 lower(Floats v) { return _mm512_castps512_ps256(v); }
  CONVLLAVA_INLINE static __m256 upper(Floats v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
  }
};

}  // namespace

const EncoderKernels ENCODER_AVX512_VNNI = encoder_kernel_set<Isa>();

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
