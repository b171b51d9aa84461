// Products with weights in blocks of 4 or 8 bits on x86 processors with AVX2, and faster with VNNI, as operators of ONNX
// Runtime:
//
//   BlockMatMul       y = x W^T
//   GatedBlockMatMul  y = silu(x G^T) * (x U^T), the first half of a Llama's MLP
//
// in the domain `convllava`. Weights come as MatMulNBits has them (com.microsoft): quantised uint8 [N, blocks, bytes],
// scales float [N, blocks], zero points uint8 [N, packed] or none (8, 128). x float [..., K], K a multiple of 32, the
// block. Where the weights have more blocks than K / 32, the K / 32 columns after the K-th are products with the means
// of x's blocks (`calib.blocks`), and become part of each block's offset.
//
// Activations are rounded to 8 bits for each block, as MatMulNBits does at accuracy level 4. With the session's entry
// convllava.activation_bits=24 they are finer: 21 bits and a sign in three bytes, which meet the weights one after the
// other, and scales and offsets of weights stay float32, so that results are as near to float32 products as those are to
// each other in another order. What makes this fast is how weights lie: eight rows, four columns of each, in one vector. A broadcast of four activations then meets eight
// rows at once, sums of 16 products stay within 16 bits for 4-bit weights (16 * 15 * 127 = 30480), and a block costs
// one horizontal addition for eight rows in place of eight. Each result is the same whatever rows of x it is computed
// with. A row of x with a NaN gives NaN.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ort_abi.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own headers
#endif
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))

namespace {

constexpr int64_t BLOCK = 32;      // columns with a scale and an offset of their own
constexpr int64_t GROUP = 8;       // rows that lie together
constexpr int64_t TASK = 4;        // groups that a thread takes at once
constexpr int64_t AHEAD = 8;       // blocks between what is read and what is fetched
constexpr int64_t ROWS_ALONE = 4;  // rows of x that one thread rounds sooner than two

constexpr size_t record_bytes(int bits, bool fine) { return GROUP * BLOCK * bits / 8 + (fine ? 8 : 4) * GROUP; }

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// One matrix, packed: for each group of rows, for each block, its quantised columns, scales and offsets (both float16,
// or float32 for fine activations). A weight is unit * (scale * quantised + offset); unit is a power of two that brings
// the largest scale or offset to [2^13, 2^14), so that none is too small for float16; 1 for float32.
struct Weights {
  int64_t rows = 0, columns = 0, blocks = 0, groups = 0;
  int bits = 0;
  bool fine = false;
  float unit = 1;
  std::unique_ptr<uint8_t, Free> data;
};

// What of x is multiplied: a block's columns, its scale, scale * sum, and the sum. A column is a byte, or where it is
// fine 128^2 times the one in the first third of `quantised`, 128 times that in the second and that in the last.
struct Activations {
  int64_t rows, blocks;
  std::vector<int8_t> quantised;
  std::vector<float> scales, sums;
  std::vector<int32_t> levels;  // sums of what is quantised; where it is fine, of 128 a + b and behind those of c
};

// Weights as MatMulNBits has them: of 4 bits, the even one of two columns in the lower half of a byte.
struct Stored {
  const uint8_t* quantised;
  const float* scales;
  const uint8_t* zeros;
  int64_t blocks;
  int bits;

