// CachedAttention: a Llama's attention over a KV cache in int8 (attention.h), as an operator of ONNX Runtime.
//
// Inputs: queries, keys and values of the new positions in one, float [B, S, (heads + 2 * kv_heads) * head_dim]; past
// keys and past values int8 [B, kv_heads, P, head_dim + 4]; the last new position of each sequence int32 [B]; cosines
// and sines float [positions, head_dim / 2]. Outputs: float [B, S, heads * head_dim], and keys and values as the past
// ones with as many positions as they need, P at least: where these are the past ones' memory, they are written in
// place. Attributes: num_heads, kv_num_heads.
//
// The inputs are those of GroupQueryAttention with rotary embeddings, and so is what it computes, but for the rounding
// of keys and values. What a query gets is the same whatever is computed with it.

#include <algorithm>

#include "attention.h"
#include "ort_operator.h"

namespace convllava {
namespace {

constexpr int64_t MIN_TASKS = 64;          // fewer are split by chunks of positions
constexpr int64_t MIN_PARALLEL_ROWS = 64;  // fewer new keys one thread writes sooner than two

class AttentionKernel {
 public:
  AttentionKernel(const ort::Api& api, const ort::Info* info)
      : api_(api), attend_chunk_(attend_chunk_of(chosen_kernels())) {
    check(api, api.integer(info, "num_heads", &heads_));
    check(api, api.integer(info, "kv_num_heads", &kv_heads_));
    if (heads_ < 1 || kv_heads_ < 1 || heads_ % kv_heads_) throw KernelError("expected num_heads in whole groups");
  }

  const ort::Api& api() const { return api_; }

  void compute(ort::Context* context) const {
    AttentionCall call = read_inputs(context);
    const std::vector<int64_t> y{call.batch, call.sequence, call.heads * call.head_dim};
    const std::vector<int64_t> cache{call.batch, call.kv_heads, call.positions, call.row_bytes()};
    call.y = output<float>(context, 0, y);
    call.keys = output<int8_t>(context, 1, cache);
    call.values = output<int8_t>(context, 2, cache);
    if (!call.batch || !call.sequence) return;

    thread_local Buffer buffer;
    if (call.tiles() == 1 && call.chunks() > 1 && call.pairs() < MIN_TASKS)
      call.partials = reinterpret_cast<float*>(buffer.reserve(call.partial_floats() * sizeof(float)));
    Task task{call, attend_chunk_};
    if (call.pairs() * call.sequence < MIN_PARALLEL_ROWS) {
      for (int64_t pair = 0; pair < call.pairs(); ++pair) Task::append(&task, pair);
    } else {
      check(api_, api_.parallel_for(context, Task::append, call.pairs(), &task));
    }
    check(api_, api_.parallel_for(context, Task::attend, call.tasks(), &task));
    for (int64_t pair = 0; call.partials && pair < call.pairs(); ++pair) merge_partials(call, pair);
  }

 private:
  struct Task {
    const AttentionCall& call;
    AttendChunk attend_chunk;

    static void append(void* data, size_t pair) { convllava::append(static_cast<Task*>(data)->call, pair); }
    static void attend(void* data, size_t index) {
      const Task& task = *static_cast<Task*>(data);
      convllava::attend(task.call, task.attend_chunk, index);
    }
  };

  template <typename T>
  Tensor<T> input(ort::Context* context, size_t index) const {
    const ort::Value* value = nullptr;
    check(api_, api_.input(context, index, &value));
    void* memory = nullptr;
    check(api_, api_.data(value, &memory));
    return {static_cast<const T*>(memory), dims(api_, value)};
  }

  template <typename T>
  T* output(ort::Context* context, size_t index, const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(api_, api_.output(context, index, shape.data(), shape.size(), &value));
    void* memory = nullptr;
    check(api_, api_.data(value, &memory));
    return static_cast<T*>(memory);
  }

  // A call without its outputs. Throws KernelError where inputs do not fit together.
  AttentionCall read_inputs(ort::Context* context) const {
    using Dims = std::vector<int64_t>;
    const auto qkv = input<float>(context, 0);
    const auto keys = input<int8_t>(context, 1), values = input<int8_t>(context, 2);
    const auto last = input<int32_t>(context, 3);
    const auto cosines = input<float>(context, 4), sines = input<float>(context, 5);
    const int64_t all_heads = heads_ + 2 * kv_heads_;
    if (qkv.shape.size() != 3 || qkv.shape[2] % all_heads) throw KernelError("expected x [B, S, heads * head_dim]");
    const int64_t batch = qkv.shape[0], sequence = qkv.shape[1], head_dim = qkv.shape[2] / all_heads;
    if (head_dim < LANES || head_dim > MAX_HEAD_DIM || head_dim % LANES)
      throw KernelError("expected heads of a multiple of 16 elements, 256 at most");
    if (keys.shape.size() != 4 || keys.shape != values.shape ||
        keys.shape != Dims{batch, kv_heads_, keys.shape[2], head_dim + SCALE_BYTES})
      throw KernelError("expected past keys and values [B, kv_heads, P, head_dim + 4]");
    if (last.shape != Dims{batch}) throw KernelError("expected a last position of each sequence");
    if (cosines.shape.size() != 2 || cosines.shape[1] != head_dim / 2 || cosines.shape != sines.shape)
      throw KernelError("expected cosines and sines [positions, head_dim / 2]");
    int64_t longest = 0;
    for (int64_t i = 0; i < batch; ++i) {
      const int64_t length = int64_t{last.data[i]} + 1;
      if (length < sequence || length - sequence > keys.shape[2] || length > cosines.shape[0])
        throw KernelError("a last position is behind the cache or the rotary tables, or before the new ones");
      longest = std::max(longest, length);
    }
    return {batch,       sequence,     heads_,     kv_heads_,     head_dim,
            qkv.data,    cosines.data, sines.data, last.data,     keys.data,
            values.data, nullptr,      nullptr,    keys.shape[2], std::max(longest, keys.shape[2]),
            longest,     nullptr,      nullptr};
  }

  ort::Api api_;
  AttendChunk attend_chunk_;
  int64_t heads_ = 0, kv_heads_ = 0;
};

ort::CustomOp describe() {
  ort::CustomOp op = describe_operator<AttentionKernel>();
  op.name = [](const ort::CustomOp*) { return "CachedAttention"; };
  op.input_type = [](const ort::CustomOp*, size_t index) {
    return index == 1 || index == 2 ? ort::INT8 : index == 3 ? ort::INT32 : ort::FLOAT;
  };
  op.inputs = [](const ort::CustomOp*) -> size_t { return 6; };
  op.output_type = [](const ort::CustomOp*, size_t index) { return index ? ort::INT8 : ort::FLOAT; };
  op.outputs = [](const ort::CustomOp*) -> size_t { return 3; };
  op.create_v2 = [](const ort::CustomOp*, const void* const* table, const ort::Info* info, void** kernel) {
    const ort::Api api(table);
    return guarded(api, [&] { *kernel = new AttentionKernel(api, info); });
  };
  return op;
}

}  // namespace

const ort::CustomOp& attention_operator() {
  static const ort::CustomOp op = describe();
  return op;
}

}  // namespace convllava
