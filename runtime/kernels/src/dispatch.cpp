#include <cstdlib>
#include <string>

#include "gemm.h"
#include "isa.h"
#include "kernel_error.h"

namespace convllava {
namespace {

const KernelSet& choose() {
  const char* wanted = std::getenv("CONVLLAVA_KERNELS");
  const KernelSets supported = supported_kernels();
  if (!wanted || !*wanted) return *supported.sets[0];
  std::string names;
  for (int i = 0; i < supported.count; ++i) {
    if (std::string(wanted) == supported.sets[i]->name) return *supported.sets[i];
    names += std::string(i ? ", " : "") + supported.sets[i]->name;
  }
  throw KernelError("CONVLLAVA_KERNELS: this processor, or this build, has no " + std::string(wanted) +
                    "; expected one of " + names);
}

}  // namespace

KernelSets supported_kernels() {
  KernelSets found{};
#ifdef CONVLLAVA_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {  // all that have these have F16C
    if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
      found.sets[found.count++] = &AVX512_VNNI;
#ifdef CONVLLAVA_AVX_VNNI
    if (__builtin_cpu_supports("avxvnni")) found.sets[found.count++] = &AVX_VNNI;
#endif
    found.sets[found.count++] = &AVX2;
  }
#endif
  found.sets[found.count++] = &REFERENCE;
  return found;
}

const KernelSet& chosen_kernels() {
  static const KernelSet& chosen = choose();
  return chosen;
}

}  // namespace convllava