  const uint8_t* block(int64_t row, int64_t index) const {
    return quantised + (row * blocks + index) * BLOCK * bits / 8;
  }
  float scale(int64_t row, int64_t index) const { return scales[row * blocks + index]; }
  int zero(int64_t row, int64_t index) const {
    if (!zeros) return bits == 8 ? 128 : 8;
    return bits == 8 ? zeros[row * blocks + index] : half(zeros + row * ((blocks + 1) / 2), index);
  }
  int value(int64_t row, int64_t column) const {
    const uint8_t* in = block(row, column / BLOCK);
    return bits == 8 ? in[column % BLOCK] : half(in, column % BLOCK);
  }
  static int half(const uint8_t* bytes, int64_t index) {
    return index % 2 ? bytes[index / 2] >> 4 : bytes[index / 2] & 15;
  }
};

// What is added to scale * quantised for a weight (of 8 bits: quantised - 128). scale: of the block, as it is kept.
float offset(const Weights& w, const Stored& stored, int64_t row, int64_t block, float scale) {
  const float fixed = -scale * (stored.zero(row, block) - (w.bits == 8 ? 128 : 0));
  if (stored.blocks == w.blocks) return fixed;
  const int64_t column = w.columns + block, its = column / BLOCK;  // what the mean of the block is multiplied by
  return fixed + stored.scale(row, its) * (stored.value(row, column) - stored.zero(row, its)) / BLOCK;
}

AVX2 uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
AVX2 float from_half(uint16_t value) { return _cvtsh_ss(value); }

// The four columns of one row in each of a group's vectors: of 4 bits, columns 4 v in the lower halves of vector v and
// columns 4 v + 16 in the upper ones; of 8 bits, columns 4 v in vector v, signed.
void spread(const uint8_t* in, int bits, uint8_t* out) {
  constexpr int64_t STEP = 4 * GROUP;  // bytes of a vector
  if (bits == 8) {
    for (int64_t i = 0; i < BLOCK; ++i) out[i / 4 * STEP + i % 4] = in[i] ^ 128;
    return;
  }
  for (int64_t i = 0; i < 8; ++i) {  // two columns, and the two that are 16 further
    uint8_t* pair = out + i / 2 * STEP + i % 2 * 2;
    pair[0] = (in[i] & 15) | (in[i + 8] & 15) << 4;
    pair[1] = in[i] >> 4 | (in[i + 8] & 240);
  }
}

// Brings the largest scale or offset to where float16 is at its best
void find_unit(Weights& w, const Stored& stored) {
  float largest = 0;
  for (int64_t row = 0; row < w.rows; ++row) {
    for (int64_t block = 0; block < w.blocks; ++block) {
      const float scale = stored.scale(row, block);
      largest = std::max({largest, std::abs(scale), std::abs(offset(w, stored, row, block, scale))});
    }
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = std::max(exponent, -100);  // smaller scales become 0, and their inverse would be infinite
  w.unit = std::ldexp(1.0f, exponent - 14);
}

void pack(Weights& w, const Stored& stored) {
  if (!w.fine) find_unit(w, stored);
  const float to_units = 1 / w.unit;
  const size_t quantised = GROUP * BLOCK * w.bits / 8, record = record_bytes(w.bits, w.fine),
               bytes = w.groups * w.blocks * record;
  w.data.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (!w.data) throw std::string("no memory for packed weights");
  if (w.rows % GROUP) std::memset(w.data.get(), 0, bytes);
  for (int64_t row = 0; row < w.rows; ++row) {
    const int64_t lane = row % GROUP;
    uint8_t* out = w.data.get() + row / GROUP * w.blocks * record;
    for (int64_t block = 0; block < w.blocks; ++block, out += record) {
      spread(stored.block(row, block), w.bits, out + 4 * lane);
      uint8_t* numbers = out + quantised;
      if (w.fine) {
        const float scale = stored.scale(row, block), added = offset(w, stored, row, block, scale);
        std::memcpy(numbers + 4 * lane, &scale, 4);
        std::memcpy(numbers + 4 * (GROUP + lane), &added, 4);
        continue;
      }
      const uint16_t scale = to_half(stored.scale(row, block) * to_units);
      const uint16_t added = to_half(offset(w, stored, row, block, from_half(scale) * w.unit) * to_units);
      std::memcpy(numbers + 2 * lane, &scale, 2);
      std::memcpy(numbers + 2 * (GROUP + lane), &added, 2);
    }
  }
}

// Four times eight whole numbers, of a byte each, in their order
AVX2 void store_bytes(const __m256i (&q)[4], int8_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(packed, order));
}

AVX2 int32_t total(const __m256i (&q)[4]) {
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  four = _mm_hadd_epi32(four, four);
  four = _mm_hadd_epi32(four, four);
  return _mm_cvtsi128_si32(four);
}

// q becomes 128 q + lower, with lower from -64 to 63
AVX2 void lower_bits(__m256i (&q)[4], __m256i (&lower)[4]) {
  for (int i = 0; i < 4; ++i) {
    const __m256i upper = _mm256_srai_epi32(_mm256_add_epi32(q[i], _mm256_set1_epi32(64)), 7);
    lower[i] = _mm256_sub_epi32(q[i], _mm256_slli_epi32(upper, 7));
    q[i] = upper;
  }
}

template <bool FINE>
AVX2 void quantise(const float* x, Activations& a, int64_t row) {
  constexpr float LEVELS = FINE ? 127.0f * 128.0f * 128.0f : 127.0f;
  const __m256 sign = _mm256_set1_ps(-0.0f), zero = _mm256_setzero_ps();
  for (int64_t block = 0; block < a.blocks; ++block) {
    const float* in = x + (row * a.blocks + block) * BLOCK;
    __m256 v[4], most = zero, strange = zero;
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(in + 8 * i);
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v[i]));
      strange = _mm256_or_ps(strange, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
    }
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    const float largest = _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
    const __m256 to_levels = _mm256_set1_ps(largest > 1e-30f ? LEVELS / largest : 0.0f);
    __m256i q[4];
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], to_levels));
    const int64_t at = row * a.blocks + block, blocks = a.rows * a.blocks;
    int8_t* out = a.quantised.data() + at * BLOCK;
    int32_t sum = 0;
    if constexpr (FINE) {
      __m256i lower[4];
      lower_bits(q, lower);
      sum = total(lower);
      a.levels[blocks + at] = sum;
      store_bytes(lower, out + 2 * blocks * BLOCK);
      a.levels[at] = total(q);
      sum += 128 * a.levels[at];
      lower_bits(q, lower);
      store_bytes(lower, out + blocks * BLOCK);
    } else {
      sum = a.levels[at] = total(q);
    }
    store_bytes(q, out);
    a.scales[at] = _mm256_movemask_ps(strange) ? NAN : largest / LEVELS;
    a.sums[at] = a.scales[at] * sum;
  }
}

