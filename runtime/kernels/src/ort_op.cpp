// The kernels as operators of ONNX Runtime, in the domain `convllava`:
//
//   BlockMatMul       y = x W^T
//   GatedBlockMatMul  y = silu(x G^T) * (x U^T), the first half of a Llama's MLP
//   CachedAttention   see attention_op.cpp
//
// Inputs of matmuls: x float [..., K], then for each matrix the constants codes uint8 [N, blocks, bytes], as
// MatMulNBits has them, scales uint8 [groups of rows, blocks, bytes] and units float [16 * groups] (weight_format.h).
// Attributes: K, a multiple of 32, and bits, 4 or 8. They are read where ONNX Runtime has them, which for those in a
// file beside the graph is the mapped file: nothing is copied.
//
// Activations are rounded to 8 bits in each block, as MatMulNBits does at accuracy level 4. The session's entry
// convllava.activation_bits=24 makes it 24: results are then as near to float32 matmuls of the same weights as those
// are to each other in another order. A row of y is the same whatever rows it is computed with. A row of x with a NaN
// gives NaN.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "encoder_op.h"
#include "gemm.h"
#include "kernel_error.h"
#include "ort_operator.h"

namespace convllava {
namespace {

constexpr int64_t GROUPS_PER_TILE = 2;  // of weights that a task transposes for many rows of x
constexpr int64_t FEW_ROWS = 8;  // of x: weights are read once, and tasks with more of them read memory in longer runs
constexpr int64_t TASKS_OF_FEW_ROWS = 32, MAX_GROUPS_OF_FEW_ROWS = 32;
constexpr int64_t MIN_PARALLEL_ROWS = 4;  // fewer rows of x one thread quantizes sooner than two

Weights input_weights(const ort::Api& api, const ort::Info* info, int matrix) {
  int64_t columns = 0, bits = 0;
  check(api, api.integer(info, "K", &columns));
  check(api, api.integer(info, "bits", &bits));
  const size_t first = 1 + 3 * matrix;
  return weights(constant<uint8_t>(api, info, first), constant<uint8_t>(api, info, first + 1),
                 constant<float>(api, info, first + 2), columns, bits);
}

struct Task {
  const GemmCall& call;
  const float* x;
  QuantizeRow quantize_row;
  GemmGroups gemm_groups;
  int64_t groups;  // a task
  std::atomic<bool> out_of_memory{false};

  int64_t count() const { return (call.weights[0]->groups() + groups - 1) / groups; }

  static void quantize(void* data, size_t row) {
    const Task& task = *static_cast<const Task*>(data);
    task.quantize_row(task.x, task.call.a, row);
  }
  static void gemm(void* data, size_t index) {
    Task& task = *static_cast<Task*>(data);
    const int64_t begin = index * task.groups;
    thread_local Buffer buffer;
    try {
      task.gemm_groups(task.call, begin, std::min(begin + task.groups, task.call.weights[0]->groups()), buffer);
    } catch (const std::bad_alloc&) {  // which ONNX Runtime's threads do not catch
      task.out_of_memory = true;
    }
  }
};

int64_t groups_per_task(int64_t groups, int64_t rows) {
  if (rows > FEW_ROWS) return GROUPS_PER_TILE;
  return std::clamp(groups / TASKS_OF_FEW_ROWS, GROUPS_PER_TILE, MAX_GROUPS_OF_FEW_ROWS);
}

class Kernel {
 public:
  Kernel(const ort::Api& api, const ort::Info* info, int matrices, int activation_bits)
      : api_(api), kernels_(chosen_kernels()), activation_bits_(activation_bits) {
    for (int matrix = 0; matrix < matrices; ++matrix) weights_.push_back(input_weights(api, info, matrix));
    const Weights &first = weights_[0], &last = weights_.back();
    if (first.rows != last.rows || first.format != last.format)
      throw KernelError("expected two matrices of one size and format");
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::Context* context) const {
    const Weights& w = weights_[0];
    const ort::Value* input = nullptr;
    check(api_, api_.input(context, 0, &input));
    std::vector<int64_t> shape = dims(api_, input);
    if (shape.empty() || shape.back() != w.blocks * BLOCK) throw KernelError("expected x with K columns");
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
    shape.back() = w.rows;
    ort::Value* output = nullptr;
    check(api_, api_.output(context, 0, shape.data(), shape.size(), &output));
    void *x = nullptr, *y = nullptr;
    check(api_, api_.data(input, &x));
    check(api_, api_.data(output, &y));

    thread_local Buffer buffer;
    const GemmCall call{{&w, weights_.size() == 2 ? &weights_[1] : nullptr},
                        reserve(buffer, rows, w.blocks, kernels_.tile, w.format, activation_bits_),
                        static_cast<float*>(y)};
    Task task{call, static_cast<const float*>(x), kernels_.quantize_row(activation_bits_),
              kernels_.gemm_groups(w.format, activation_bits_), groups_per_task(w.groups(), rows)};
    if (rows < MIN_PARALLEL_ROWS) {
      for (int64_t row = 0; row < rows; ++row) Task::quantize(&task, row);
    } else {
      check(api_, api_.parallel_for(context, Task::quantize, rows, &task));
    }
    check(api_, api_.parallel_for(context, Task::gemm, task.count(), &task));
    if (task.out_of_memory) throw std::bad_alloc();
  }

