// The GEMM for x86, a template over an instruction set `Isa`:
//
//   Isa::Lanes      one group of rows of weights, with `dot`: four products of an unsigned and a signed byte are added
//                   to each lane (see Vnni below and gemm_avx2.cpp)
//   Isa::WideLanes  the same for two groups, where there are such vectors; else Lanes
//   Isa::MAX_ROWS   rows of x that share the reading of weights: a power of two, as many as fit the registers
//                   with 8-bit activations
//
// Eight rows of weights lie together, four columns of each in one vector, so that a broadcast of four activations meets
// all eight in one instruction, and a block needs no sum across lanes.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "lanes_avx2.h"

namespace convllava {
namespace {

constexpr int64_t PREFETCH_BLOCKS = 8;

// Lanes with `dot` in one instruction. Codes of 8 bits have no sign there: 128 is added, and in the end subtracted as
// often as x has it.
template <class Base>
struct Vnni : Base {
  using Ints = typename Base::Ints;
  CONVLLAVA_INLINE static Ints dot_4(Ints sum, Ints codes, Ints x) { return Base::dot(sum, codes, x); }
  CONVLLAVA_INLINE static Ints finish_4(Ints sum) { return sum; }
  CONVLLAVA_INLINE static Ints dot_8(Ints sum, Ints codes, Ints x) { return Base::dot(sum, Base::add_128(codes), x); }
  CONVLLAVA_INLINE static Ints finish_8(Ints sum, int32_t act_sum) {
    return Base::subtract(sum, static_cast<int32_t>(128u * act_sum));  // wraps around where x is infinite
  }
};

// dots[m]: sums of codes of a packed block times those of ROWS blocks of x, which are row_bytes apart; unfinished of
// 8 bits.
template <class Lanes, int BITS, int ROWS>
CONVLLAVA_INLINE void dot_block(const uint8_t* packed_block, ptrdiff_t group_bytes, const int8_t* x,
                                ptrdiff_t row_bytes, typename Lanes::Ints (&dots)[ROWS]) {
  for (int m = 0; m < ROWS; ++m) dots[m] = Lanes::zero_ints();
  if constexpr (BITS == 4) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const auto codes = Lanes::load_codes(packed_block + v * VECTOR_BYTES, group_bytes);
      const auto low = Lanes::low_nibbles(codes), high = Lanes::high_nibbles(codes);
      for (int m = 0; m < ROWS; ++m) {
        const int8_t* columns = x + m * row_bytes + 4 * v;
        dots[m] = Lanes::dot_4(dots[m], low, Lanes::broadcast_columns(columns));
        dots[m] = Lanes::dot_4(dots[m], high, Lanes::broadcast_columns(columns + 16));
      }
    }
    for (int m = 0; m < ROWS; ++m) dots[m] = Lanes::finish_4(dots[m]);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const auto codes = Lanes::load_codes(packed_block + v * VECTOR_BYTES, group_bytes);
      for (int m = 0; m < ROWS; ++m)
        dots[m] = Lanes::dot_8(dots[m], codes, Lanes::broadcast_columns(x + m * row_bytes + 4 * v));
    }
  }
}

// dots[m]: the same with all planes of codes of x, from row `first`, as float32.
template <class Lanes, int BITS, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void dot_planes(const uint8_t* packed_block, ptrdiff_t group_bytes, const Activations& a,
                                 int64_t first, int64_t block, typename Lanes::Floats (&dots)[ROWS]) {
  const int64_t row_bytes = a.blocks * BLOCK, plane = a.rows * row_bytes, at = first * a.blocks + block;
  const int8_t* x = a.codes + at * BLOCK;
  typename Lanes::Ints upper[ROWS], lower[ROWS];
  dot_block<Lanes, BITS>(packed_block, group_bytes, x, row_bytes, upper);
  if constexpr (ACTIVATION_BITS == 24) {
    dot_block<Lanes, BITS>(packed_block, group_bytes, x + plane, row_bytes, lower);
    for (int m = 0; m < ROWS; ++m) upper[m] = Lanes::add(Lanes::times_128(upper[m]), lower[m]);
    dot_block<Lanes, BITS>(packed_block, group_bytes, x + 2 * plane, row_bytes, lower);
  }
  for (int m = 0; m < ROWS; ++m) {
    const int32_t* act_sums = a.act_sums + at + m * a.blocks;
    if constexpr (BITS == 8) upper[m] = Lanes::finish_8(upper[m], act_sums[0]);
    dots[m] = Lanes::to_floats(upper[m]);
    if constexpr (ACTIVATION_BITS == 24) {
      if constexpr (BITS == 8) lower[m] = Lanes::finish_8(lower[m], act_sums[a.rows * a.blocks]);
      dots[m] = Lanes::fma(dots[m], Lanes::broadcast(128.0f), Lanes::to_floats(lower[m]));
    }
  }
}

// y[m] += (scales * dots[m] + offsets * sum of x) in the scale of x.
template <class Lanes, int BITS, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void dequantize_block(const uint8_t* packed_block, ptrdiff_t group_bytes, const Activations& a,
                                       int64_t first, int64_t block, const typename Lanes::Floats (&dots)[ROWS],
                                       typename Lanes::Floats (&y)[ROWS]) {
  const uint8_t* memory = packed_block + code_bytes(BITS);
  const auto scales = Lanes::template load_scales<ACTIVATION_BITS>(memory, group_bytes);
  const auto offsets =
      Lanes::template load_scales<ACTIVATION_BITS>(memory + GROUP * scale_bytes(ACTIVATION_BITS), group_bytes);
  for (int m = 0; m < ROWS; ++m) {
    const int64_t at = (first + m) * a.blocks + block;
    y[m] = Lanes::fma(Lanes::multiply(dots[m], scales), Lanes::broadcast(a.scales[at]), y[m]);
    y[m] = Lanes::fma(offsets, Lanes::broadcast(a.scaled_sums[at]), y[m]);
  }
}

