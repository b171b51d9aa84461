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

struct Dot8 : Lanes8 {
  CONVLLAVA_INLINE static Ints dot(Ints sum, Ints codes, Ints x) { return _mm256_dpbusd_epi32(sum, codes, x); }
};

// Sixteen lanes: two groups of rows.
struct Dot16 {
  static constexpr int GROUPS = 2;
  using Ints = __m512i;
  using Floats = __m512;

  CONVLLAVA_INLINE static Ints load_codes(const uint8_t* codes, ptrdiff_t group_bytes) {
    const __m512i low = _mm512_castsi256_si512(Lanes8::load_codes(codes, 0));
    return _mm512_inserti64x4(low, Lanes8::load_codes(codes + group_bytes, 0), 1);
  }
  template <int ACTIVATION_BITS>
  CONVLLAVA_INLINE static Floats load_scales(const uint8_t* scales, ptrdiff_t group_bytes) {
    const __m256 low = Lanes8::load_scales<ACTIVATION_BITS>(scales, 0);
    const __m256 high = Lanes8::load_scales<ACTIVATION_BITS>(scales + group_bytes, 0);
    const __m512d both = _mm512_castpd256_pd512(_mm256_castps_pd(low));
    return _mm512_castpd_ps(_mm512_insertf64x4(both, _mm256_castps_pd(high), 1));
  }
  CONVLLAVA_INLINE static Ints broadcast_columns(const int8_t* x) {
    int32_t columns;
    std::memcpy(&columns, x, 4);
    return _mm512_set1_epi32(columns);
  }

  CONVLLAVA_INLINE static Ints zero_ints() { return _mm512_setzero_si512(); }
  CONVLLAVA_INLINE static Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  CONVLLAVA_INLINE static Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }
  CONVLLAVA_INLINE static Ints add_128(Ints v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  CONVLLAVA_INLINE static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  CONVLLAVA_INLINE static Ints subtract(Ints a, int32_t b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
  CONVLLAVA_INLINE static Ints times_128(Ints v) { return _mm512_slli_epi32(v, 7); }
  CONVLLAVA_INLINE static Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }

  CONVLLAVA_INLINE static Floats zero_floats() { return _mm512_setzero_ps(); }
  CONVLLAVA_INLINE static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  CONVLLAVA_INLINE static Floats broadcast(float v) { return _mm512_set1_ps(v); }
  CONVLLAVA_INLINE static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  CONVLLAVA_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  CONVLLAVA_INLINE static __m256 group(Floats v, int side) {
    const __m512d both = _mm512_castps_pd(v);
    return _mm256_castpd_ps(side ? _mm512_extractf64x4_pd(both, 1) : _mm512_castpd512_pd256(both));
  }
};

struct Isa {
  using Lanes = Vnni<Dot8>;
  using WideLanes = Vnni<Dot16>;
  static constexpr int MAX_ROWS = 8;
};

}  // namespace

const KernelSet AVX512_VNNI = kernel_set<Isa>("avx512_vnni");

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
