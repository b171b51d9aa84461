// The GEMM for x86, a template over an instruction set `Isa`:
//
//   Isa::Lanes  vectors of COUNT lanes of 32 bits, a row of weights in each, with `dot`: four products of an unsigned
//               and a signed byte are added to each lane (see Vnni below and gemm_avx2.cpp)
//   Isa::TILE   rows of x that share the reading of weights: a power of two, as many as fit the registers with 8-bit
//               activations
//
// Weights lie row by row. As many bytes of COUNT rows as a vector has are transposed in registers, so that a vector
// holds four bytes of each row: a broadcast of four activations meets all rows in one instruction, and a block needs no
// sum across lanes. For one row of x this is done on the fly; for more, a task transposes its rows of weights once,
// into memory of its thread.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "lanes_avx2.h"

namespace convllava {
namespace {

constexpr int VECTORS = 8;  // of a block: four columns of each row in one

constexpr int64_t CACHE_LINE = 64;

CONVLLAVA_INLINE void prefetch(uintptr_t address) { _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1); }

// Lanes with `dot` in one instruction.
template <class Base>
struct Vnni : Base {
  using Ints = typename Base::Ints;
  template <Format>
  CONVLLAVA_INLINE static Ints start(int32_t initial) {
    return Base::broadcast_int(initial);
  }
  template <Format>
  CONVLLAVA_INLINE static Ints dot(Ints sum, Ints codes, Ints x) {
    return Base::dot_bytes(sum, codes, x);
  }
  template <Format>
  CONVLLAVA_INLINE static Ints finish(Ints sum, int32_t) {
    return sum;
  }
};

// The vectors of the block `index` of those that were transposed.
template <class Lanes, Format FORMAT>
CONVLLAVA_INLINE void expand_block(const typename Lanes::Ints* transposed, int index,
                                   typename Lanes::Ints (&block)[VECTORS]) {
  if constexpr (bits(FORMAT) == 4) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      block[v] = Lanes::low_nibbles(transposed[4 * index + v]);
      block[4 + v] = Lanes::high_nibbles(transposed[4 * index + v]);
    }
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) block[v] = transposed[8 * index + v];
  }
}

// Sums over a block: those of codes times the ones of ROWS blocks of x, which lie together, from initial[m] on.
template <class Lanes, Format FORMAT, int ROWS>
CONVLLAVA_INLINE void dot_block(const typename Lanes::Ints* block, const int8_t* x, const int32_t* initial,
                                typename Lanes::Ints (&dots)[ROWS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) dots[m] = Lanes::template start<FORMAT>(initial ? initial[m] : 0);
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
      dots[m] = Lanes::template dot<FORMAT>(dots[m], block[v], Lanes::broadcast_columns(x + m * BLOCK + 4 * v));
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) dots[m] = Lanes::template finish<FORMAT>(dots[m], initial ? initial[m] : 0);
}

// y[m] += the block's part of the dot product with row m of x, in units of the rows of weights. at: of x's block.
template <class Lanes, Format FORMAT, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void add_block(const typename Lanes::Ints* block, const uint8_t* block_scales, const Activations& a,
                                int64_t at, typename Lanes::Floats (&y)[ROWS]) {
  const int8_t* x = a.codes + at * BLOCK;
  const int32_t* initial = a.initial_sums + at;
  typename Lanes::Ints upper[ROWS], lower[ROWS];
  typename Lanes::Floats dots[ROWS];
  if constexpr (ACTIVATION_BITS == 24) {
    const int64_t plane = a.plane() * BLOCK;
    dot_block<Lanes, FORMAT>(block, x, nullptr, upper);
    dot_block<Lanes, FORMAT>(block, x + plane, initial, lower);
    for (int m = 0; m < ROWS; ++m) upper[m] = Lanes::add(Lanes::times_128(upper[m]), lower[m]);
    dot_block<Lanes, FORMAT>(block, x + 2 * plane, initial + a.plane(), lower);
    for (int m = 0; m < ROWS; ++m)
      dots[m] = Lanes::fma(Lanes::to_floats(upper[m]), Lanes::broadcast(128.0f), Lanes::to_floats(lower[m]));
  } else {
    dot_block<Lanes, FORMAT>(block, x, initial, upper);
    for (int m = 0; m < ROWS; ++m) dots[m] = Lanes::to_floats(upper[m]);
  }
  const auto scales = FORMAT == Format::INT4 ? Lanes::load_bytes(block_scales) : Lanes::load_halves(block_scales);
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
    y[m] = Lanes::fma(Lanes::multiply(dots[m], scales), Lanes::broadcast(a.scales[at + m]), y[m]);
  if constexpr (FORMAT == Format::INT4_OFFSETS) {
    const auto offsets = Lanes::load_halves(block_scales + 2 * GROUP);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) y[m] = Lanes::fma(offsets, Lanes::broadcast(a.scaled_sums[at + m]), y[m]);
  }
}

