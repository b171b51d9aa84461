// Eight lanes of AVX2: one group of rows. Included where a unit's instruction set is in force, hence the unnamed
// namespace: each unit has functions of its own.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "weight_format.h"

#define CONVLLAVA_INLINE __attribute__((always_inline)) inline

namespace convllava {
namespace {

struct Lanes8 {
  static constexpr int GROUPS = 1;
  using Ints = __m256i;
  using Floats = __m256;

  // One vector of codes; group_bytes: between this group and the next, for lanes that take two.
  CONVLLAVA_INLINE static Ints load_codes(const uint8_t* codes, ptrdiff_t) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(codes));
  }
  // Eight scales or offsets: float32 with 24-bit activations, else float16.
  template <int ACTIVATION_BITS>
  CONVLLAVA_INLINE static Floats load_scales(const uint8_t* scales, ptrdiff_t) {
    if constexpr (ACTIVATION_BITS == 24) return _mm256_loadu_ps(reinterpret_cast<const float*>(scales));
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
  }
  // Four columns of x to every lane.
  CONVLLAVA_INLINE static Ints broadcast_columns(const int8_t* x) {
    int32_t columns;
    std::memcpy(&columns, x, 4);
    return _mm256_set1_epi32(columns);
  }

  CONVLLAVA_INLINE static Ints zero_ints() { return _mm256_setzero_si256(); }
  CONVLLAVA_INLINE static Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  CONVLLAVA_INLINE static Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  CONVLLAVA_INLINE static Ints add_128(Ints v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
  CONVLLAVA_INLINE static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  CONVLLAVA_INLINE static Ints subtract(Ints a, int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
  CONVLLAVA_INLINE static Ints times_128(Ints v) { return _mm256_slli_epi32(v, 7); }

  CONVLLAVA_INLINE static Floats zero_floats() { return _mm256_setzero_ps(); }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm256_set1_ps(v); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  CONVLLAVA_INLINE static __m256 group(Floats v, int) { return v; }
};

}  // namespace
}  // namespace convllava
