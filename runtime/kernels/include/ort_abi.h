// The part of ONNX Runtime's C API that an operator needs, so that it builds without ONNX Runtime's headers, which its
// Python package does not carry.
//
// The API is a table of functions that releases append to and never reorder: a function's place in struct OrtApi of
// onnxruntime_c_api.h is as fixed as its signature. VERSION is the table, and the form of OrtCustomOp, that this file
// describes; ONNX Runtime hands out any table up to its own. tests/test_ort_abi.cpp checks the places.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 17;

struct Status;
struct Value;
struct Shape;    // OrtTensorTypeAndShapeInfo
struct Info;     // OrtKernelInfo
struct Context;  // OrtKernelContext
struct Domain;   // OrtCustomOpDomain
struct Options;  // OrtSessionOptions
struct CustomOp;

enum ElementType : int { UNDEFINED = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6 };
enum Characteristic : int { REQUIRED = 0 };
enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };

// Places in OrtApi, by its names.
enum class Slot : int {
  CreateStatus = 0,
  GetErrorMessage = 2,
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_float = 85,
  KernelInfoGetAttribute_int64 = 86,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseStatus = 93,
  ReleaseTensorTypeAndShapeInfo = 99,
  HasSessionConfigEntry = 237,
  GetSessionConfigEntry = 238,
  KernelInfoGetConstantInput_tensor = 249,
  KernelContext_ParallelFor = 274,
};

class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return at<Status*(ErrorCode, const char*)>(Slot::CreateStatus)(code, message);
  }
  const char* message(const Status* status) const {
    return at<const char*(const Status*)>(Slot::GetErrorMessage)(status);
  }
  void release(Status* status) const { at<void(Status*)>(Slot::ReleaseStatus)(status); }
  Status* create_domain(const char* name, Domain** out) const {
    return at<Status*(const char*, Domain**)>(Slot::CreateCustomOpDomain)(name, out);
  }
  Status* add_to_domain(Domain* domain, const CustomOp* op) const {
    return at<Status*(Domain*, const CustomOp*)>(Slot::CustomOpDomain_Add)(domain, op);
  }
  Status* add_domain(Options* options, Domain* domain) const {
    return at<Status*(Options*, Domain*)>(Slot::AddCustomOpDomain)(options, domain);
  }
  Status* data(const Value* value, void** out) const {
    return at<Status*(const Value*, void**)>(Slot::GetTensorMutableData)(value, out);
  }
  Status* rank(const Shape* shape, size_t* out) const {
    return at<Status*(const Shape*, size_t*)>(Slot::GetDimensionsCount)(shape, out);
  }
  Status* dims(const Shape* shape, int64_t* out, size_t count) const {
    return at<Status*(const Shape*, int64_t*, size_t)>(Slot::GetDimensions)(shape, out, count);
  }
  Status* shape(const Value* value, Shape** out) const {
    return at<Status*(const Value*, Shape**)>(Slot::GetTensorTypeAndShape)(value, out);
  }
  void release(Shape* shape) const { at<void(Shape*)>(Slot::ReleaseTensorTypeAndShapeInfo)(shape); }
  Status* floating(const Info* info, const char* name, float* out) const {
    return at<Status*(const Info*, const char*, float*)>(Slot::KernelInfoGetAttribute_float)(info, name, out);
  }
  Status* integer(const Info* info, const char* name, int64_t* out) const {
    return at<Status*(const Info*, const char*, int64_t*)>(Slot::KernelInfoGetAttribute_int64)(info, name, out);
  }
  Status* constant(const Info* info, size_t index, int* is_constant, const Value** out) const {
    return at<Status*(const Info*, size_t, int*, const Value**)>(Slot::KernelInfoGetConstantInput_tensor)(
        info, index, is_constant, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return at<Status*(const Context*, size_t, const Value**)>(Slot::KernelContext_GetInput)(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return at<Status*(Context*, size_t, const int64_t*, size_t, Value**)>(Slot::KernelContext_GetOutput)(
        context, index, dims, rank, out);
  }
  // Calls work(data, i) for each i below total on the session's threads, which take the next i when they are done.
  Status* parallel_for(const Context* context, void (*work)(void*, size_t), size_t total, void* data) const {
    return at<Status*(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(Slot::KernelContext_ParallelFor)(
        context, work, total, 0, data);
  }
  Status* has_entry(const Options* options, const char* key, int* out) const {
    return at<Status*(const Options*, const char*, int*)>(Slot::HasSessionConfigEntry)(options, key, out);
  }
  // size: of `value`, and of the text with its final zero.
  Status* entry(const Options* options, const char* key, char* value, size_t* size) const {
    return at<Status*(const Options*, const char*, char*, size_t*)>(Slot::GetSessionConfigEntry)(options, key, value,
                                                                                                 size);
  }

 private:
  template <typename Signature>
  Signature* at(Slot slot) const {
    return reinterpret_cast<Signature*>(const_cast<void*>(table_[static_cast<int>(slot)]));
  }

  const void* const* table_;
};

struct ApiBase {
  const void* const* (*get)(uint32_t version);
  const char* (*version)();
};

// OrtCustomOp of version 17. Null is allowed for what is not used.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void* const* api, const Info*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t index);
  size_t (*inputs)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t index);
  size_t (*outputs)(const CustomOp*);
  void (*compute)(void* kernel, Context*);
  void (*destroy)(void* kernel);
  Characteristic (*input_characteristic)(const CustomOp*, size_t index);
  Characteristic (*output_characteristic)(const CustomOp*, size_t index);
  int (*input_memory)(const CustomOp*, size_t index);
  int (*variadic_input_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_v2)(const CustomOp*, const void* const* api, const Info*, void** kernel);
  Status* (*compute_v2)(void* kernel, Context*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
};

}  // namespace ort