struct Work;
using Groups = void (*)(const Work& work, int64_t begin, int64_t end);  // products of groups `begin` to `end`

struct Work {
  const Weights* weights[2];
  const float* x;
  float* y;
  Activations a;
  Groups groups;
};

// Instructions, the best first. GCC before 11 does not know VNNI without AVX-512, Clang before 18 cannot ask for it.
namespace avx512_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#define VNNI 1
#define WIDE 1
#define DOT _mm256_dpbusd_epi32
#define MOST_ROWS 8
#include "products.h"
}  // namespace avx512_vnni

#if (defined(__clang_major__) && __clang_major__ >= 18) || (!defined(__clang_major__) && __GNUC__ >= 11)
#define HAS_AVX_VNNI 1
namespace avx_vnni {
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define VNNI 1
#define WIDE 0
#define DOT _mm256_dpbusd_avx_epi32
#define MOST_ROWS 4
#include "products.h"
}  // namespace avx_vnni
#endif

namespace avx2 {
#define TARGET AVX2
#define VNNI 0
#define WIDE 0
#define DOT
#define MOST_ROWS 4
#include "products.h"
}  // namespace avx2

struct Instructions {
  const char* name;
  bool supported;
  Groups of_4_bits[2], of_8_bits[2];  // with coarse activations, and with fine ones
};

// The best of the processor's, or those that the environment's CONVLLAVA_KERNELS names.
const Instructions& instructions() {
  static const Instructions all[] = {
      {"avx512_vnni", __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"),
       {avx512_vnni::some_groups<4, false>, avx512_vnni::some_groups<4, true>},
       {avx512_vnni::some_groups<8, false>, avx512_vnni::some_groups<8, true>}},
#ifdef HAS_AVX_VNNI
      {"avx_vnni", __builtin_cpu_supports("avxvnni") != 0,
       {avx_vnni::some_groups<4, false>, avx_vnni::some_groups<4, true>},
       {avx_vnni::some_groups<8, false>, avx_vnni::some_groups<8, true>}},
#endif
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),  // all that have these have F16C
       {avx2::some_groups<4, false>, avx2::some_groups<4, true>},
       {avx2::some_groups<8, false>, avx2::some_groups<8, true>}},
  };
  const char* wanted = std::getenv("CONVLLAVA_KERNELS");
  for (const Instructions& one : all)
    if (one.supported && (!wanted || !*wanted || std::string(wanted) == one.name)) return one;
  throw wanted && *wanted ? "CONVLLAVA_KERNELS: this processor, or this build, has no " + std::string(wanted)
                          : std::string("the processor lacks AVX2 or FMA");
}

