// The products themselves, for one set of instructions: included once for each, with
//
//   TARGET     the attribute that lets a function use them
//   VNNI       1 where DOT adds four products of a byte without and a byte with sign to each of eight sums
//   WIDE       1 where they have vectors of 64 bytes, for two groups at once
//   MOST_ROWS  rows of x that go together
//
// Whatever the instructions, sums within a block are whole numbers, and what is computed from them is rounded in the
// same order: results are the same, bit for bit.

#define INLINE TARGET __attribute__((always_inline)) inline

INLINE __m256i four_columns(const int8_t* x) {
  int32_t columns;
  std::memcpy(&columns, x, 4);
  return _mm256_set1_epi32(columns);
}

// Eight scales or offsets: float32 where activations are fine, else float16
template <bool FINE>
INLINE __m256 eight_numbers(const uint8_t* memory) {
  if constexpr (FINE) return _mm256_loadu_ps(reinterpret_cast<const float*>(memory));
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(memory)));
}

// Of bytes without a sign and bytes with one: four to a sum of 32 bits, or without VNNI two to one of 16
INLINE __m256i add_products(__m256i sums, __m256i one, __m256i other) {
#if VNNI
  return DOT(sums, one, other);
#else
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(one, other));
#endif
}

// total[m]: the whole numbers that a block of weights and one of ROWS rows of x, `stride` bytes apart, add up to; of 8
// bits with VNNI, those of weights with 128 too much
template <int BITS, int ROWS>
INLINE void add_up(const uint8_t* record, const int8_t* x, int64_t stride, __m256i (&total)[ROWS]) {
  const auto* vectors = reinterpret_cast<const __m256i*>(record);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int m = 0; m < ROWS; ++m) total[m] = _mm256_setzero_si256();
  if constexpr (BITS == 4) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int v = 0; v < 4; ++v) {
      const __m256i both = _mm256_load_si256(vectors + v);
      const __m256i left = _mm256_and_si256(both, low);
      const __m256i right = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      for (int m = 0; m < ROWS; ++m) {
        const int8_t* columns = x + m * stride + 4 * v;
        total[m] = add_products(total[m], left, four_columns(columns));
        total[m] = add_products(total[m], right, four_columns(columns + 16));
      }
    }
    if (!VNNI)  // sums of 16 bits, which have room for a block
      for (int m = 0; m < ROWS; ++m) total[m] = _mm256_madd_epi16(total[m], ones);
  } else if constexpr (VNNI) {
    const __m256i sign = _mm256_set1_epi8(-128);
    for (int v = 0; v < 8; ++v) {
      const __m256i weights = _mm256_xor_si256(_mm256_load_si256(vectors + v), sign);
      for (int m = 0; m < ROWS; ++m) total[m] = add_products(total[m], weights, four_columns(x + m * stride + 4 * v));
    }
  } else {
    for (int v = 0; v < 8; ++v) {
      const __m256i weights = _mm256_load_si256(vectors + v);
      const __m256i size = _mm256_abs_epi8(weights);  // 128 for -128: unsigned from here on
      for (int m = 0; m < ROWS; ++m) {
        const __m256i columns = _mm256_sign_epi8(four_columns(x + m * stride + 4 * v), weights);
        total[m] = _mm256_add_epi32(total[m], _mm256_madd_epi16(_mm256_maddubs_epi16(size, columns), ones));
      }
    }
  }
}

