#include "isa.h"

#ifdef CONVLLAVA_X86
#include <immintrin.h>

#include <limits>

#include "activation_quant.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

namespace convllava {
namespace {

// 32 codes to bytes that saturate, in their order; split: the even ones, then the odd ones.
void store_codes(const __m256i (&codes)[4], bool split, int8_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed =
      _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
  __m256i bytes = _mm256_permutevar8x32_epi32(packed, order);
  if (split) {
    const __m256i pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, pairs), 0b11011000);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
}

int32_t sum_codes(const __m256i (&codes)[4]) {
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(codes[0], codes[1]), _mm256_add_epi32(codes[2], codes[3]));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_hadd_epi32(four, four);
  four = _mm_hadd_epi32(four, four);
  return _mm_cvtsi128_si32(four);
}

// Makes codes = 128 * upper + lower, with lower from -64 to 63: codes become upper.
void split_codes(__m256i (&codes)[4], __m256i (&lower)[4]) {
  for (int i = 0; i < 4; ++i) {
    const __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(codes[i], _mm256_set1_epi32(64)), 7);
    lower[i] = _mm256_sub_epi32(codes[i], _mm256_slli_epi32(upper, 7));
    codes[i] = upper;
  }
}

}  // namespace

template <int ACTIVATION_BITS>
void quantize_row_avx2(const float* x, const Activations& a, int64_t row) {
  const __m256 sign = _mm256_set1_ps(-0.0f), none = _mm256_setzero_ps();
  const bool split = bits(a.format) == 4;
  const uint32_t zero = zero_point(a.format);
  for (int64_t block = 0; block < a.blocks; ++block) {
    const int64_t at = a.at(row, block);
    const float* in = x + (row * a.blocks + block) * BLOCK;
    __m256 v[4], most = none, nans = none;
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(in + 8 * i);
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
      nans = _mm256_or_ps(nans, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
    }
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    const float largest = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    const float per_scale = largest > SMALLEST_BLOCK ? largest_code(ACTIVATION_BITS) / largest : 0.0f;
    __m256i codes[4];
    for (int i = 0; i < 4; ++i) codes[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(per_scale)));
    int8_t* out = a.codes + at * BLOCK;
    uint32_t sum;  // wraps around where x is infinite
    if constexpr (ACTIVATION_BITS == 24) {
      __m256i lower[4];
      split_codes(codes, lower);
      const uint32_t lower_sum = sum_codes(lower), upper_sum = sum_codes(codes);
      a.initial_sums[at] = 0 - zero * upper_sum;
      a.initial_sums[a.plane() + at] = 0 - zero * lower_sum;
      sum = 128 * upper_sum + lower_sum;
      store_codes(lower, split, out + 2 * a.plane() * BLOCK);
      split_codes(codes, lower);
      store_codes(lower, split, out + a.plane() * BLOCK);
    } else {
      sum = sum_codes(codes);
      a.initial_sums[at] = 0 - zero * sum;
    }
    store_codes(codes, split, out);
    a.scales[at] =
        _mm256_movemask_ps(nans) ? std::numeric_limits<float>::quiet_NaN() : largest / largest_code(ACTIVATION_BITS);
    a.scaled_sums[at] = a.scales[at] * static_cast<int32_t>(sum);
  }
}

template void quantize_row_avx2<8>(const float*, const Activations&, int64_t);
template void quantize_row_avx2<24>(const float*, const Activations&, int64_t);

}  // namespace convllava

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