void task(void* data, size_t index) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t begin = index * TASK, end = std::min<int64_t>(begin + TASK, work.weights[0]->groups);
  work.groups(work, begin, end);
}

template <bool FINE>
void quantise_row(void* data, size_t row) {
  Work& work = *static_cast<Work*>(data);
  quantise<FINE>(work.x, work.a, row);
}

class Failed {
 public:
  explicit Failed(ort::Status* status) : status(status) {}
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failed(status);
}

std::vector<int64_t> dims(const ort::Api& api, const ort::Value* value) {
  ort::Shape* shape = nullptr;
  check(api.shape(value, &shape));
  size_t rank = 0;
  ort::Status* status = api.rank(shape, &rank);
  std::vector<int64_t> found(rank);
  if (!status) status = api.dims(shape, found.data(), rank);
  api.release(shape);
  check(status);
  return found;
}

template <typename T>
const T* constant(const ort::Api& api, const ort::Info* info, size_t index, std::vector<int64_t>& shape) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(api.constant(info, index, &is_constant, &value));
  if (!is_constant || !value) return nullptr;
  shape = dims(api, value);
  void* data = nullptr;
  check(api.data(value, &data));
  return static_cast<const T*>(data);
}

int64_t elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t side : shape) count *= side;
  return count;
}

struct Kernel {
  ort::Api api;
  std::vector<Weights> weights;
  Groups groups;
  bool fine;

  Kernel(const ort::Api& api, const ort::Info* info, int matrices, bool fine) : api(api), fine(fine) {
    int64_t columns = 0, bits = 0;
    check(api.integer(info, "K", &columns));
    check(api.integer(info, "bits", &bits));
    if ((bits != 4 && bits != 8) || columns <= 0 || columns % BLOCK)
      throw std::string("expected 4 or 8 bits, and K in blocks of 32");
    const Instructions& chosen = instructions();
    groups = (bits == 4 ? chosen.of_4_bits : chosen.of_8_bits)[fine];
    for (int matrix = 0; matrix < matrices; ++matrix) {
      std::vector<int64_t> shape, scales_shape, zeros_shape;
      const auto* quantised = constant<uint8_t>(api, info, 3 * matrix + 1, shape);
      const auto* scales = constant<float>(api, info, 3 * matrix + 2, scales_shape);
      const auto* zeros = constant<uint8_t>(api, info, 3 * matrix + 3, zeros_shape);
      if (!quantised || !scales || shape.size() != 3 || shape[2] != BLOCK * bits / 8)
        throw std::string("expected constant weights [N, blocks, bytes of 32 weights] and constant scales");
      Weights w;
      w.rows = shape[0], w.columns = columns, w.bits = static_cast<int>(bits), w.fine = fine;
      w.blocks = columns / BLOCK, w.groups = (w.rows + GROUP - 1) / GROUP;
      const Stored stored{quantised, scales, zeros, shape[1], w.bits};
      const int64_t with_means = (columns + w.blocks + BLOCK - 1) / BLOCK;
      if (stored.blocks != w.blocks && stored.blocks != with_means)
        throw std::string("expected as many blocks as K has, or as K and the means of its blocks");
      if (elements(scales_shape) != w.rows * stored.blocks) throw std::string("expected a scale for each block");
      const int64_t zero_bytes = w.bits == 8 ? stored.blocks : (stored.blocks + 1) / 2;
      if (zeros && elements(zeros_shape) != w.rows * zero_bytes)
        throw std::string("expected a zero point for each block");
      pack(w, stored);
      weights.push_back(std::move(w));
    }
    if (matrices == 2 && weights[0].rows != weights[1].rows) throw std::string("expected two matrices of one size");
  }