// product[m]: the same with whole columns of x and weights as they are, as float32
template <int BITS, bool FINE, int ROWS>
INLINE void add_up_whole(const uint8_t* record, const Activations& a, int64_t first, int64_t block,
                         __m256 (&product)[ROWS]) {
  const int64_t stride = a.blocks * BLOCK, plane = a.rows * stride, at = first * a.blocks + block;
  const int8_t* x = a.quantised.data() + at * BLOCK;
  __m256i total[ROWS], lower[ROWS];
  add_up<BITS>(record, x, stride, total);
  if constexpr (FINE) {
    add_up<BITS>(record, x + plane, stride, lower);
    for (int m = 0; m < ROWS; ++m) total[m] = _mm256_add_epi32(_mm256_slli_epi32(total[m], 7), lower[m]);
    add_up<BITS>(record, x + 2 * plane, stride, lower);
  }
  for (int m = 0; m < ROWS; ++m) {
    const int32_t* levels = a.levels.data() + at + m * a.blocks;
    if constexpr (BITS == 8 && VNNI) total[m] = _mm256_sub_epi32(total[m], _mm256_set1_epi32(levels[0] * 128));
    product[m] = _mm256_cvtepi32_ps(total[m]);
    if constexpr (FINE) {
      if constexpr (BITS == 8 && VNNI)
        lower[m] = _mm256_sub_epi32(lower[m], _mm256_set1_epi32(levels[a.rows * a.blocks] * 128));
      product[m] = _mm256_fmadd_ps(product[m], _mm256_set1_ps(128.0f), _mm256_cvtepi32_ps(lower[m]));
    }
  }
}

// y[m]: the products of ROWS rows of x, from row `first`, with one group of weights
template <int BITS, bool FINE, int ROWS>
INLINE void multiply(const Weights& w, int64_t group, const Activations& a, int64_t first, __m256 (&y)[ROWS]) {
  constexpr size_t QUANTISED = GROUP * BLOCK * BITS / 8, RECORD = record_bytes(BITS, FINE);
  constexpr size_t OFFSETS = (QUANTISED + RECORD) / 2;
  const uint8_t* record = w.data.get() + group * w.blocks * RECORD;
  for (int m = 0; m < ROWS; ++m) y[m] = _mm256_setzero_ps();
  for (int64_t block = 0; block < w.blocks; ++block, record += RECORD) {
    if constexpr (ROWS == 1) {  // the memory is what it waits for
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(record) + AHEAD * RECORD;  // perhaps behind the last, unread
      for (size_t line = 0; line < RECORD; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
    }
    __m256 product[ROWS];
    add_up_whole<BITS, FINE>(record, a, first, block, product);
    const __m256 scales = eight_numbers<FINE>(record + QUANTISED);
    const __m256 offsets = eight_numbers<FINE>(record + OFFSETS);
    for (int m = 0; m < ROWS; ++m) {
      const int64_t at = (first + m) * a.blocks + block;
      y[m] = _mm256_fmadd_ps(_mm256_mul_ps(product[m], scales), _mm256_set1_ps(a.scales[at]), y[m]);
      y[m] = _mm256_fmadd_ps(offsets, _mm256_set1_ps(a.sums[at]), y[m]);
    }
  }
  for (int m = 0; m < ROWS; ++m) y[m] = _mm256_mul_ps(y[m], _mm256_set1_ps(w.unit));
}

// e^x, relative error 2e-7: 2^n by the exponent's bits, the rest (at most ln 2 / 2) by Taylor's series to the 7th power
INLINE __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, so that nothing of x is lost
  const __m256 rest =
      _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
  __m256 sum = _mm256_set1_ps(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm256_fmadd_ps(sum, rest, _mm256_set1_ps(term));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
}

// The last step of an MLP's first half: silu(y) * other
template <int ROWS>
INLINE void gate(__m256 (&y)[ROWS], const __m256 (&other)[ROWS]) {
  for (int m = 0; m < ROWS; ++m) {
    const __m256 one = _mm256_set1_ps(1.0f), minus = _mm256_sub_ps(_mm256_setzero_ps(), y[m]);
    y[m] = _mm256_mul_ps(_mm256_div_ps(y[m], _mm256_add_ps(one, exponential(minus))), other[m]);
  }
}

template <int ROWS>
INLINE void store(const Work& work, int64_t group, int64_t first, const __m256 (&y)[ROWS]) {
  const int64_t column = group * GROUP, rows = work.weights[0]->rows;
  for (int m = 0; m < ROWS; ++m) {
    float* out = work.y + (first + m) * rows + column;
    if (column + GROUP <= rows) {
      _mm256_storeu_ps(out, y[m]);
    } else {
      float lanes[GROUP];
      _mm256_storeu_ps(lanes, y[m]);
      std::copy_n(lanes, rows - column, out);
    }
  }
}

// Eight columns of y, from 8 * group, in ROWS rows from `first`
template <int BITS, bool FINE, int ROWS>
INLINE void tile(const Work& work, int64_t group, int64_t first) {
  __m256 y[ROWS];
  multiply<BITS, FINE>(*work.weights[0], group, work.a, first, y);
  if (const Weights* up = work.weights[1]) {
    __m256 other[ROWS];
    multiply<BITS, FINE>(*up, group, work.a, first, other);
    gate(y, other);
  }
  store(work, group, first, y);
}

#if WIDE
INLINE __m512i two_vectors(const uint8_t* one, const uint8_t* other) {
  const __m512i low = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(one)));
  return _mm512_inserti64x4(low, _mm256_load_si256(reinterpret_cast<const __m256i*>(other)), 1);
}

