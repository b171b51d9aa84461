#include "isa.h"

#ifdef CONVLLAVA_X86
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "attention.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f")
#endif

#include "attention_tile.h"

namespace convllava {
namespace {

struct Lanes512 {
  using Floats = __m512;
  static constexpr int PAIRS = 16;

  CONVLLAVA_INLINE static Floats load(const float* values) { return _mm512_loadu_ps(values); }
  CONVLLAVA_INLINE static void store(float* out, Floats v) { _mm512_storeu_ps(out, v); }
  CONVLLAVA_INLINE static Floats load_codes(const int8_t* codes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm512_set1_ps(v); }
  CONVLLAVA_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  CONVLLAVA_INLINE static Floats minus_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
  CONVLLAVA_INLINE static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if a is NaN
  CONVLLAVA_INLINE static Floats round(Floats v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // v * 2^n, n an integer
  CONVLLAVA_INLINE static Floats times_power(Floats v, Floats n) {
    const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(v, _mm512_castsi512_ps(power));
  }
  CONVLLAVA_INLINE static Floats zero_below(Floats x, float least, Floats v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), v);
  }
  // The first `count` lanes of a, the others of b.
  CONVLLAVA_INLINE static Floats first(int64_t count, Floats a, Floats b) {
    const __mmask16 mask = count < 16 ? static_cast<__mmask16>((1 << count) - 1) : static_cast<__mmask16>(-1);
    return _mm512_mask_blend_ps(mask, b, a);
  }

  // Lanes 8 apart are added, then those 4, 2 and 1 apart; two vectors become one each time.
  CONVLLAVA_INLINE static void sum_lanes(const Floats (&v)[PAIRS], float (&out)[PAIRS]) {
    Floats halves[8], quarters[4], pairs[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Floats &a = v[order(2 * i)], &b = v[order(2 * i + 1)];
      halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats &a = halves[2 * i], &b = halves[2 * i + 1];
      quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Floats &a = quarters[2 * i], &b = quarters[2 * i + 1];
      pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    const Floats &a = pairs[0], &b = pairs[1];
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)));
  }

 private:
  // Which vector goes where, so that the sums come out in their order.
  static constexpr int order(int place) { return place % 4 * 4 + place / 4; }
};

}  // namespace

void attend_chunk_avx512(const ChunkCall& call) { attend_chunk<Lanes512>(call); }

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
