// The kernels as operators of ONNX Runtime, in the domain `convllava`:
//
//   BlockMatMul       y = x W^T
//   GatedBlockMatMul  y = silu(x G^T) * (x U^T), the first half of a Llama's MLP
//
// Inputs: x float [..., K], then for each matrix what MatMulNBits has: codes uint8 [N, blocks, bytes], scales float
// [N, blocks], zero points uint8 [N, bytes] or none. Attributes: K, a multiple of 32, and bits, 4 or 8.
//
// Activations are rounded to 8 bits in each block, as MatMulNBits does at accuracy level 4. The session's entry
// convllava.activation_bits=24 makes it 24, and keeps scales and offsets of weights in float32: results are then as
// near to float32 matmuls as those are to each other in another order. A row of y is the same whatever rows it is
// computed with. A row of x with a NaN gives NaN.

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "gemm.h"
#include "kernel_error.h"
#include "ort_abi.h"

namespace convllava {
namespace {

constexpr int64_t GROUPS_PER_TASK = 4;
constexpr int64_t MIN_PARALLEL_ROWS = 4;  // fewer rows of x one thread quantizes sooner than two

void check(const ort::Api& api, ort::Status* status) {
  if (!status) return;
  const std::string message = api.message(status);
  api.release(status);
  throw std::runtime_error(message);
}

std::vector<int64_t> dims(const ort::Api& api, const ort::Value* value) {
  ort::Shape* shape = nullptr;
  check(api, api.shape(value, &shape));
  size_t rank = 0;
  ort::Status* status = api.rank(shape, &rank);
  std::vector<int64_t> found(rank);
  if (!status) status = api.dims(shape, found.data(), rank);
  api.release(shape);
  check(api, status);
  return found;
}

// An input that does not change; without data where there is none.
template <typename T>
Tensor<T> constant(const ort::Api& api, const ort::Info* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(api, api.constant(info, index, &is_constant, &value));
  if (!is_constant || !value) return {};
  void* memory = nullptr;
  check(api, api.data(value, &memory));
  return {static_cast<const T*>(memory), dims(api, value)};
}

size_t first_input(size_t matrix) { return 1 + 3 * matrix; }

PackedMatrix pack_input(const ort::Api& api, const ort::Info* info, int matrix, int activation_bits) {
  int64_t columns = 0, bits = 0;
  check(api, api.integer(info, "K", &columns));
  check(api, api.integer(info, "bits", &bits));
  const size_t first = first_input(matrix);
  const auto codes = constant<uint8_t>(api, info, first), zeros = constant<uint8_t>(api, info, first + 2);
  return pack(stored_matrix(codes, constant<float>(api, info, first + 1), zeros, bits), columns, activation_bits);
}

struct Task {
  const GemmCall& call;
  const float* x;
  QuantizeRow quantize_row;
  GemmGroups gemm_groups;

  static void quantize(void* data, size_t row) {
    const Task& task = *static_cast<const Task*>(data);
    task.quantize_row(task.x, task.call.a, row);
  }
  static void gemm(void* data, size_t index) {
    const Task& task = *static_cast<const Task*>(data);
    const int64_t begin = index * GROUPS_PER_TASK;
    task.gemm_groups(task.call, begin, std::min(begin + GROUPS_PER_TASK, task.call.weights[0]->groups));
  }
};

class Kernel {
 public:
  Kernel(const ort::Api& api, const ort::Info* info, int matrices, int activation_bits)
      : api_(api), kernels_(chosen_kernels()) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      weights_.push_back(pack_input(api, info, matrix, activation_bits));
      has_zeros_.push_back(constant<uint8_t>(api, info, first_input(matrix) + 2).data != nullptr);
    }
    if (weights_[0].rows != weights_.back().rows) throw KernelError("expected two matrices of one size");
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::Context* context) const {
    const PackedMatrix& w = weights_[0];
    const ort::Value* input = nullptr;
    for (size_t matrix = 0; matrix < weights_.size(); ++matrix) {  // there was no telling whether one would come
      check(api_, api_.input(context, first_input(matrix) + 2, &input));
      if (input && !has_zeros_[matrix]) throw KernelError("expected constant zero points");
    }
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

    thread_local ActivationBuffer buffer;
    const GemmCall call{{&w, weights_.size() == 2 ? &weights_[1] : nullptr},
                        buffer.reserve(rows, w.blocks, w.activation_bits),
                        static_cast<float*>(y)};
    Task task{call, static_cast<const float*>(x), kernels_.quantize_row(w.activation_bits),
              kernels_.gemm_groups(w.bits, w.activation_bits)};
    if (rows < MIN_PARALLEL_ROWS) {
      for (int64_t row = 0; row < rows; ++row) Task::quantize(&task, row);
    } else {
      check(api_, api_.parallel_for(context, Task::quantize, rows, &task));
    }
    check(api_, api_.parallel_for(context, Task::gemm, (w.groups + GROUPS_PER_TASK - 1) / GROUPS_PER_TASK, &task));
  }

 private:
  ort::Api api_;
  const KernelSet& kernels_;
  std::vector<PackedMatrix> weights_;
  std::vector<bool> has_zeros_;
};

// Runs `call`; what it throws becomes a status of ONNX Runtime's.
template <typename Call>
ort::Status* guarded(const ort::Api& api, const Call& call) {
  try {
    call();
    return nullptr;
  } catch (const KernelError& error) {
    return api.create_status(ort::INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api.create_status(ort::FAIL, error.what());
  }
}

template <int MATRICES, int ACTIVATION_BITS>
ort::Status* create(const ort::CustomOp*, const void* const* table, const ort::Info* info, void** kernel) {
  const ort::Api api(table);
  return guarded(api, [&] { *kernel = new Kernel(api, info, MATRICES, ACTIVATION_BITS); });
}

ort::Status* compute(void* data, ort::Context* context) {
  const auto* kernel = static_cast<const Kernel*>(data);
  return guarded(kernel->api(), [&] { kernel->compute(context); });
}

bool is_zeros(size_t index) { return index && index % 3 == 0; }

template <int MATRICES, int ACTIVATION_BITS>
ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::VERSION;
  op.name = [](const ort::CustomOp*) { return MATRICES == 1 ? "BlockMatMul" : "GatedBlockMatMul"; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index % 3 == 1 || is_zeros(index) ? ort::UINT8 : ort::FLOAT;
  };
  op.inputs = [](const ort::CustomOp*) -> size_t { return 1 + 3 * MATRICES; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
  op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t index) {
    return is_zeros(index) ? ort::OPTIONAL : ort::REQUIRED;
  };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.create_v2 = create<MATRICES, ACTIVATION_BITS>;
  op.compute_v2 = compute;
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 2147483647; };
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
