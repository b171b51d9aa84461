// ort_abi.h against ONNX Runtime itself. Each function whose effect can be seen without a session is called through the
// table of the library that is given, and what it returns shows that its place is right; the operators of ort_op.cpp
// use the others whenever a graph runs. With onnxruntime_c_api.h in the include path, every place is compared.
//
// usage: test_ort_abi LIBONNXRUNTIME

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "ort_abi.h"

#if __has_include("onnxruntime_c_api.h")
#include "onnxruntime_c_api.h"
#define CHECK_SLOT(name) \
  static_assert(offsetof(OrtApi, name) == static_cast<size_t>(ort::Slot::name) * sizeof(void*), #name)
CHECK_SLOT(CreateStatus);
CHECK_SLOT(GetErrorMessage);
CHECK_SLOT(CreateCustomOpDomain);
CHECK_SLOT(CustomOpDomain_Add);
CHECK_SLOT(AddCustomOpDomain);
CHECK_SLOT(GetTensorMutableData);
CHECK_SLOT(GetDimensionsCount);
CHECK_SLOT(GetDimensions);
CHECK_SLOT(GetTensorTypeAndShape);
CHECK_SLOT(KernelInfoGetAttribute_float);
CHECK_SLOT(KernelInfoGetAttribute_int64);
CHECK_SLOT(KernelContext_GetInput);
CHECK_SLOT(KernelContext_GetOutput);
CHECK_SLOT(ReleaseStatus);
CHECK_SLOT(ReleaseTensorTypeAndShapeInfo);
CHECK_SLOT(HasSessionConfigEntry);
CHECK_SLOT(GetSessionConfigEntry);
CHECK_SLOT(KernelInfoGetConstantInput_tensor);
CHECK_SLOT(KernelContext_ParallelFor);
static_assert(offsetof(OrtCustomOp, GetName) == offsetof(ort::CustomOp, name));
static_assert(offsetof(OrtCustomOp, KernelDestroy) == offsetof(ort::CustomOp, destroy));
static_assert(offsetof(OrtCustomOp, CreateKernelV2) == offsetof(ort::CustomOp, create_v2));
static_assert(offsetof(OrtCustomOp, KernelComputeV2) == offsetof(ort::CustomOp, compute_v2));
static_assert(offsetof(OrtCustomOp, GetEndVersion) == offsetof(ort::CustomOp, end_version));
#endif

namespace {

int failures = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

// What the test needs beside ort_abi.h, to make things to look at.
struct MemoryInfo;
const void* const* table;
template <typename Signature>
Signature* at(int slot) {
  return reinterpret_cast<Signature*>(const_cast<void*>(table[slot]));
}
ort::Status* create_options(ort::Options** out) { return at<ort::Status*(ort::Options**)>(10)(out); }
ort::Status* create_tensor(const MemoryInfo* info, void* data, size_t bytes, const int64_t* dims, size_t rank,
                           ort::ElementType type, ort::Value** out) {
  using Create = ort::Status*(const MemoryInfo*, void*, size_t, const int64_t*, size_t, ort::ElementType, ort::Value**);
  return at<Create>(49)(info, data, bytes, dims, rank, type, out);
}
ort::Status* create_memory_info(MemoryInfo** out) { return at<ort::Status*(int, int, MemoryInfo**)>(69)(0, 0, out); }
ort::Status* add_entry(ort::Options* options, const char* key, const char* value) {
  return at<ort::Status*(ort::Options*, const char*, const char*)>(130)(options, key, value);
}

void test_statuses(const ort::Api& api) {
  ort::Status* status = api.create_status(ort::INVALID_ARGUMENT, "a message");
  EXPECT(status && !std::strcmp(api.message(status), "a message"));
  api.release(status);
}

void test_options(const ort::Api& api) {
  ort::Options* options = nullptr;
  EXPECT(!create_options(&options));
  int there = 1;
  EXPECT(!api.has_entry(options, "convllava.activation_bits", &there) && there == 0);
  EXPECT(!add_entry(options, "convllava.activation_bits", "24"));
  EXPECT(!api.has_entry(options, "convllava.activation_bits", &there) && there == 1);
  char value[8] = "";
  size_t size = sizeof value;
  EXPECT(!api.entry(options, "convllava.activation_bits", value, &size) && !std::strcmp(value, "24") && size == 3);

  ort::Domain* domain = nullptr;
  EXPECT(!api.create_domain("test", &domain) && domain);
  ort::CustomOp op{};
  op.version = ort::VERSION;
  EXPECT(!api.add_to_domain(domain, &op));
  EXPECT(!api.add_domain(options, domain));
  at<void(ort::Options*)>(100)(options);
  at<void(ort::Domain*)>(101)(domain);
}

void test_tensors(const ort::Api& api) {
  MemoryInfo* info = nullptr;
  EXPECT(!create_memory_info(&info));
  float numbers[6] = {};
  const int64_t dims[2] = {2, 3};
  ort::Value* tensor = nullptr;
  EXPECT(!create_tensor(info, numbers, sizeof numbers, dims, 2, ort::FLOAT, &tensor));
  void* data = nullptr;
  EXPECT(!api.data(tensor, &data) && data == numbers);
  ort::Shape* shape = nullptr;
  EXPECT(!api.shape(tensor, &shape));
  size_t rank = 0;
  EXPECT(!api.rank(shape, &rank) && rank == 2);
  int64_t found[2] = {};
  EXPECT(!api.dims(shape, found, 2) && found[0] == 2 && found[1] == 3);
  api.release(shape);
  at<void(ort::Value*)>(96)(tensor);
  at<void(MemoryInfo*)>(94)(info);
}

}  // namespace

int main(int count, char** arguments) {
  void* library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  void* symbol = library ? dlsym(library, "OrtGetApiBase") : nullptr;
  if (!symbol) {
    std::fprintf(stderr, "usage: test_ort_abi LIBONNXRUNTIME; %s\n", library ? "it has no OrtGetApiBase" : dlerror());
    return 2;
  }
  const ort::ApiBase* base = reinterpret_cast<const ort::ApiBase* (*)()>(symbol)();
  table = base->get(ort::VERSION);
  EXPECT(table && !base->get(100000));
  const ort::Api api(table);
  test_statuses(api);
  test_options(api);
  test_tensors(api);
  std::printf(failures ? "ONNX Runtime %s: FAILED: %d\n" : "ONNX Runtime %s: passed\n", base->version(), failures);
  return failures != 0;
}