// The scales of COUNT rows of weights from `row` on.
template <class Lanes, Format FORMAT>
CONVLLAVA_INLINE const uint8_t* scales_of(const Weights& w, int64_t row) {
  return w.block_scales(row / GROUP, 0) + row % GROUP * (FORMAT == Format::INT4 ? 1 : 2);
}

// Reads COUNT rows of weights from `row` on, and calls use(block, its VECTORS vectors) for each block.
template <class Lanes, Format FORMAT, class Use>
CONVLLAVA_INLINE void for_each_block(const Weights& w, int64_t row, const Use& use) {
  using Ints = typename Lanes::Ints;
  constexpr int64_t BLOCKS = sizeof(Ints) / code_bytes(FORMAT);
  const int64_t last = w.rows - 1 - row;  // lanes behind it repeat it; their results are not stored
  const uint8_t* rows[Lanes::COUNT];
  for (int lane = 0; lane < Lanes::COUNT; ++lane)
    rows[lane] = w.codes + (row + std::min<int64_t>(lane, last)) * w.row_bytes;
  // Meanwhile the rows that follow are fetched into the second level's cache, in the order of their addresses.
  // Addresses are integers, for they may lie behind the last row: a prefetch does not fault.
  const int64_t steps = (w.blocks + BLOCKS - 1) / BLOCKS, step_bytes = Lanes::COUNT * w.row_bytes / steps;
  uintptr_t next_codes = reinterpret_cast<uintptr_t>(rows[0]) + Lanes::COUNT * w.row_bytes;
  uintptr_t next_scales = reinterpret_cast<uintptr_t>(w.block_scales(row / GROUP + 1, 0));
  for (int64_t block = 0; block < w.blocks; block += BLOCKS) {
    const size_t bytes = std::min(BLOCKS, w.blocks - block) * code_bytes(FORMAT);
    Ints vectors[Lanes::COUNT];
    if (bytes == sizeof(Ints)) {
#pragma GCC unroll 16
      for (int lane = 0; lane < Lanes::COUNT; ++lane) {
        vectors[lane] = Lanes::load(rows[lane] + block * code_bytes(FORMAT));
        if (lane * sizeof(Ints) % CACHE_LINE == 0) prefetch(next_codes + lane * sizeof(Ints));
      }
      if (step_bytes > static_cast<int64_t>(Lanes::COUNT * sizeof(Ints))) prefetch(next_codes + step_bytes - 1);
      next_codes += step_bytes;
      for (int64_t line = 0; line < BLOCKS * scale_bytes(FORMAT); line += CACHE_LINE) prefetch(next_scales + line);
      next_scales += BLOCKS * scale_bytes(FORMAT);
    } else {
      alignas(sizeof(Ints)) uint8_t codes[Lanes::COUNT][sizeof(Ints)] = {};
      for (int lane = 0; lane < Lanes::COUNT; ++lane) {
        std::memcpy(codes[lane], rows[lane] + block * code_bytes(FORMAT), std::min(bytes, sizeof(Ints)));
        vectors[lane] = Lanes::load(codes[lane]);
      }
    }
    Lanes::transpose(vectors);
#pragma GCC unroll 4
    for (int index = 0; index < BLOCKS; ++index) {
      if (block + index >= w.blocks) break;
      Ints expanded[VECTORS];
      expand_block<Lanes, FORMAT>(vectors, index, expanded);
      use(block + index, expanded);
    }
  }
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

// y in ROWS rows from `first`, in the columns of COUNT rows of weights from `row` on: `y` or, if there are two
// matrices, silu(y) * ups, in their units.
template <class Lanes, int ROWS>
CONVLLAVA_INLINE void store(const GemmCall& call, int64_t row, int64_t first, const typename Lanes::Floats (&y)[ROWS],
                            const typename Lanes::Floats (&ups)[ROWS]) {
  const Weights *w = call.weights[0], *up = call.weights[1];
  const int64_t columns = std::min<int64_t>(Lanes::COUNT, w->rows - row);
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    if (first + m >= call.a.rows) break;  // padded ones
    float lanes[2][Lanes::COUNT];
    Lanes::store(lanes[0], Lanes::multiply(y[m], Lanes::load_floats(w->units + row)));
    if (up) Lanes::store(lanes[1], Lanes::multiply(ups[m], Lanes::load_floats(up->units + row)));
    for (int lane = 0; up && lane < Lanes::COUNT; lane += 8)
      _mm256_storeu_ps(lanes[0] + lane, gated(_mm256_loadu_ps(lanes[0] + lane), _mm256_loadu_ps(lanes[1] + lane)));
    std::memcpy(call.y + (first + m) * w->rows + row, lanes[0], columns * sizeof(float));
  }
}

