#include "isa.h"

#ifdef CONVLLAVA_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "image.h"

namespace convllava {
namespace {

constexpr int FRACTION_BITS = 22;  // of a coefficient: 32 less 8 of a pixel and 2 for sums above 1
constexpr int LOWER_BITS = 15;     // of a coefficient that is split into two factors of 16 bits
constexpr int TAPS = 4;            // that are multiplied at once

// The convolution kernel of Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -1/2.
double bicubic(double x) {
  constexpr double A = -0.5;
  x = std::abs(x);
  if (x < 1) return ((A + 2) * x - (A + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * A;
  return 0;
}

// What each output is made of: `count` inputs from `first` on, times coefficients = upper * 2^15 + lower.
struct Filters {
  int64_t stride;  // coefficients of an output, those behind its count 0
  std::vector<int64_t> first, count;
  std::vector<int16_t> upper, lower;
};

// Every operation is in double precision and in Pillow's order (ImagingResample), for the same bits.
Filters make_filters(int64_t inputs, int64_t outputs) {
  const double scale = static_cast<double>(inputs) / outputs, filter_scale = std::max(scale, 1.0);
  const double support = 2 * filter_scale, inverse = 1 / filter_scale;
  const int64_t most = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  Filters f{(most + TAPS - 1) / TAPS * TAPS, {}, {}, {}, {}};
  f.first.resize(outputs);
  f.count.resize(outputs);
  f.upper.resize(outputs * f.stride);
  f.lower.resize(outputs * f.stride);
  std::vector<double> taps(most);
  for (int64_t i = 0; i < outputs; ++i) {
    const double center = (i + 0.5) * scale;
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t count = std::min(static_cast<int64_t>(center + support + 0.5), inputs) - first;
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += taps[k] = bicubic((k + first - center + 0.5) * inverse);
    for (int64_t k = 0; k < count; ++k) {
      const double exact = (sum != 0 ? taps[k] / sum : taps[k]) * (1 << FRACTION_BITS);
      const int32_t fixed = static_cast<int32_t>(exact < 0 ? exact - 0.5 : exact + 0.5);
      f.upper[i * f.stride + k] = static_cast<int16_t>(fixed >> LOWER_BITS);
      f.lower[i * f.stride + k] = static_cast<int16_t>(fixed & ((1 << LOWER_BITS) - 1));
    }
    f.first[i] = first;
    f.count[i] = count;
  }
  return f;
}

}  // namespace
}  // namespace convllava

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

namespace convllava {
namespace {

constexpr int ROWS = 4;        // that share the reading of coefficients
constexpr int64_t SLACK = 64;  // bytes behind a row that may be read, for coefficients 0

// 8 sums of fixed point, which wrap around in their parts but not as a whole.
__m256i whole(__m256i upper, __m256i lower) { return _mm256_add_epi32(_mm256_slli_epi32(upper, LOWER_BITS), lower); }

__m128i rounded(__m128i sums) {
  return _mm_srai_epi32(_mm_add_epi32(sums, _mm_set1_epi32(1 << (FRACTION_BITS - 1))), FRACTION_BITS);
}

// ROWS rows, `stride` bytes apart, to rows of out_width pixels and a byte.
void resize_some_rows(const Filters& f, const uint8_t* in, int64_t stride, uint8_t* out, int64_t out_width) {
  // Of four pixels RGB the first two to one half, the last two to the other: R0 R1 G0 G1 B0 B1 0 0 in 16 bits each
  const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                         6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const auto coefficients = [&](const int16_t* four) {
    return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(four))),
                                       halves);
  };
  for (int64_t x = 0; x < out_width; ++x) {
    const uint8_t* at = in + 3 * f.first[x];
    __m256i upper[ROWS] = {}, lower[ROWS] = {};
    for (int64_t k = 0; k < f.count[x]; k += TAPS, at += 3 * TAPS) {
      const __m256i u = coefficients(&f.upper[x * f.stride + k]), l = coefficients(&f.lower[x * f.stride + k]);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + m * stride));
        const __m256i pixels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), pairs);
        upper[m] = _mm256_add_epi32(upper[m], _mm256_madd_epi16(pixels, u));
        lower[m] = _mm256_add_epi32(lower[m], _mm256_madd_epi16(pixels, l));
      }
    }
    __m128i sums[ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const __m256i both = whole(upper[m], lower[m]);
      sums[m] = rounded(_mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
    }
    const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(sums[0], sums[1]), _mm_packs_epi32(sums[2], sums[3]));
    const int32_t pixels[ROWS] = {_mm_cvtsi128_si32(bytes), _mm_extract_epi32(bytes, 1), _mm_extract_epi32(bytes, 2),
                                  _mm_extract_epi32(bytes, 3)};
    for (int m = 0; m < ROWS; ++m) std::memcpy(out + m * (3 * out_width + 1) + 3 * x, &pixels[m], 4);
  }
}

