// An encoder's layers (encoder.h) as operators of ONNX Runtime, in the domain `convllava`:
//
//   ConvNextStem        x [batch, 3, height, width], weights, norm
//   ConvNextBlock       x [batch, height, width, channels], depthwise, norm, fc1's codes and parameters, fc2's
//   ConvNextDownsample  x [batch, height, width, channels], norm, codes, parameters
//   Int8Linear          x [..., columns], codes, parameters
//
// All inputs but x are constants in the order of encoder.h, read where ONNX Runtime has them. y is float, channels
// last. Attributes: epsilon of the norm; of Int8Linear gelu, 1 where it follows.

#include "encoder_op.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <new>

#include "encoder.h"
#include "kernel_error.h"

namespace convllava {
namespace {

Buffer& thread_buffer() {
  thread_local Buffer buffer;
  return buffer;
}

template <typename Call>
struct TileTask {
  const Call& call;
  Tile<Call> tile;
  int64_t rows, size;
  std::atomic<bool> out_of_memory{false};

  static void run(void* data, size_t index) {
    TileTask& task = *static_cast<TileTask*>(data);
    const int64_t begin = index * task.size;
    try {
      task.tile(task.call, begin, std::min(begin + task.size, task.rows), thread_buffer());
    } catch (const std::bad_alloc&) {  // which ONNX Runtime's threads do not catch
      task.out_of_memory = true;
    }
  }
};

class Operator {
 public:
  Operator(const ort::Api& api) : api_(api), kernels_(encoder_kernels(chosen_kernels())) {}

  const ort::Api& api() const { return api_; }

 protected:
  struct Input {
    const float* data;
    std::vector<int64_t> shape;
  };

  Input input(ort::Context* context, size_t rank) const {
    const ort::Value* value = nullptr;
    check(api_, api_.input(context, 0, &value));
    void* data = nullptr;
    check(api_, api_.data(value, &data));
    Input found{static_cast<const float*>(data), dims(api_, value)};
    if (rank && found.shape.size() != rank) throw KernelError("expected x of four axes");
    return found;
  }

  // Computes y of `shape`, whose last axis are its channels. columns: of the widest activations.
  template <typename Call>
  void run(ort::Context* context, Call call, Tile<Call> tile, const std::vector<int64_t>& shape,
           int64_t columns) const {
    ort::Value* output = nullptr;
    check(api_, api_.output(context, 0, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(api_, api_.data(output, &y));
    call.y = static_cast<float*>(y);
    int64_t rows = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
    TileTask<Call> task{call, tile, rows, tile_rows(rows, columns)};
    check(api_, api_.parallel_for(context, TileTask<Call>::run, (rows + task.size - 1) / task.size, &task));
    if (task.out_of_memory) throw std::bad_alloc();
  }

  ort::Api api_;
  const EncoderKernels& kernels_;
};

float epsilon(const ort::Api& api, const ort::Info* info) {
  float found = 0;
  check(api, api.floating(info, "epsilon", &found));
  return found;
}

Int8Matrix input_matrix(const ort::Api& api, const ort::Info* info, size_t first) {
  return int8_matrix(constant<int8_t>(api, info, first), constant<float>(api, info, first + 1));
}

class Stem : public Operator {
 public:
  static constexpr const char* NAME = "ConvNextStem";
  static constexpr ort::ElementType INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT};

  Stem(const ort::Api& api, const ort::Info* info) : Operator(api) {
    const Tensor<float> weights = constant<float>(api, info, 1);
    call_.weights = vertical(weights, STEM_ROWS);
    call_.channels = weights.shape[0] * LANES;
    call_.norm = layer_norm(constant<float>(api, info, 2), epsilon(api, info), call_.channels);
  }
  void compute(ort::Context* context) const {
    const Input x = input(context, 4);
    StemCall call = call_;
    call.x = x.data;
    call.height = x.shape[2];
    call.width = x.shape[3];
    if (x.shape[1] != COLORS) throw KernelError("expected x of three colors");
    run(context, call, kernels_.stem, {x.shape[0], call.height / PATCH, call.width / PATCH, call.channels},
        call.channels);
  }

 private:
  StemCall call_{};
};

class Block : public Operator {
 public:
  static constexpr const char* NAME = "ConvNextBlock";
  static constexpr ort::ElementType INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::FLOAT, ort::INT8,
                                                ort::FLOAT, ort::INT8,  ort::FLOAT};