template <bool FINE>
INLINE __m512 sixteen_numbers(const uint8_t* one, const uint8_t* other) {
  const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(eight_numbers<FINE>(one)));
  return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(eight_numbers<FINE>(other)), 1));
}

INLINE __m512i four_columns_wide(const int8_t* x) {
  int32_t columns;
  std::memcpy(&columns, x, 4);
  return _mm512_set1_epi32(columns);
}

// As `add_up` for two records
template <int BITS, int ROWS>
INLINE void add_up_two(const uint8_t* one, const uint8_t* other, const int8_t* x, int64_t stride,
                       __m512i (&total)[ROWS]) {
  constexpr int64_t STEP = 4 * GROUP;
  for (int m = 0; m < ROWS; ++m) total[m] = _mm512_setzero_si512();
  if constexpr (BITS == 4) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int v = 0; v < 4; ++v) {
      const __m512i both = two_vectors(one + v * STEP, other + v * STEP);
      const __m512i left = _mm512_and_si512(both, low);
      const __m512i right = _mm512_and_si512(_mm512_srli_epi32(both, 4), low);
      for (int m = 0; m < ROWS; ++m) {
        const int8_t* columns = x + m * stride + 4 * v;
        total[m] = _mm512_dpbusd_epi32(total[m], left, four_columns_wide(columns));
        total[m] = _mm512_dpbusd_epi32(total[m], right, four_columns_wide(columns + 16));
      }
    }
  } else {
    const __m512i sign = _mm512_set1_epi8(-128);
    for (int v = 0; v < 8; ++v) {
      const __m512i weights = _mm512_xor_si512(two_vectors(one + v * STEP, other + v * STEP), sign);
      for (int m = 0; m < ROWS; ++m)
        total[m] = _mm512_dpbusd_epi32(total[m], weights, four_columns_wide(x + m * stride + 4 * v));
    }
  }
}

// As `add_up_whole` for two records
template <int BITS, bool FINE, int ROWS>
INLINE void add_up_whole_two(const uint8_t* one, const uint8_t* other, const Activations& a, int64_t first,
                             int64_t block, __m512 (&product)[ROWS]) {
  const int64_t stride = a.blocks * BLOCK, plane = a.rows * stride, at = first * a.blocks + block;
  const int8_t* x = a.quantised.data() + at * BLOCK;
  __m512i total[ROWS], lower[ROWS];
  add_up_two<BITS>(one, other, x, stride, total);
  if constexpr (FINE) {
    add_up_two<BITS>(one, other, x + plane, stride, lower);
    for (int m = 0; m < ROWS; ++m) total[m] = _mm512_add_epi32(_mm512_slli_epi32(total[m], 7), lower[m]);
    add_up_two<BITS>(one, other, x + 2 * plane, stride, lower);
  }
  for (int m = 0; m < ROWS; ++m) {
    const int32_t* levels = a.levels.data() + at + m * a.blocks;
    if constexpr (BITS == 8) total[m] = _mm512_sub_epi32(total[m], _mm512_set1_epi32(levels[0] * 128));
    product[m] = _mm512_cvtepi32_ps(total[m]);
    if constexpr (FINE) {
      if constexpr (BITS == 8)
        lower[m] = _mm512_sub_epi32(lower[m], _mm512_set1_epi32(levels[a.rows * a.blocks] * 128));
      product[m] = _mm512_fmadd_ps(product[m], _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(lower[m]));
    }
  }
}