// All ROWS rows of x, with weights from where they are stored.
template <class Lanes, Format FORMAT, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void dot_stored(const Weights& w, int64_t row, const Activations& a,
                                 typename Lanes::Floats (&y)[ROWS]) {
  const uint8_t* scales = scales_of<Lanes, FORMAT>(w, row);
  for (int m = 0; m < ROWS; ++m) y[m] = Lanes::zero_floats();
  for_each_block<Lanes, FORMAT>(w, row, [&](int64_t block, const typename Lanes::Ints* vectors) {
    add_block<Lanes, FORMAT, ACTIVATION_BITS>(vectors, scales + block * scale_bytes(FORMAT), a, block * ROWS, y);
  });
}

// Whether x has ROWS rows with the padded ones, or half as many and so on, and was multiplied.
template <class Lanes, Format FORMAT, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE bool gemm_stored(const GemmCall& call, int64_t row, int64_t end) {
  if (call.a.padded_rows != ROWS) {
    if constexpr (ROWS > 1) return gemm_stored<Lanes, FORMAT, ACTIVATION_BITS, ROWS / 2>(call, row, end);
    return false;
  }
  for (; row < end; row += Lanes::COUNT) {
    typename Lanes::Floats y[ROWS], ups[ROWS] = {};
    dot_stored<Lanes, FORMAT, ACTIVATION_BITS>(*call.weights[0], row, call.a, y);
    if (call.weights[1]) dot_stored<Lanes, FORMAT, ACTIVATION_BITS>(*call.weights[1], row, call.a, ups);
    store<Lanes>(call, row, 0, y, ups);
  }
  return true;
}

// ROWS rows of x from `first`, in a tile of `tile` rows, with transposed weights.
template <class Lanes, Format FORMAT, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void dot_rows(const Weights& w, int64_t row, const typename Lanes::Ints* transposed,
                               const Activations& a, int64_t first, int64_t tile, typename Lanes::Floats (&y)[ROWS]) {
  const uint8_t* scales = scales_of<Lanes, FORMAT>(w, row);
  int64_t at = a.at(first, 0);
  for (int m = 0; m < ROWS; ++m) y[m] = Lanes::zero_floats();
  for (int64_t block = 0; block < w.blocks; ++block, at += tile, scales += scale_bytes(FORMAT), transposed += VECTORS)
    add_block<Lanes, FORMAT, ACTIVATION_BITS>(transposed, scales, a, at, y);
}

