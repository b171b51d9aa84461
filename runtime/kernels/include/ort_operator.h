// What the operators of ONNX Runtime share.
#pragma once

#include <string>
#include <vector>

#include "kernel_error.h"
#include "ort_abi.h"
#include "weight_format.h"

namespace convllava {

// Throws what a call returned, if it failed.
inline void check(const ort::Api& api, ort::Status* status) {
  if (!status) return;
  const std::string message = api.message(status);
  api.release(status);
  throw std::runtime_error(message);
}

inline std::vector<int64_t> dims(const ort::Api& api, const ort::Value* value) {
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

// An operator of one float output, without its name, its inputs and their types, and `create_v2`. `Kernel` has
// `api() const` and `compute(ort::Context*) const`.
template <typename Kernel>
ort::CustomOp describe_operator() {
  ort::CustomOp op{};
  op.version = ort::VERSION;
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
  op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.compute_v2 = [](void* data, ort::Context* context) {
    const auto* kernel = static_cast<const Kernel*>(data);
    return guarded(kernel->api(), [&] { kernel->compute(context); });
  };
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 2147483647; };
  return op;
}

const ort::CustomOp& attention_operator();  // attention_op.cpp

}  // namespace convllava