  Block(const ort::Api& api, const ort::Info* info) : Operator(api) {
    const Tensor<float> depthwise = constant<float>(api, info, 1);
    call_.depthwise = vertical(depthwise, DEPTHWISE_ROWS);
    call_.channels = depthwise.shape[0] * LANES;
    call_.norm = layer_norm(constant<float>(api, info, 2), epsilon(api, info), call_.channels);
    call_.fc1 = input_matrix(api, info, 3);
    call_.fc2 = input_matrix(api, info, 5);
    if (call_.fc1.columns != call_.channels || call_.fc2.rows != call_.channels || call_.fc1.rows != call_.fc2.columns)
      throw KernelError("expected two matrices between the block's channels");
  }
  void compute(ort::Context* context) const {
    const Input x = input(context, 4);
    BlockCall call = call_;
    call.x = x.data;
    call.height = x.shape[1];
    call.width = x.shape[2];
    if (x.shape[3] != call.channels) throw KernelError("expected x with the block's channels");
    run(context, call, kernels_.block, x.shape, std::max(call.channels, call.fc1.rows));
  }

 private:
  BlockCall call_{};
};

class Downsample : public Operator {
 public:
  static constexpr const char* NAME = "ConvNextDownsample";
  static constexpr ort::ElementType INPUTS[] = {ort::FLOAT, ort::FLOAT, ort::INT8, ort::FLOAT};

  Downsample(const ort::Api& api, const ort::Info* info) : Operator(api) {
    call_.matrix = input_matrix(api, info, 2);
    call_.channels = call_.matrix.columns / 4;
    if (call_.channels % LANES) throw KernelError("expected a multiple of 16 channels");
    call_.norm = layer_norm(constant<float>(api, info, 1), epsilon(api, info), call_.channels);
  }
  void compute(ort::Context* context) const {
    const Input x = input(context, 4);
    DownsampleCall call = call_;
    call.x = x.data;
    call.height = x.shape[1];
    call.width = x.shape[2];
    if (x.shape[3] != call.channels) throw KernelError("expected x with a quarter of the matrix's columns");
    run(context, call, kernels_.downsample, {x.shape[0], call.height / 2, call.width / 2, call.matrix.rows},
        call.matrix.columns);
  }

 private:
  DownsampleCall call_{};
};

class Linear : public Operator {
 public:
  static constexpr const char* NAME = "Int8Linear";
  static constexpr ort::ElementType INPUTS[] = {ort::FLOAT, ort::INT8, ort::FLOAT};

  Linear(const ort::Api& api, const ort::Info* info) : Operator(api) {
    int64_t gelu = 0;
    check(api, api.integer(info, "gelu", &gelu));
    call_.has_gelu = gelu != 0;
    call_.matrix = input_matrix(api, info, 1);
  }
  void compute(ort::Context* context) const {
    const Input x = input(context, 0);
    LinearCall call = call_;
    call.x = x.data;
    std::vector<int64_t> shape = x.shape;
    if (shape.empty() || shape.back() != call.matrix.columns) throw KernelError("expected x with the matrix's columns");
    shape.back() = call.matrix.rows;
    run(context, call, kernels_.linear, shape, call.matrix.columns);
  }

 private:
  LinearCall call_{};
};

template <typename Kernel>
ort::CustomOp describe() {
  ort::CustomOp op = describe_operator<Kernel>();
  op.name = [](const ort::CustomOp*) { return Kernel::NAME; };
  op.inputs = [](const ort::CustomOp*) -> size_t { return std::size(Kernel::INPUTS); };
  op.input_type = [](const ort::CustomOp*, size_t index) { return Kernel::INPUTS[index]; };
  op.create_v2 = [](const ort::CustomOp*, const void* const* table, const ort::Info* info, void** kernel) {
    const ort::Api api(table);
    return guarded(api, [&] { *kernel = new Kernel(api, info); });
  };
  return op;
}

}  // namespace

const ort::CustomOp ENCODER_OPERATORS[4] = {describe<Stem>(), describe<Block>(), describe<Downsample>(),
                                            describe<Linear>()};

}  // namespace convllava
