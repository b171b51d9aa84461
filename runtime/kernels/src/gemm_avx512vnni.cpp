#include "isa.h"

#ifdef CONVLLAVA_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers
#endif
#include <immintrin.h>

#include <initializer_list>

#include "gemm.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
#endif

#include "gemm_tile.h"

namespace convllava {
namespace {

struct Lanes16 {
  static constexpr int COUNT = 16;
  using Ints = __m512i;
  using Floats = __m512;

  CONVLLAVA_INLINE static Ints load(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  CONVLLAVA_INLINE static Floats load_floats(const float* values) { return _mm512_loadu_ps(values); }
  CONVLLAVA_INLINE static Floats load_halves(const uint8_t* values) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
  CONVLLAVA_INLINE static Floats load_bytes(const uint8_t* values) {
    return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))));
  }
  CONVLLAVA_INLINE static void store(float* out, Floats v) { _mm512_storeu_ps(out, v); }
  CONVLLAVA_INLINE static Ints broadcast_columns(const int8_t* x) {
    int32_t columns;
    std::memcpy(&columns, x, 4);
    return _mm512_set1_epi32(columns);
  }

  CONVLLAVA_INLINE static void transpose(Ints (&v)[16]) {
    Ints pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
        fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // 128 bits at a time
      const Ints even_low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
      const Ints odd_low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
      const Ints even_high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
      const Ints odd_high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
      v[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
      v[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
      v[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
      v[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
  }

  CONVLLAVA_INLINE static Ints broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
  CONVLLAVA_INLINE static Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  CONVLLAVA_INLINE static Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }
  CONVLLAVA_INLINE static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  CONVLLAVA_INLINE static Ints times_128(Ints v) { return _mm512_slli_epi32(v, 7); }
  CONVLLAVA_INLINE static Ints dot_bytes(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }

  CONVLLAVA_INLINE static Floats zero_floats() { return _mm512_setzero_ps(); }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm512_set1_ps(v); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Isa {
  using Lanes = Vnni<Lanes16>;
  static constexpr int TILE = 8;
};

}  // namespace

const KernelSet AVX512_VNNI = kernel_set<Isa>("avx512_vnni");

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