// As `multiply` for `group` and the one after it
template <int BITS, bool FINE, int ROWS>
INLINE void multiply_two(const Weights& w, int64_t group, const Activations& a, int64_t first, __m256 (&y)[2][ROWS]) {
  constexpr size_t QUANTISED = GROUP * BLOCK * BITS / 8, RECORD = record_bytes(BITS, FINE);
  constexpr size_t OFFSETS = (QUANTISED + RECORD) / 2;
  const uint8_t *one = w.data.get() + group * w.blocks * RECORD, *other = one + w.blocks * RECORD;
  __m512 sums[ROWS];
  for (int m = 0; m < ROWS; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t block = 0; block < w.blocks; ++block, one += RECORD, other += RECORD) {
    __m512 product[ROWS];
    add_up_whole_two<BITS, FINE>(one, other, a, first, block, product);
    const __m512 scales = sixteen_numbers<FINE>(one + QUANTISED, other + QUANTISED);
    const __m512 offsets = sixteen_numbers<FINE>(one + OFFSETS, other + OFFSETS);
    for (int m = 0; m < ROWS; ++m) {
      const int64_t at = (first + m) * a.blocks + block;
      sums[m] = _mm512_fmadd_ps(_mm512_mul_ps(product[m], scales), _mm512_set1_ps(a.scales[at]), sums[m]);
      sums[m] = _mm512_fmadd_ps(offsets, _mm512_set1_ps(a.sums[at]), sums[m]);
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    sums[m] = _mm512_mul_ps(sums[m], _mm512_set1_ps(w.unit));
    y[0][m] = _mm512_castps512_ps256(sums[m]);
    y[1][m] = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums[m]), 1));
  }
}

template <int BITS, bool FINE, int ROWS>
INLINE void tile_two(const Work& work, int64_t group, int64_t first) {
  __m256 y[2][ROWS];
  multiply_two<BITS, FINE>(*work.weights[0], group, work.a, first, y);
  if (const Weights* up = work.weights[1]) {
    __m256 other[2][ROWS];
    multiply_two<BITS, FINE>(*up, group, work.a, first, other);
    for (int side = 0; side < 2; ++side) gate(y[side], other[side]);
  }
  for (int side = 0; side < 2; ++side) store(work, group + side, first, y[side]);
}
#endif

// Rows that go together share the reading and unpacking of weights, as many as fit the registers
template <int BITS, bool FINE>
TARGET void some_groups(const Work& work, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    int64_t row = 0;
#if WIDE
    if (work.a.rows > 1 && group + 1 < end) {  // a single row waits for the memory
      for (; row + MOST_ROWS <= work.a.rows; row += MOST_ROWS) tile_two<BITS, FINE, MOST_ROWS>(work, group, row);
      for (; row + 2 <= work.a.rows; row += 2) tile_two<BITS, FINE, 2>(work, group, row);
      if (row < work.a.rows) tile_two<BITS, FINE, 1>(work, group, row);
      ++group;
      continue;
    }
#endif
    for (; row + MOST_ROWS <= work.a.rows; row += MOST_ROWS) tile<BITS, FINE, MOST_ROWS>(work, group, row);
    if (MOST_ROWS > 4 && row + 4 <= work.a.rows) tile<BITS, FINE, 4>(work, group, row), row += 4;
    for (; row + 2 <= work.a.rows; row += 2) tile<BITS, FINE, 2>(work, group, row);
    if (row < work.a.rows) tile<BITS, FINE, 1>(work, group, row);
  }
}

#undef INLINE
#undef TARGET
#undef VNNI
#undef WIDE
#undef DOT
#undef MOST_ROWS
