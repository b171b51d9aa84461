// Reductions of eight floats, in the order of all instruction sets, and 16 lanes in two vectors of AVX2. Included where
// a unit's instruction set is in force.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "encoder.h"
#include "lanes_avx2.h"

namespace convllava {
namespace {

CONVLLAVA_INLINE __m128 halves_sum(__m256 v) {
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

// ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
CONVLLAVA_INLINE float eight_sum(__m256 v) {
  const __m128 four = halves_sum(v), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
CONVLLAVA_INLINE float eight_lowest(__m256 v) {
  __m128 least = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  return _mm_cvtss_f32(_mm_min_ss(least, _mm_movehdup_ps(least)));
}
CONVLLAVA_INLINE float eight_highest(__m256 v) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

struct TwoEights {
  static constexpr int ROWS = 4, VECTORS = 1, PIXELS = 4;
  struct Floats {
    __m256 low, high;
  };
  struct Ints {
    __m256i low, high;
  };
  using Nans = __m256;

  CONVLLAVA_INLINE static Floats load(const float* values) {
    return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
  }
  CONVLLAVA_INLINE static void store(float* out, Floats v) {
    _mm256_storeu_ps(out, v.low);
    _mm256_storeu_ps(out + 8, v.high);
  }
  CONVLLAVA_INLINE static Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  CONVLLAVA_INLINE static Floats add(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  CONVLLAVA_INLINE static Floats subtract(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  CONVLLAVA_INLINE static Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  CONVLLAVA_INLINE static Floats max(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
  }
  CONVLLAVA_INLINE static Nans unordered(Floats v) {
    return either(_mm256_cmp_ps(v.low, v.low, _CMP_UNORD_Q), _mm256_cmp_ps(v.high, v.high, _CMP_UNORD_Q));
  }
  CONVLLAVA_INLINE static Nans either(Nans a, Nans b) { return _mm256_or_ps(a, b); }
  CONVLLAVA_INLINE static bool any(Nans nans) { return _mm256_movemask_ps(nans) != 0; }
  CONVLLAVA_INLINE static float sum(Floats v) { return eight_sum(_mm256_add_ps(v.low, v.high)); }
  CONVLLAVA_INLINE static float lowest(Floats v) { return eight_lowest(_mm256_min_ps(v.low, v.high)); }
  CONVLLAVA_INLINE static float highest(Floats v) { return eight_highest(_mm256_max_ps(v.low, v.high)); }

  CONVLLAVA_INLINE static void store_codes(uint8_t* out, Floats v) {
    const __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0b11011000);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  }
  CONVLLAVA_INLINE static Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
  CONVLLAVA_INLINE static Ints load_ints(const int8_t* codes) {
    const auto* vectors = reinterpret_cast<const __m256i*>(codes);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
  CONVLLAVA_INLINE static __m256i broadcast_four(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
    return _mm256_set1_epi32(four);
  }
};

}  // namespace
}  // namespace convllava