// Tiles of ROWS rows of x as long as there are so many, then of half as many. transposed: of both matrices.
template <class Lanes, Format FORMAT, int ACTIVATION_BITS, int ROWS>
CONVLLAVA_INLINE void gemm_rows(const GemmCall& call, int64_t row, const typename Lanes::Ints* const (&transposed)[2],
                                int64_t first, int64_t end, int64_t tile) {
  for (; first + ROWS <= end; first += ROWS) {
    typename Lanes::Floats y[ROWS], ups[ROWS] = {};
    dot_rows<Lanes, FORMAT, ACTIVATION_BITS>(*call.weights[0], row, transposed[0], call.a, first, tile, y);
    if (call.weights[1])
      dot_rows<Lanes, FORMAT, ACTIVATION_BITS>(*call.weights[1], row, transposed[1], call.a, first, tile, ups);
    store<Lanes>(call, row, first, y, ups);
  }
  if constexpr (ROWS > 1) gemm_rows<Lanes, FORMAT, ACTIVATION_BITS, ROWS / 2>(call, row, transposed, first, end, tile);
}

template <class Isa, Format FORMAT, int ACTIVATION_BITS>
void gemm_groups(const GemmCall& call, int64_t begin, int64_t end, Buffer& buffer) {
  using Lanes = typename Isa::Lanes;
  using Ints = typename Lanes::Ints;
  const Activations& a = call.a;
  const int64_t first_row = begin * GROUP, last_row = std::min(end * GROUP, call.weights[0]->rows);
  constexpr int ROWS = ACTIVATION_BITS == 24 ? Isa::TILE / 2 : Isa::TILE;  // two sums of integers a row
  if (gemm_stored<Lanes, FORMAT, ACTIVATION_BITS, ROWS>(call, first_row, last_row)) return;
  const int64_t vectors = a.blocks * VECTORS, parts = (last_row - first_row + Lanes::COUNT - 1) / Lanes::COUNT;
  const int matrices = call.weights[1] ? 2 : 1;
  Ints* memory = reinterpret_cast<Ints*>(buffer.reserve(matrices * parts * vectors * sizeof(Ints)));
  const auto transposed = [&](int matrix, int64_t part) { return memory + (matrix * parts + part) * vectors; };
  for (int matrix = 0; matrix < matrices; ++matrix) {
    for (int64_t part = 0; part < parts; ++part) {
      Ints* out = transposed(matrix, part);
      for_each_block<Lanes, FORMAT>(*call.weights[matrix], first_row + part * Lanes::COUNT,
                                    [&](int64_t block, const Ints* expanded) {
#pragma GCC unroll 8
                                      for (int v = 0; v < VECTORS; ++v) out[block * VECTORS + v] = expanded[v];
                                    });
    }
  }
  for (int64_t first = 0; first < a.rows; first += a.tile) {
    const int64_t tile = a.tile_rows(first);
    for (int64_t part = 0; part < parts; ++part) {
      const Ints* const both[2] = {transposed(0, part), transposed(matrices - 1, part)};
      gemm_rows<Lanes, FORMAT, ACTIVATION_BITS, ROWS>(call, first_row + part * Lanes::COUNT, both, first, first + tile,
                                                      tile);
    }
  }
}

template <class Isa>
constexpr KernelSet kernel_set(const char* name) {
  return {name,
          Isa::TILE,
          quantize_row_avx2<8>,
          quantize_row_avx2<24>,
          {{gemm_groups<Isa, Format::INT4, 8>, gemm_groups<Isa, Format::INT4, 24>},
           {gemm_groups<Isa, Format::INT4_OFFSETS, 8>, gemm_groups<Isa, Format::INT4_OFFSETS, 24>},
           {gemm_groups<Isa, Format::INT8, 8>, gemm_groups<Isa, Format::INT8, 24>}}};
}

}  // namespace
}  // namespace convllava