 private:
  ort::Api api_;
  const KernelSet& kernels_;
  int activation_bits_;
  std::vector<Weights> weights_;
};

template <int MATRICES, int ACTIVATION_BITS>
ort::Status* create(const ort::CustomOp*, const void* const* table, const ort::Info* info, void** kernel) {
  const ort::Api api(table);
  return guarded(api, [&] { *kernel = new Kernel(api, info, MATRICES, ACTIVATION_BITS); });
}

template <int MATRICES, int ACTIVATION_BITS>
ort::CustomOp describe() {
  ort::CustomOp op = describe_operator<Kernel>();
  op.name = [](const ort::CustomOp*) { return MATRICES == 1 ? "BlockMatMul" : "GatedBlockMatMul"; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index % 3 == 0 ? ort::FLOAT : ort::UINT8;  // x and units
  };
  op.inputs = [](const ort::CustomOp*) -> size_t { return 1 + 3 * MATRICES; };
  op.create_v2 = create<MATRICES, ACTIVATION_BITS>;
  return op;
}

const ort::CustomOp OPERATORS[2][2] = {{describe<1, 8>(), describe<2, 8>()}, {describe<1, 24>(), describe<2, 24>()}};

// Whether the session wants activations of 24 bits, not 8.
bool wants_24_bits(const ort::Api& api, const ort::Options* options) {
  constexpr const char* KEY = "convllava.activation_bits";
  int there = 0;
  check(api, api.has_entry(options, KEY, &there));
  if (!there) return false;
  char bits[32] = "";
  size_t size = sizeof bits;
  check(api, api.entry(options, KEY, bits, &size));
  if (std::strcmp(bits, "8") && std::strcmp(bits, "24"))
    throw KernelError(std::string(KEY) + ": " + bits + ", expected 8 or 24");
  return !std::strcmp(bits, "24");
}

// The domain of the operators, one for all sessions: ONNX Runtime wants it to outlive them.
ort::Domain* domain(const ort::Api& api, bool of_24_bits) {
  static std::mutex once;
  static ort::Domain* registered[2] = {};
  const std::lock_guard<std::mutex> guard(once);
  if (!registered[of_24_bits]) {
    ort::Domain* created = nullptr;
    check(api, api.create_domain("convllava", &created));
    for (const ort::CustomOp& op : OPERATORS[of_24_bits]) check(api, api.add_to_domain(created, &op));
    for (const ort::CustomOp& op : ENCODER_OPERATORS) check(api, api.add_to_domain(created, &op));
    check(api, api.add_to_domain(created, &attention_operator()));
    registered[of_24_bits] = created;
  }
  return registered[of_24_bits];
}

}  // namespace
}  // namespace convllava

// Called by SessionOptions.register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options,
                                                                                 const ort::ApiBase* base) {
  using namespace convllava;
  const void* const* table = base->get(ort::VERSION);
  if (!table) {  // CreateStatus is in any table
    const std::string message = std::string("the kernels need ONNX Runtime 1.") + std::to_string(ort::VERSION) +
                                " or later, this is " + base->version();
    return ort::Api(base->get(1)).create_status(ort::FAIL, message.c_str());
  }
  const ort::Api api(table);
  return guarded(api, [&] { check(api, api.add_domain(options, domain(api, wants_24_bits(api, options)))); });
}