// y[m]: row `first` + m of x times the rows of weights from `group`.
template <class Lanes, int BITS, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void dot_rows(const PackedMatrix& w, int64_t group, const Activations& a, int64_t first,
                               typename Lanes::Floats (&y)[ROWS]) {
  constexpr size_t BLOCK_BYTES = packed_block_bytes(BITS, ACTIVATION_BITS);
  const ptrdiff_t group_bytes = w.blocks * BLOCK_BYTES;
  const uint8_t* packed_block = w.data.get() + group * group_bytes;
  for (int m = 0; m < ROWS; ++m) y[m] = Lanes::zero_floats();
  for (int64_t block = 0; block < w.blocks; ++block, packed_block += BLOCK_BYTES) {
    if constexpr (ROWS == 1 && Lanes::GROUPS == 1) {  // bound by memory
      // An address, for it may lie behind the last block: a prefetch does not fault
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(packed_block) + PREFETCH_BLOCKS * BLOCK_BYTES;
      for (size_t line = 0; line < BLOCK_BYTES; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
    }
    typename Lanes::Floats dots[ROWS];
    dot_planes<Lanes, BITS, ACTIVATION_BITS>(packed_block, group_bytes, a, first, block, dots);
    dequantize_block<Lanes, BITS, ACTIVATION_BITS>(packed_block, group_bytes, a, first, block, dots, y);
  }
  for (int m = 0; m < ROWS; ++m) y[m] = Lanes::multiply(y[m], Lanes::broadcast(w.scale_unit));
}

// e^x, relative error 2e-7: 2^n by the exponent's bits, the rest (at most ln 2 / 2) by Taylor's series to
// its 7th power.
CONVLLAVA_INLINE __m256 exponential(__m256 x) {
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

// silu(gate) * up
CONVLLAVA_INLINE __m256 gated(__m256 gate, __m256 up) {
  const __m256 one = _mm256_set1_ps(1.0f), minus = _mm256_sub_ps(_mm256_setzero_ps(), gate);
  return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(one, exponential(minus))), up);
}

// Eight columns of y, or as many as it has.
CONVLLAVA_INLINE void store_group(__m256 y, float* out, int64_t columns) {
  if (columns >= GROUP) {
    _mm256_storeu_ps(out, y);
  } else {
    float lanes[GROUP];
    _mm256_storeu_ps(lanes, y);
    std::memcpy(out, lanes, columns * sizeof(float));
  }
}

// y in ROWS rows from `first`, in the columns of Lanes::GROUPS groups of weights.
template <class Lanes, int BITS, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void gemm_tile(const GemmCall& call, int64_t group, int64_t first) {
  const PackedMatrix& w = *call.weights[0];
  float* out = call.y + first * w.rows + group * GROUP;
  const int64_t columns = w.rows - group * GROUP;
  typename Lanes::Floats y[ROWS];
  dot_rows<Lanes, BITS, ACTIVATION_BITS>(w, group, call.a, first, y);
  if (const PackedMatrix* up = call.weights[1]) {
    typename Lanes::Floats ups[ROWS];
    dot_rows<Lanes, BITS, ACTIVATION_BITS>(*up, group, call.a, first, ups);
    for (int side = 0; side < Lanes::GROUPS; ++side)
      for (int m = 0; m < ROWS; ++m)
        store_group(gated(Lanes::group(y[m], side), Lanes::group(ups[m], side)), out + m * w.rows + side * GROUP,
                    columns - side * GROUP);
  } else {
    for (int side = 0; side < Lanes::GROUPS; ++side)
      for (int m = 0; m < ROWS; ++m)
        store_group(Lanes::group(y[m], side), out + m * w.rows + side * GROUP, columns - side * GROUP);
  }
}

// Tiles of ROWS rows as long as there are so many, then of half as many.
template <class Lanes, int BITS, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void gemm_rows(const GemmCall& call, int64_t group, int64_t row) {
  for (; row + ROWS <= call.a.rows; row += ROWS) gemm_tile<Lanes, BITS, ACTIVATION_BITS, ROWS>(call, group, row);
  if constexpr (ROWS > 1) gemm_rows<Lanes, BITS, ACTIVATION_BITS, ROWS / 2>(call, group, row);
}

template <class Isa, int BITS, int ACTIVATION_BITS>
void gemm_groups(const GemmCall& call, int64_t begin, int64_t end) {
  using Wide = typename Isa::WideLanes;
  constexpr int ROWS = ACTIVATION_BITS == 24 ? Isa::MAX_ROWS / 2 : Isa::MAX_ROWS;  // two sums of integers a row
  int64_t group = begin;
  if constexpr (Wide::GROUPS == 2) {
    if (call.a.rows > 1)  // a single row waits for the memory
      for (; group + 1 < end; group += 2) gemm_rows<Wide, BITS, ACTIVATION_BITS, ROWS>(call, group, 0);
  }
  for (; group < end; ++group) gemm_rows<typename Isa::Lanes, BITS, ACTIVATION_BITS, ROWS>(call, group, 0);
}

template <class Isa>
constexpr KernelSet kernel_set(const char* name) {
  return {name,
          quantize_row_avx2<8>,
          quantize_row_avx2<24>,
          {{gemm_groups<Isa, 4, 8>, gemm_groups<Isa, 4, 24>}, {gemm_groups<Isa, 8, 8>, gemm_groups<Isa, 8, 24>}}};
}

}  // namespace
}  // namespace convllava
