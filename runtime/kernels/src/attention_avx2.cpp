#include "isa.h"

#ifdef CONVLLAVA_X86
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "attention.h"  // before the target: what headers define inline must run on any processor

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attention_tile.h"

namespace convllava {
namespace {

struct Lanes256 {
  struct Floats {
    __m256 v[2];
  };
  static constexpr int PAIRS = 4;

  template <class Operation>
  CONVLLAVA_INLINE static Floats both(const Operation& operation) {
    return {{operation(0), operation(1)}};
  }
  CONVLLAVA_INLINE static Floats load(const float* values) {
    return both([&](int i) { return _mm256_loadu_ps(values + 8 * i); });
  }
  CONVLLAVA_INLINE static void store(float* out, const Floats& a) {
    _mm256_storeu_ps(out, a.v[0]);
    _mm256_storeu_ps(out + 8, a.v[1]);
  }
  CONVLLAVA_INLINE static Floats load_codes(const int8_t* codes) {
    return both([&](int i) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    });
  }
  CONVLLAVA_INLINE static Floats broadcast(float v) {
    return both([&](int) { return _mm256_set1_ps(v); });
  }
  CONVLLAVA_INLINE static Floats add(const Floats& a, const Floats& b) {
    return both([&](int i) { return _mm256_add_ps(a.v[i], b.v[i]); });
  }
  CONVLLAVA_INLINE static Floats multiply(const Floats& a, const Floats& b) {
    return both([&](int i) { return _mm256_mul_ps(a.v[i], b.v[i]); });
  }
  CONVLLAVA_INLINE static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return both([&](int i) { return _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]); });
  }
  CONVLLAVA_INLINE static Floats minus_product(const Floats& c, const Floats& a, const Floats& b) {
    return both([&](int i) { return _mm256_fnmadd_ps(a.v[i], b.v[i], c.v[i]); });
  }
  CONVLLAVA_INLINE static Floats max(const Floats& a, const Floats& b) {  // b if a is NaN
    return both([&](int i) { return _mm256_max_ps(a.v[i], b.v[i]); });
  }
  CONVLLAVA_INLINE static Floats round(const Floats& a) {
    return both([&](int i) { return _mm256_round_ps(a.v[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
  }
  // a * 2^n, n an integer
  CONVLLAVA_INLINE static Floats times_power(const Floats& a, const Floats& n) {
    return both([&](int i) {
      const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v[i]), _mm256_set1_epi32(127)), 23);
      return _mm256_mul_ps(a.v[i], _mm256_castsi256_ps(power));
    });
  }
  CONVLLAVA_INLINE static Floats zero_below(const Floats& x, float least, const Floats& a) {
    return both(
        [&](int i) { return _mm256_and_ps(_mm256_cmp_ps(x.v[i], _mm256_set1_ps(least), _CMP_NLT_UQ), a.v[i]); });
  }
  // The first `count` lanes of a, the others of b.
  CONVLLAVA_INLINE static Floats first(int64_t count, const Floats& a, const Floats& b) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return both([&](int i) {
      const __m256i taken = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - 8 * i), lanes);
      return _mm256_blendv_ps(b.v[i], a.v[i], _mm256_castsi256_ps(taken));
    });
  }

  // Lanes 8 apart are added, then those 4, 2 and 1 apart.
  CONVLLAVA_INLINE static void sum_lanes(const Floats (&a)[PAIRS], float (&out)[PAIRS]) {
    __m256 halves[PAIRS], quarters[2];
#pragma GCC unroll 4
    for (int i = 0; i < PAIRS; ++i) halves[i] = _mm256_add_ps(a[i].v[0], a[i].v[1]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 &one = halves[2 * i], &other = halves[2 * i + 1];
      quarters[i] = _mm256_add_ps(_mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31));
    }
    const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(quarters[0], quarters[1], 0x44),
                                       _mm256_shuffle_ps(quarters[0], quarters[1], 0xee));
    const __m256 sums = _mm256_hadd_ps(pairs, pairs);  // those of even vectors in the lower half
    _mm_storeu_ps(out, _mm_unpacklo_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
};

}  // namespace

void attend_chunk_avx2(const ChunkCall& call) { attend_chunk<Lanes256>(call); }

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