  void compute(ort::Context* context) const {
    const ort::Value* input = nullptr;
    check(api.input(context, 0, &input));
    std::vector<int64_t> shape = dims(api, input);
    const Weights& w = weights[0];
    if (shape.empty() || shape.back() != w.columns) throw std::string("expected x with K columns");
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
    shape.back() = w.rows;
    ort::Value* output = nullptr;
    check(api.output(context, 0, shape.data(), shape.size(), &output));
    void *x = nullptr, *y = nullptr;
    check(api.data(input, &x));
    check(api.data(output, &y));
    const size_t blocks = rows * w.blocks;
    Work work{
        {&w, weights.size() == 2 ? &weights[1] : nullptr},
        static_cast<const float*>(x),
        static_cast<float*>(y),
        {rows, w.blocks, std::vector<int8_t>(blocks * BLOCK * (fine ? 3 : 1)), std::vector<float>(blocks), std::vector<float>(blocks),
         std::vector<int32_t>(blocks * (fine ? 2 : 1))},
        groups};
    const auto rounding = fine ? quantise_row<true> : quantise_row<false>;
    if (rows < ROWS_ALONE) {
      for (int64_t row = 0; row < rows; ++row) rounding(&work, row);
    } else {
      check(api.parallel(context, rounding, rows, &work));
    }
    check(api.parallel(context, task, (w.groups + TASK - 1) / TASK, &work));
  }
};

template <typename Call>
ort::Status* guarded(const ort::Api& api, const Call& call) {
  try {
    call();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::string& message) {
    return api.fail(ort::INVALID_ARGUMENT, message.c_str());
  } catch (const std::exception& error) {
    return api.fail(ort::FAIL, error.what());
  }
}

template <int MATRICES, bool FINE>
ort::Status* create(const ort::CustomOp*, const void* const* table, const ort::Info* info, void** kernel) {
  const ort::Api api(table);
  return guarded(api, [&] { *kernel = new Kernel(api, info, MATRICES, FINE); });
}

ort::Status* compute(void* data, ort::Context* context) {
  const auto* kernel = static_cast<const Kernel*>(data);
  return guarded(kernel->api, [&] { kernel->compute(context); });
}

// x, then quantised weights, scales and zero points of each matrix
bool is_zeros(size_t index) { return index && index % 3 == 0; }
ort::ElementType input_type(const ort::CustomOp*, size_t index) {
  return index % 3 == 1 || is_zeros(index) ? ort::UINT8 : ort::FLOAT;
}
ort::Characteristic input_characteristic(const ort::CustomOp*, size_t index) {
  return is_zeros(index) ? ort::OPTIONAL : ort::REQUIRED;
}

template <int MATRICES, bool FINE>
ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::VERSION;
  op.name = [](const ort::CustomOp*) { return MATRICES == 1 ? "BlockMatMul" : "GatedBlockMatMul"; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_type = input_type;
  op.inputs = [](const ort::CustomOp*) -> size_t { return 1 + 3 * MATRICES; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
  op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = input_characteristic;
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.create_v2 = create<MATRICES, FINE>;
  op.compute_v2 = compute;
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 2147483647; };
  return op;
}

const ort::CustomOp OPERATORS[2][2] = {{describe<1, false>(), describe<2, false>()},
                                        {describe<1, true>(), describe<2, true>()}};

// Whether activations are to be fine. Throws for what is neither 8 nor 16
bool wants_fine(const ort::Api& api, const ort::Options* options) {
  constexpr const char* KEY = "convllava.activation_bits";
  int there = 0;
  check(api.has_entry(options, KEY, &there));
  if (!there) return false;
  char bits[32] = "";
  size_t size = sizeof bits;
  check(api.entry(options, KEY, bits, &size));
  if (std::strcmp(bits, "8") && std::strcmp(bits, "24"))
    throw std::string(KEY) + ": " + bits + ", expected 8 or 24";
  return !std::strcmp(bits, "24");
}

// The operators in a domain of ONNX Runtime's, one for all sessions, which have to be outlived by it
ort::Domain* domain(const ort::Api& api, bool fine) {
  static std::mutex once;
  static ort::Domain* registered[2] = {};
  const std::lock_guard<std::mutex> guard(once);
  if (!registered[fine]) {
    ort::Domain* created = nullptr;
    check(api.create_domain("convllava", &created));
    for (const ort::CustomOp& op : OPERATORS[fine]) check(api.add_to_domain(created, &op));
    registered[fine] = created;
  }
  return registered[fine];
}

}  // namespace

// Called by SessionOptions.register_custom_ops_library
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options,
                                                                                 const ort::ApiBase* base) {
  const ort::Api api(base->get(ort::VERSION));
  return guarded(api, [&] { check(api.add_domain(options, domain(api, wants_fine(api, options)))); });
}
#endif