// 16 bytes of an output row. at: of the first of its input rows.
__m128i resize_bytes(const uint8_t* at, int64_t row_bytes, const int16_t* upper, const int16_t* lower, int64_t count) {
  __m256i u[2] = {}, l[2] = {};
  for (int64_t k = 0; k < count; k += 2, at += 2 * row_bytes) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + (k + 1 < count ? row_bytes : 0)));
    const __m256i pairs[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)),
                              _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b))};
    int32_t both[2];  // two coefficients each
    std::memcpy(&both[0], upper + k, 4);
    std::memcpy(&both[1], lower + k, 4);
    for (int half = 0; half < 2; ++half) {
      u[half] = _mm256_add_epi32(u[half], _mm256_madd_epi16(pairs[half], _mm256_set1_epi32(both[0])));
      l[half] = _mm256_add_epi32(l[half], _mm256_madd_epi16(pairs[half], _mm256_set1_epi32(both[1])));
    }
  }
  __m128i words[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i sums = whole(u[half], l[half]);
    words[half] = _mm_packs_epi32(rounded(_mm256_castsi256_si128(sums)), rounded(_mm256_extracti128_si256(sums, 1)));
  }
  return _mm_packus_epi16(words[0], words[1]);
}

void resize_rows(const uint8_t* pixels, int64_t rows, int64_t width, uint8_t* out, int64_t out_width) {
  const Filters f = make_filters(width, out_width);
  const int64_t bytes = 3 * width, stride = bytes + SLACK, out_bytes = 3 * out_width;
  std::vector<uint8_t> in(ROWS * stride), resized(ROWS * (out_bytes + 1) + SLACK);
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t some = std::min<int64_t>(ROWS, rows - first);
    for (int64_t m = 0; m < some; ++m) std::memcpy(&in[m * stride], pixels + (first + m) * bytes, bytes);
    resize_some_rows(f, in.data(), stride, resized.data(), out_width);
    for (int64_t m = 0; m < some; ++m)
      std::memcpy(out + (first + m) * out_bytes, &resized[m * (out_bytes + 1)], out_bytes);
  }
}

void resize_columns(const uint8_t* pixels, int64_t height, int64_t row_bytes, uint8_t* out, int64_t out_height) {
  constexpr int64_t BYTES = sizeof(__m128i);
  const Filters f = make_filters(height, out_height);
  std::vector<uint8_t> end;  // the columns behind the last whole vector, padded to one
  const int64_t rest = row_bytes % BYTES, body = row_bytes - rest;
  if (rest) {
    end.resize(height * BYTES);
    for (int64_t y = 0; y < height; ++y) std::memcpy(&end[y * BYTES], pixels + y * row_bytes + body, rest);
  }
  for (int64_t y = 0; y < out_height; ++y, out += row_bytes) {
    const uint8_t* rows = pixels + f.first[y] * row_bytes;
    const int16_t *upper = &f.upper[y * f.stride], *lower = &f.lower[y * f.stride];
    for (int64_t x = 0; x < body; x += BYTES)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + x),
                       resize_bytes(rows + x, row_bytes, upper, lower, f.count[y]));
    if (rest) {
      const __m128i last = resize_bytes(&end[f.first[y] * BYTES], BYTES, upper, lower, f.count[y]);
      std::memcpy(out + body, &last, rest);
    }
  }
}

// An allocation that fails must not end the caller's process.
template <class Call>
int status_of(const Call& call) {
  try {
    call();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace convllava

int convllava_resize_rows(const uint8_t* pixels, int64_t rows, int64_t width, uint8_t* out, int64_t out_width) {
  return convllava::status_of([&] { convllava::resize_rows(pixels, rows, width, out, out_width); });
}

int convllava_resize_columns(const uint8_t* pixels, int64_t height, int64_t row_bytes, uint8_t* out,
                             int64_t out_height) {
  return convllava::status_of([&] { convllava::resize_columns(pixels, height, row_bytes, out, out_height); });
}

void convllava_normalize(const uint8_t* pixels, int64_t count, const float* levels, float* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int channel = 0; channel < 3; ++channel)
      out[channel * count + i] = levels[256 * channel + pixels[3 * i + channel]];
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
