// Eight lanes of AVX2. Included where a unit's instruction set is in force, hence the unnamed namespace: each unit has
// functions of its own.
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
  static constexpr int COUNT = 8;
  using Ints = __m256i;
  using Floats = __m256;

  CONVLLAVA_INLINE static Ints load(const uint8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  CONVLLAVA_INLINE static Floats load_floats(const float* values) { return _mm256_loadu_ps(values); }
  CONVLLAVA_INLINE static Floats load_halves(const uint8_t* values) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
  CONVLLAVA_INLINE static Floats load_bytes(const uint8_t* values) {
    return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values))));
  }
  CONVLLAVA_INLINE static void store(float* out, Floats v) { _mm256_storeu_ps(out, v); }
  // Four columns of x to every lane.
  CONVLLAVA_INLINE static Ints broadcast_columns(const int8_t* x) {
    int32_t columns;
    std::memcpy(&columns, x, 4);
    return _mm256_set1_epi32(columns);
  }

  // Vector i becomes the i-th lanes of all vectors.
  CONVLLAVA_INLINE static void transpose(Ints (&v)[8]) {
    Ints pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
        fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
      v[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
  }

  CONVLLAVA_INLINE static Ints broadcast_int(int32_t v) { return _mm256_set1_epi32(v); }
  CONVLLAVA_INLINE static Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  CONVLLAVA_INLINE static Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  CONVLLAVA_INLINE static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  CONVLLAVA_INLINE static Ints times_128(Ints v) { return _mm256_slli_epi32(v, 7); }

  CONVLLAVA_INLINE static Floats zero_floats() { return _mm256_setzero_ps(); }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm256_set1_ps(v); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace convllava
